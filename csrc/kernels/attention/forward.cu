// out = dropout(softmax(scale * q k^T)) v, and lse = log2(sum(exp(scale * q k^T))) for the
// backward.
//
// Saved for the backward: q, k, v, out, lse (float32, to base 2; 0 for a row without keys)
// and the seed. No score is stored.
//
// A block has 64 queries of one head, a warp 16 of them: their q as operands, the scores and the
// sums for out stay in registers. Keys and values stream through shared memory in blocks of kKeys,
// two of which are there: while one is worked on the next is copied, with one barrier a block.
// Scores become an operand where they are, as the fragments of a sum and of an operand are the
// same. Products are made by mma.sync or, where there is wgmma and heads have 64 values, by that.
//
// The online softmax: with c = scale * log2 e, m is the largest c * score of a row so far, rounded;
// l is the sum of exp2(c s - m), and the sums hold the sum of exp2(c s - m) v. When m grows both
// are scaled down by exp2 of the difference of the two m. The product is rounded before anything is
// subtracted from it: were it the exact one here and the rounded one there, as by a fused
// multiply-add, large scores would scale by the rounding error. A negative scale is taken to q's
// sign. Dropout acts on what goes into the sums, not on l.
//
// Moves 4 values an element of q (q, k, v read; out written) where a tile holds all queries of a
// sequence, and 2 + 2 * tiles where it doesn't, mostly from the second-level cache.
#include <cmath>

#include "device/attention/forward_products.cuh"
#include "device/attention/launch.cuh"
#include "device/attention/scores.cuh"
#include "device/attention/turns.cuh"
#include "device/earlier.cuh"
#include "device/reduce.cuh"
#include "device/tile.cuh"
#include "kernels/attention/kernels.h"

namespace bertfast {
namespace {

template<int kDim>
struct Forward {
  // Wider heads take fewer keys at a time, so that two blocks or more fit a multiprocessor. With
  // wgmma, which reads keys and values itself, registers of heads of 64 suffice for four.
  static constexpr int kKeys = kDim <= 64 ? 64 : 32;
  static constexpr int kKeyBytes = kKeys * Tile<kDim>::kRowBytes;
  static constexpr int kStageBytes = 2 * kKeyBytes;  // keys, then values
  static constexpr int kTileBytes = 2 * kStageBytes;
  static_assert(kTileRows * Tile<kDim>::kRowBytes <= kStageBytes, "a stage holds the queries too");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  static constexpr int kNarrow = 64;
#else
  static constexpr int kNarrow = 32;
#endif
  static constexpr int kBlocks = blocks_that_fit(kTileBytes + ManyBits::kBeside, kDim <= kNarrow ? 4
                                                                                 : kDim < 128 ? 3
                                                                                              : 2);
};

// A tile, or of a shared one the sequence that is to be done alone; returns which one is next.
template<class T, int kDim, bool kDropout>
__device__ __forceinline__ int forward_tile(const AttentionForward& p, int alone) {
  using Shape = Forward<kDim>;
  using Rows = Tile<kDim>;
  constexpr int kKeys = Shape::kKeys;
  using Products = ForwardProducts<T, kDim, kKeys>;
  const int thread = anew(int(threadIdx.x)) & (kAttentionThreads - 1);
  const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;

  // 1. where the tile lies, which keys count
  TilePlace at = find_tile(p.batch, alone);
  if (at.first >= at.length && !p.batch.key_mask) return 0;
  const Keys keys(p.batch, at, Shape::kTileBytes + TilePlace::kSharedBytes, thread);
  // Dropout counts from the first key that counts: fragments must start at multiples of 16 from it.
  if (kDropout) at.first -= -keys.low & 15;
  if (at.first >= at.length) return 0;
  at.put(Shape::kTileBytes, thread);
  const int blocks = (keys.high - keys.low + kKeys - 1) / kKeys;

  // 2. copy the queries, into the second stage, and the first block of keys and values
  const auto stage = [](int block) {
    return shared_memory<uint4>((block & 1) * Shape::kStageBytes);
  };
  const auto value_stage = [](int block) {
    return shared_memory<uint4>((block & 1) * Shape::kStageBytes + Shape::kKeyBytes);
  };
  const auto tile_row = [&](int, int row) { return at.inside(row); };
  copies_of<Rows, kTileRows, T>(p.q, p.batch, at, at.first, thread).start(stage(1), 0, tile_row);
  cp_async_commit();
  const auto k_copies = copies_of<Rows, kKeys, T>(p.k, p.batch, at, keys.low, thread);
  const auto v_copies = copies_of<Rows, kKeys, T>(p.v, p.batch, at, keys.low, thread);
  KeyBits<kKeys> next(keys, 0);
  if (blocks > 0) {
    next.start(k_copies, stage(0), 0);
    next.start(v_copies, value_stage(0), 0);
  }
  cp_async_commit();
  const ScoreDropout dropout(p.batch, at, kDropout, Shape::kTileBytes, thread);
  constexpr int kManyBits = Shape::kTileBytes + ManyBits::kPlace;
  if (at.many > 1) {
    if (kDropout) __syncthreads();  // what draws need is there
    const int row = 16 * warp + g;
    ManyBits::find<kDropout, false>(p.batch, at, dropout, row, row + 8, thread)
        .put(kManyBits, thread);
  }
  cp_async_wait<1>();
  __syncthreads();
  unsigned q[kDim / 16][4];
  const unsigned sign = p.batch.scale < 0.f ? 0x80008000u : 0u;
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    Rows::load_a(q[k], stage(1), 16 * warp, k, thread);
#pragma unroll
    for (int i = 0; i < 4; ++i) q[k][i] ^= sign;
  }

  // 3. over the keys
  const float c = fmaxf(fabsf(p.batch.scale) * kLog2E, 0x1p-126f);
  const int query_call = ScoreDropout::query_call(at.first - keys.low + 16 * warp + g);
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {};
  float sums[kDim / 8][4] = {};
  for (int block = 0; block < blocks; ++block) {
    cp_async_wait<0>();
    Products::after_copies();
    __syncthreads();  // the block is there, and all warps are done with the other stage
    const KeyBits<kKeys> on = next;
    if (block + 1 < blocks) {
      next = KeyBits<kKeys>(keys, block + 1);
      next.start(k_copies, stage(block + 1), block + 1);
      next.start(v_copies, value_stage(block + 1), block + 1);
    }
    cp_async_commit();
    if (16 * warp >= at.tile && !Products::by_wgmma()) continue;

    // 3a. scores
    float s[kKeys / 8][4];
    Products::scores(s, q, stage(block), thread);
#pragma unroll
    for (int half = 0; half < kKeys / 32; ++half) {
      const int group = block * kKeys / 32 + half;
      mask_keys(s + 4 * half, -INFINITY, on.words[half], at, kManyBits, group, thread);
    }

    // 3b. probabilities
    bool grows = false;
    float used[2], alpha[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = -INFINITY;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        highest = fmaxf(highest, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      }
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
      highest = fmaxf(m[r], __fmul_rn(highest, c));
      // A row that has seen no key yet is all -inf: any finite m serves it.
      used[r] = highest == -INFINITY ? 0.f : highest;
      alpha[r] = exp2_approx(m[r] - used[r]);
      grows |= highest != m[r];
      m[r] = highest;
      l[r] *= alpha[r];
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = exp2_approx(fmaf(s[n][i], c, -used[i / 2]));
        l[i / 2] += s[n][i];
      }
    }
    // After a few blocks m hardly grows; then alpha is 1.
    if (block > 0 && __any_sync(0xffffffffu, grows)) {
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[n][i] *= alpha[i / 2];
      }
    }

    // 3c. dropout
    if constexpr (kDropout) {
#pragma unroll
      for (int half = 0; half < kKeys / 32; ++half) {
        const int group = block * kKeys / 32 + half;
        drop_keys(s + 4 * half, dropout, query_call, at, kManyBits, group, thread);
      }
    }

    // 3d. times the values
    Products::add_values(sums, s, value_stage(block), thread);
  }
  cp_async_wait<0>();

  // 4. normalise and write, unless somebody's NaN or infinity is in others' sums
  const TilePlace to = TilePlace::get(p.batch, Shape::kTileBytes);
  if (spoilt(to, all_finite(sums))) return next_alone(p.batch, to);
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    l[r] = lane_sum<4>(l[r]);
    const bool empty = l[r] == 0.f;
    factor[r] = empty ? 0.f : p.batch.keep_scale / l[r];
    const int row = 16 * warp + g + 8 * r;
    if (p.lse && t == 0 && to.inside(row)) {
      p.lse[statistics_of(p.batch, to, to.first + row)] = empty ? 0.f : m[r] + log2_approx(l[r]);
    }
  }
  // Nobody reads the stage that comes next any more.
  Rows::store(
      stage(blocks), sums, factor[0], factor[1], row_of<T>(p.out, to, to.first), p.out.token,
      p.batch.head_dim, thread, [](int row) { return row; },
      [&](int row) { return to.inside(row); }, [](int) { return true; });
  return turn_after(p.batch, to);
}

template<class T, int kDim, bool kDropout>
__global__ void __launch_bounds__(kAttentionThreads, Forward<kDim>::kBlocks)
    attention_forward_kernel(AttentionForward p) {
  await_earlier_kernels();
  for_each_turn([&](int alone) { return forward_tile<T, kDim, kDropout>(p, alone); });
}

}  // namespace

cudaError_t launch_forward_tiles(const AttentionForward& params, DType dtype, Stream stream) {
  AttentionForward p = params;
  return with_head_dim(dtype, p.batch.head_dim, [&](auto t, auto dim) {
    using T = decltype(t);
    constexpr int kDim = decltype(dim)::value;
    const dim3 grid = attention_grid(p.batch, 15);
    const int bytes = Forward<kDim>::kTileBytes + attention_bytes(p.batch);
    const auto kernel = p.batch.seed ? attention_forward_kernel<T, kDim, true>
                                     : attention_forward_kernel<T, kDim, false>;
    return launch_early(kernel, grid, dim3(kAttentionThreads), bytes, stream, p);
  });
}

}  // namespace bertfast
