// The gradient of attention's bias by distance. The kernel for dq has run before, and left lse and
// delta of each row.
//
// In its words, over all sequences: dbias[head, d] = sum of ds over scores with key - query = d
//
// The scores of a sequence are cut into blocks of 64 x 64. Those on one diagonal of blocks have the
// same distances at the same places, so a block of threads, which has a head, a diagonal and a
// share of the sequences, adds ds block to block in registers, a warp 16 queries. In the end it
// adds up each distance by way of shared memory, and writes 128 sums. The sums of neighbouring
// diagonals overlap, so there are two lines of them, and column_sum.cu adds the lines of all
// shares. No atomics, and every sum in a fixed order.
//
// Moves 4 values an element of q (q, dout, k, v) for each diagonal, mostly from the second-level
// cache.
#include "device/attention/launch.cuh"
#include "device/attention/scores.cuh"
#include "device/earlier.cuh"
#include "device/tile.cuh"
#include "kernels/attention/kernels.h"

namespace bertfast {
namespace {

constexpr int kDistances = 2 * kTileRows;  // of a block of scores, and one that no score has

template<int kDim>
struct BiasGradient {
  static constexpr int kPartBytes = kTileRows * Tile<kDim>::kRowBytes;
  static constexpr int kTileBytes = 4 * kPartBytes;  // q, dout, keys, values
  // The sums lie there in the end, rows so far apart that pairs fall into all banks.
  static constexpr int kSumRow = kTileRows + 8;
  static_assert(kTileRows * kSumRow * int(sizeof(float)) <= kTileBytes, "sums lie in the tiles");
  static constexpr int kBlocks = blocks_anywhere(kTileBytes + 2048, 2);
};

template<class T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, BiasGradient<kDim>::kBlocks)
    attention_backward_bias_kernel(AttentionBiasGradient p) {
  using Shape = BiasGradient<kDim>;
  using Rows = Tile<kDim>;
  await_earlier_kernels();
  const int thread = threadIdx.x, warp = thread / 32, g = thread % 32 / 4, t = thread % 4;

  // 1. the head, the diagonal and the share
  const AttentionBatch& batch = p.batch;
  const AttentionScores& scores = batch.scores;
  const int diagonal = int(blockIdx.x) / batch.heads % p.diagonals;
  const int share = int(blockIdx.x) / batch.heads / p.diagonals;
  const int apart = diagonal - p.diagonals / 2;  // blocks from a query's to its key's
  // In a window's shadow nothing is added, and the sums are zero as they are.
  if ((apart - 1) * kTileRows >= scores.right || (apart + 1) * kTileRows <= -scores.left) return;
  TilePlace at{};
  at.head = int(blockIdx.x) % batch.heads;
  at.many = 1;
  at.tile = kTileRows;
  const auto part = [](int i) { return shared_memory<uint4>(i * Shape::kPartBytes); };
  const float c = batch.scale * kLog2E;
  float sums[2][4][4] = {};

  // 2. over the share's sequences
  const int last = min((share + 1) * p.each, batch.batch);
  for (at.batch = share * p.each; at.batch < last; ++at.batch) {
    at.length = batch.length;
    if (batch.cu_seqlens) {
      at.start = batch.cu_seqlens[at.batch];
      at.length = batch.cu_seqlens[at.batch + 1] - at.start;
    }
    __syncthreads();  // what the sequence before has in shared memory has been read
    const Keys keys(batch, at, Shape::kTileBytes + TilePlace::kSharedBytes, thread);
    const ScoreDropout dropout(batch, at, batch.seed != nullptr, Shape::kTileBytes, thread);

    // 3. over the diagonal's blocks. Dropout counts from the first key that counts, and so do they.
    const auto blocks_of = [](int rows) { return (rows + kTileRows - 1) / kTileRows; };
    const int end = min(blocks_of(keys.high - keys.low) - apart, blocks_of(at.length - keys.low));
    for (int block = max(-apart, -blocks_of(keys.low)); block < end; ++block) {
      at.first = keys.low + block * kTileRows;
      const int key = at.first + apart * kTileRows;
      const KeyBits<kTileRows> on(keys, block + apart);

      // 3a. copy q and dout, keys and values
      const auto query_on = [&](int, int row) { return at.inside(row); };
      const auto copies = [&](const HeadRows<const void>& x, int position) {
        return copies_of<Rows, kTileRows, T>(x, batch, at, position, thread);
      };
      copies(p.q, at.first).start(part(0), 0, query_on);
      copies(p.dout, at.first).start(part(1), 0, query_on);
      on.start(copies(p.k, key), part(2), 0);
      on.start(copies(p.v, key), part(3), 0);
      cp_async_commit();
      float lse[2], delta[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = 16 * warp + g + 8 * r;
        float2 of_row = make_float2(INFINITY, 0.f);  // of which everything is zero
        if (at.inside(row)) of_row = p.statistics[statistics_of(batch, at, at.first + row)];
        lse[r] = of_row.x;
        delta[r] = of_row.y;
      }
      cp_async_wait<0>();
      __syncthreads();

#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // 3b. scores and dp
        float s[4][4] = {}, dp[4][4] = {};
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) {
          unsigned a[4], b[4];
          Rows::load_a(a, part(0), 16 * warp, k, thread);
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            Rows::load_b(b, part(2), 32 * half + 16 * n, k, thread);
            mma_m16n8k16<T>(s[2 * n], a, b[0], b[1]);
            mma_m16n8k16<T>(s[2 * n + 1], a, b[2], b[3]);
          }
          Rows::load_a(a, part(1), 16 * warp, k, thread);
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            Rows::load_b(b, part(3), 32 * half + 16 * n, k, thread);
            mma_m16n8k16<T>(dp[2 * n], a, b[0], b[1]);
            mma_m16n8k16<T>(dp[2 * n + 1], a, b[2], b[3]);
          }
        }

        // 3c. probabilities, dropout, ds
        const int query = at.first + 16 * warp;
        const KeysByPosition by(batch, at, Shape::kTileBytes, query, key + 32 * half, thread);
        by.add_bias(s, c);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) s[n][i] = exp2_approx(s[n][i] - lse[i / 2]);
        }
        by.mask(s, 0.f, on.words[half], 0, 0);
        if (batch.seed) {
          const int query_call = ScoreDropout::query_call(block * kTileRows + 16 * warp + g);
          const int group = (block + apart) * kTileRows / 32 + half;
          drop_keys(dp, dropout, query_call, at, 0, group, thread);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sums[half][n][i] = fmaf(s[n][i], dp[n][i] - delta[i / 2], sums[half][n][i]);
          }
        }
      }
      __syncthreads();  // all have read what the next copies overwrite
    }
  }

  // 4. the sums by distance: thread i has the distance i - kTileRows
  __syncthreads();
  const Shared<float2> pairs = shared_memory<float2>(0);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = 16 * warp + g + 8 * r, column = 32 * half + 8 * n + 2 * t;
        pairs.store((row * Shape::kSumRow + column) / 2,
                    make_float2(sums[half][n][2 * r], sums[half][n][2 * r + 1]));
      }
    }
  }
  __syncthreads();
  float sum = 0.f;
  for (int row = 0; row < kTileRows; ++row) {
    const int column = row + thread - kTileRows, near = min(max(column, 0), kTileRows - 1);
    const float ds = shared_memory<float>(0).load(row * Shape::kSumRow + near);
    sum += column == near ? ds : 0.f;
  }
  const int64_t line = (int64_t(2 * share) + diagonal % 2) * batch.heads + at.head;
  const int64_t length = int64_t(p.diagonals + 1) * kTileRows;
  p.partial[line * length + diagonal * kTileRows + thread] = sum * batch.keep_scale;
}

}  // namespace

cudaError_t launch_attention_backward_bias(const AttentionBiasGradient& p, DType dtype,
                                           Stream stream) {
  return with_wide_dim(dtype, p.batch.head_dim, [&](auto t, auto dim) {
    using T = decltype(t);
    constexpr int kDim = decltype(dim)::value;
    static_assert(kDistances == kAttentionThreads, "a thread has a distance");
    const dim3 grid(p.shares * p.diagonals * p.batch.heads);
    const int bytes = BiasGradient<kDim>::kTileBytes + attention_bytes(p.batch);
    const auto kernel = attention_backward_bias_kernel<T, kDim>;
    return launch_early(kernel, grid, dim3(kAttentionThreads), bytes, stream, p);
  });
}

}  // namespace bertfast
