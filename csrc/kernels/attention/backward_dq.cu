// dq, the gradient of attention's queries, and what the kernel for dk and dv needs of each row.
//
// With p = exp2(scale * log2 e * q k^T - lse) computed again, drops drawn again, z the dropout's
// factor of each score (0 or keep_scale) and < > the sum over a row's keys:
//   dp = z * (dout v^T),  delta = <p dp> = <dout * out over the head>
//   ds = p * (dp - delta),  dq = scale * ds k
// keep_scale is taken out: everything is computed without it and multiplied at the end, with
// delta / keep_scale in delta's place.
//
// A block has 64 queries and runs over the keys, as the forward does; it keeps q and dout as
// operands in registers and streams keys and values through two stages of shared memory. It sums
// delta, since it has dout and its rows at hand, and leaves delta and lse as pairs for
// backward_dkv.cu, whose kernel runs after this one. No atomics and no sums between warps.
//
// Moves 6 values an element of q and more (dout, out, q; k, v for each tile; dq), mostly from the
// second-level cache.
#include "device/attention/launch.cuh"
#include "device/attention/scores.cuh"
#include "device/attention/turns.cuh"
#include "device/earlier.cuh"
#include "device/reduce.cuh"
#include "device/tile.cuh"
#include "device/vec.cuh"
#include "kernels/attention/kernels.h"

namespace bertfast {
namespace {

template<int kDim>
struct Dq {
  using Rows = Tile<kDim>;
  // Keys and values in blocks of 64, worked on 32 at a time.
  static constexpr int kKeys = 64;
  static constexpr int kKeyBytes = kKeys * Rows::kRowBytes;
  static constexpr int kTileBytes = 4 * kKeyBytes;
  static constexpr int kBlocks =
      blocks_that_fit(kTileBytes + ManyBits::kBeside, kDim <= 64 ? 3 : 2);
};

// The sum of products of eight values.
template<class T>
__device__ __forceinline__ float dot8(uint4 a, uint4 b) {
  const Vec<T, 8> x{a}, y{b};
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum = fmaf(x[i], y[i], sum);
  return sum;
}

// A tile of queries, or of a shared one the sequence that is to be done alone; returns which one is
// next.
template<class T, int kDim, bool kDropout>
__device__ __forceinline__ int dq_tile(const AttentionBackward& p, int alone) {
  using Shape = Dq<kDim>;
  using Rows = Tile<kDim>;
  constexpr int kKeys = Shape::kKeys;
  const int thread = anew(int(threadIdx.x)) & (kAttentionThreads - 1);
  const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;

  // 1. where the tile lies, which keys count
  TilePlace at = find_tile(p.batch, alone);
  if (at.first >= at.length && !p.batch.key_mask) return 0;
  const Keys keys(p.batch, at, Shape::kTileBytes + TilePlace::kSharedBytes, thread);
  if (kDropout) at.first -= -keys.low & 15;  // as in the forward
  if (at.first >= at.length) return 0;
  at.put(Shape::kTileBytes, thread);
  const int blocks = (keys.high - keys.low + kKeys - 1) / kKeys;

  // 2. copy q and dout, into the second stage, and the first block of keys and values
  const auto stage = [](int block, int part) {
    return shared_memory<uint4>(((block & 1) * 2 + part) * Shape::kKeyBytes);
  };
  const auto tile_row = [&](int, int row) { return at.inside(row); };
  copies_of<Rows, kTileRows, T>(p.q, p.batch, at, at.first, thread).start(stage(1, 0), 0, tile_row);
  copies_of<Rows, kTileRows, T>(p.dout, p.batch, at, at.first, thread)
      .start(stage(1, 1), 0, tile_row);
  cp_async_commit();
  const auto k_copies = copies_of<Rows, kKeys, T>(p.k, p.batch, at, keys.low, thread);
  const auto v_copies = copies_of<Rows, kKeys, T>(p.v, p.batch, at, keys.low, thread);
  KeyBits<kKeys> next(keys, 0);
  if (blocks > 0) {
    next.start(k_copies, stage(0, 0), 0);
    next.start(v_copies, stage(0, 1), 0);
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

  // 3. delta, a row by four lanes, while they wait; lse
  const float keep_scale = anew(p.batch.keep_scale);
  const float inverse_keep = keep_scale > 0.f ? 1.f / keep_scale : 0.f;
  uint4 out[2][kDim / 32] = {};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = 16 * warp + g + 8 * r;
    if (!at.inside(row)) continue;
    const uint4* chunks = vector_at<const uint4>(row_of<const T>(p.out, at, at.first + row));
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      if (8 * Rows::quad_chunk(row, i, thread) < p.batch.head_dim) {
        out[r][i] = __ldg(chunks + Rows::quad_chunk(row, i, thread));
      }
    }
  }
  cp_async_wait<1>();
  __syncthreads();
  float delta[2], lse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = 16 * warp + g + 8 * r;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      sum +=
          dot8<T>(out[r][i], stage(1, 1).load(Rows::place(row, Rows::quad_chunk(row, i, thread))));
    }
    delta[r] = lane_sum<4>(sum) * inverse_keep;
    lse[r] = 0.f;
    if (at.inside(row)) {
      const int64_t index = statistics_of(p.batch, at, at.first + row);
      lse[r] = p.lse[index];
      if (t == 0) p.statistics[index] = make_float2(lse[r], delta[r]);
    }
  }
  unsigned q[kDim / 16][4], dout[kDim / 16][4];
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    Rows::load_a(q[k], stage(1, 0), 16 * warp, k, thread);
    Rows::load_a(dout[k], stage(1, 1), 16 * warp, k, thread);
  }

  // 4. over the keys
  const float c = p.batch.scale * kLog2E;
  const int query_call = ScoreDropout::query_call(at.first - keys.low + 16 * warp + g);
  float dq[kDim / 8][4] = {};
  for (int block = 0; block < blocks; ++block) {
    cp_async_wait<0>();
    __syncthreads();  // the block is there, and all warps are done with the other stage
    const KeyBits<kKeys> on = next;
    if (block + 1 < blocks) {
      next = KeyBits<kKeys>(keys, block + 1);
      next.start(k_copies, stage(block + 1, 0), block + 1);
      next.start(v_copies, stage(block + 1, 1), block + 1);
    }
    cp_async_commit();
    if (16 * warp >= at.tile) continue;
#pragma unroll 1
    for (int half = 0; half < kKeys / 32; ++half) {
      const int group = block * kKeys / 32 + half;

      // 4a. scores and dp
      float s[4][4] = {}, dp[4][4] = {};
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          unsigned b[4];
          Rows::load_b(b, stage(block, 0), 32 * half + 16 * n, k, thread);
          mma_m16n8k16<T>(s[2 * n], q[k], b[0], b[1]);
          mma_m16n8k16<T>(s[2 * n + 1], q[k], b[2], b[3]);
          Rows::load_b(b, stage(block, 1), 32 * half + 16 * n, k, thread);
          mma_m16n8k16<T>(dp[2 * n], dout[k], b[0], b[1]);
          mma_m16n8k16<T>(dp[2 * n + 1], dout[k], b[2], b[3]);
        }
      }

      // 4b. probabilities; zero where nothing counts, whatever lse is
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = exp2_approx(fmaf(s[n][i], c, -lse[i / 2]));
      }
      // The widest heads leave no registers to keep the bits in.
      const unsigned bits = kDim == 128 ? keys.bits(keys.low + 32 * group)
                            : half      ? on.words[1]
                                        : on.words[0];
      mask_keys(s, 0.f, bits, at, kManyBits, group, thread);

      // 4c. dropout
      if constexpr (kDropout) {
        drop_keys(dp, dropout, query_call, at, kManyBits, group, thread);
      }

      // 4d. dq += ds k
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] *= dp[n][i] - delta[i / 2];
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        unsigned a[4];
        as_operand<T>(a, s[2 * k], s[2 * k + 1]);
#pragma unroll
        for (int n = 0; n < kDim / 16; ++n) {
          unsigned b[4];
          Rows::load_b_trans(b, stage(block, 0), 32 * half + 16 * k, n, thread);
          mma_m16n8k16<T>(dq[2 * n], a, b[0], b[1]);
          mma_m16n8k16<T>(dq[2 * n + 1], a, b[2], b[3]);
        }
      }
    }
  }
  cp_async_wait<0>();

  // 5. scale and write, by way of the stage that nobody reads any more, unless somebody's NaN or
  // infinity is in others' sums
  const TilePlace to = TilePlace::get(p.batch, Shape::kTileBytes);
  if (spoilt(to, all_finite(dq))) return next_alone(p.batch, to);
  const float factor = anew(p.batch.scale) * p.batch.keep_scale;
  Rows::store(
      stage(blocks, 0), dq, factor, factor, row_of<T>(p.dq, to, to.first), p.dq.token,
      p.batch.head_dim, thread, [](int row) { return row; },
      [&](int row) { return to.inside(row); }, [](int) { return true; });
  return turn_after(p.batch, to);
}

template<class T, int kDim, bool kDropout>
__global__ void __launch_bounds__(kAttentionThreads, Dq<kDim>::kBlocks)
    attention_backward_dq_kernel(AttentionBackward p) {
  await_earlier_kernels();
  for_each_turn([&](int alone) { return dq_tile<T, kDim, kDropout>(p, alone); });
}

}  // namespace

cudaError_t launch_dq_tiles(const AttentionBackward& params, DType dtype, Stream stream) {
  AttentionBackward p = params;
  return with_head_dim(dtype, p.batch.head_dim, [&](auto t, auto dim) {
    using T = decltype(t);
    constexpr int kDim = decltype(dim)::value;
    const dim3 grid = attention_grid(p.batch, 15);
    const int bytes = Dq<kDim>::kTileBytes + attention_bytes(p.batch);
    const auto kernel = p.batch.seed ? attention_backward_dq_kernel<T, kDim, true>
                                     : attention_backward_dq_kernel<T, kDim, false>;
    return launch_early(kernel, grid, dim3(kAttentionThreads), bytes, stream, p);
  });
}

}  // namespace bertfast
