// The forward's two products with a block of keys and values in shared memory: queries times keys,
// and probabilities times values. Operands of the left side come from registers.
//
// On Hopper a warpgroup multiplies heads of 64 values by wgmma, which reads each key and value from
// shared memory once for 64 queries instead of once for 16, and needs no registers for it. All
// warps must take part, those without a query too.
#pragma once

#include "device/attention/own_rows.cuh"
#include "device/attention/scores.cuh"
#include "device/tile.cuh"
#include "device/wgmma.cuh"

namespace bertfast {

// kParts: how many 16 queries a warp has. What it reads of keys and values serves all of them.
template<class T, int kDim, int kKeys, int kParts>
struct ForwardProducts {
  using Rows = Tile<kDim>;
  static constexpr bool kFitsWgmma = kDim == 64 && kKeys == 64 && kParts == 1;

  static __device__ __forceinline__ bool by_wgmma() { return kFitsWgmma && has_wgmma(); }

  // Between this thread's wait for its copies and the barrier that tells the others.
  static __device__ __forceinline__ void after_copies() {
    if (by_wgmma()) async_proxy_fence();
  }

  // s = q keys^T, for the warp's queries.
  template<bool kHeld>
  static __device__ __forceinline__ void scores(float (&s)[kParts][kKeys / 8][4],
                                                const OwnRows<kDim, kParts, kHeld>& q,
                                                Shared<uint4> keys, int thread) {
    if (by_wgmma()) {
      if constexpr (kFitsWgmma) {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) {
          const int at = k * kWgmmaStep<Rows::kRowBytes, Major::kInner>;
          wgmma<T, Major::kInner>(s[0], q.held[0][k], wgmma_matrix<Rows::kRowBytes>(keys, at),
                                  k > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
      }
      return;
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[part][n][i] = 0.f;
      }
    }
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      unsigned a[kParts][4];
#pragma unroll
      for (int part = 0; part < kParts; ++part) q.load(a[part], part, k, thread);
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        unsigned b[4];
        Rows::load_b(b, keys, 16 * n, k, thread);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          mma_m16n8k16<T>(s[part][2 * n], a[part], b[0], b[1]);
          mma_m16n8k16<T>(s[part][2 * n + 1], a[part], b[2], b[3]);
        }
      }
    }
  }

  // sums += p values, with p rounded to T.
  static __device__ __forceinline__ void add_values(float (&sums)[kParts][kDim / 8][4],
                                                    const float (&p)[kParts][kKeys / 8][4],
                                                    Shared<uint4> values, int thread) {
    if (by_wgmma()) {
      if constexpr (kFitsWgmma) {
        unsigned a[kKeys / 16][4];
#pragma unroll
        for (int k = 0; k < kKeys / 16; ++k) as_operand<T>(a[k], p[0][2 * k], p[0][2 * k + 1]);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kKeys / 16; ++k) {
          const int at = k * kWgmmaStep<Rows::kRowBytes, Major::kOuter>;
          wgmma<T, Major::kOuter>(sums[0], a[k], wgmma_matrix<Rows::kRowBytes>(values, at), true);
        }
        wgmma_commit();
        wgmma_wait<0>();
      }
      return;
    }
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      unsigned a[kParts][4];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        as_operand<T>(a[part], p[part][2 * k], p[part][2 * k + 1]);
      }
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        unsigned b[4];
        Rows::load_b_trans(b, values, 16 * k, n, thread);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          mma_m16n8k16<T>(sums[part][2 * n], a[part], b[0], b[1]);
          mma_m16n8k16<T>(sums[part][2 * n + 1], a[part], b[2], b[3]);
        }
      }
    }
  }
};

}  // namespace bertfast
