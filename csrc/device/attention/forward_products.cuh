// The forward's two products with a block of keys and values in shared memory: queries times keys,
// and probabilities times values. Operands of the left side come from registers.
//
// On Hopper a warpgroup multiplies heads of 64 values by wgmma, which reads each key and value from
// shared memory once for 64 queries instead of once for 16, and needs no registers for it. All
// warps must take part, those without a query too.
#pragma once

#include "device/attention/scores.cuh"
#include "device/tile.cuh"
#include "device/wgmma.cuh"

namespace bertfast {

template<class T, int kDim, int kKeys>
struct ForwardProducts {
  using Rows = Tile<kDim>;
  static constexpr bool kFitsWgmma = kDim == 64 && kKeys == 64;

  static __device__ __forceinline__ bool by_wgmma() { return kFitsWgmma && has_wgmma(); }

  // Between this thread's wait for its copies and the barrier that tells the others.
  static __device__ __forceinline__ void after_copies() {
    if (by_wgmma()) async_proxy_fence();
  }

  // s = q keys^T, for the warp's 16 queries.
  static __device__ __forceinline__ void scores(float (&s)[kKeys / 8][4],
                                                const unsigned (&q)[kDim / 16][4],
                                                Shared<uint4> keys, int thread) {
    if (by_wgmma()) {
      if constexpr (kFitsWgmma) {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) {
          const int at = k * kWgmmaStep<Rows::kRowBytes, Major::kInner>;
          wgmma<T, Major::kInner>(s, q[k], wgmma_matrix<Rows::kRowBytes>(keys, at), k > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
      }
      return;
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = 0.f;
    }
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        unsigned b[4];
        Rows::load_b(b, keys, 16 * n, k, thread);
        mma_m16n8k16<T>(s[2 * n], q[k], b[0], b[1]);
        mma_m16n8k16<T>(s[2 * n + 1], q[k], b[2], b[3]);
      }
    }
  }

  // sums += p values, with p rounded to T.
  static __device__ __forceinline__ void add_values(float (&sums)[kDim / 8][4],
                                                    const float (&p)[kKeys / 8][4],
                                                    Shared<uint4> values, int thread) {
    if (by_wgmma()) {
      if constexpr (kFitsWgmma) {
        unsigned a[kKeys / 16][4];
#pragma unroll
        for (int k = 0; k < kKeys / 16; ++k) as_operand<T>(a[k], p[2 * k], p[2 * k + 1]);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kKeys / 16; ++k) {
          const int at = k * kWgmmaStep<Rows::kRowBytes, Major::kOuter>;
          wgmma<T, Major::kOuter>(sums, a[k], wgmma_matrix<Rows::kRowBytes>(values, at), true);
        }
        wgmma_commit();
        wgmma_wait<0>();
      }
      return;
    }
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      unsigned a[4];
      as_operand<T>(a, p[2 * k], p[2 * k + 1]);
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        unsigned b[4];
        Rows::load_b_trans(b, values, 16 * k, n, thread);
        mma_m16n8k16<T>(sums[2 * n], a, b[0], b[1]);
        mma_m16n8k16<T>(sums[2 * n + 1], a, b[2], b[3]);
      }
    }
  }
};

}  // namespace bertfast
