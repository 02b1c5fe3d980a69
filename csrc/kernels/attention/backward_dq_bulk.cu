// dq, the gradient of attention's queries, for Hopper: by bulk copies and wgmma. What it computes,
// and what it leaves for dk and dv, stands in backward_dq.cu.
//
// A block has two tiles of 64 queries and streams keys and values to both. q and dout stay in
// shared memory, from where wgmma reads them; of the operands only ds comes from registers. While
// one warpgroup makes probabilities the other multiplies, and the next block's scores are
// multiplied together with this one's ds and keys, so there is one wait a block.
//
// Moves what backward_dq.cu moves, keys and values half as often.
#include "device/attention/bulk_backward.cuh"
#include "device/attention/rotary.cuh"
#include "device/attention/row_statistics.cuh"
#include "device/earlier.cuh"
#include "device/gpu.cuh"
#include "kernels/attention/kernels.h"

namespace bertfast {
namespace {

// A tile of queries, or of a shared one the sequence that is to be done alone; returns which one is
// next. turn: how many came before.
template<class T, int kDim, bool kDropout>
__device__ __forceinline__ int dq_tile(const BulkBackward<kDim>& p, const BulkTiles<kDim>& tiles,
                                       const Keys& keys, TilePlace at, int turn) {
  using Tiles = BulkTiles<kDim>;
  const int thread = anew(int(threadIdx.x)) & (kWarpgroup - 1);
  const int warp = thread / 32, g = thread % 32 / 4;
  const int place = Tiles::kPlaces + tiles.group * TilePlace::kSharedBytes;
  const int many = warp_uniform(at.many);
  const auto& stream = tiles.stream;

  // 1. copy the first keys and values, q and dout
  const int rows[2] = {p.streamed[0].row(at, keys.low), p.streamed[1].row(at, keys.low)};
  const int head = at.head, from = warp_uniform(at.from), to = warp_uniform(at.length);
  const int blocks = warp_uniform((keys.high - keys.low + kTileRows - 1) / kTileRows);
  const auto load = [&](int block) {
    stream.load(p.streamed[0], p.streamed[1], head, rows, block);
  };
  const bool loads = warp_uniform(int(threadIdx.x) / 32) == 0;
  constexpr int kAhead = Tiles::Stream::kStages - 1;
  if (loads && elect_one()) {
    for (int block = 0; block < kAhead && block < blocks; ++block) load(block);
  }
  const auto same = [](int row) { return row; };
  const auto inside = [&](int row) { return at.inside(row); };
  tiles.template start_copy<T>(0, p.q, p, at, thread, same, inside);
  tiles.template start_copy<T>(1, p.dout, p, at, thread, same, inside);
  cp_async_commit();
  at.put(place, thread);
  const ScoreDropout dropout(p.batch, at, kDropout, place, thread);
  if (many > 1) {
    // What draws need is there.
    if (kDropout) named_barrier_sync(tiles.of_group(), kWarpgroup);
    ManyBits::find<kDropout, false>(p.batch, at, dropout, 16 * warp + g, 16 * warp + g + 8, thread)
        .put(Tiles::kManyBits, thread);
  }

  // 2. delta, a row by four lanes, while they wait; lse
  RowStatistics<T, kDim> row(p, at, 16 * warp + g, thread);
  cp_async_wait<0>();
  async_proxy_fence();
  named_barrier_sync(tiles.of_group(), kWarpgroup);
  row.sum(p, at, 16 * warp + g, thread, [&](int r, int chunk) {
    using Rows = Tile<HeadBoxes<kDim>::kColumns>;
    constexpr int kChunks = Rows::kChunks;
    const int slab = tiles.tile(tiles.group, 1) + chunk / kChunks * kTileRows * Rows::kRowBytes;
    return shared_memory<uint4>(slab).load(Rows::place(r, chunk % kChunks));
  });
  const float lse[2] = {row.lse[0], row.lse[1]}, delta[2] = {row.delta[0], row.delta[1]};

  // 3. over the keys
  const float c = p.batch.scale * kLog2E;
  const int query_call = ScoreDropout::query_call(at.first - keys.low + 16 * warp + g);
  float dq[kDim / 8][4] = {}, s[8][4] = {}, dp[8][4] = {};
  BlockBits on = {0xffffffffu, 0xffffffffu};  // which keys of the block count
  // Waits for a block; keys that don't count become zeros.
  const auto arrive = [&](int block, int again) {
    stream.wait(block, again);
    const int position = keys.low + block * kTileRows;
    if (!keys.masked && from <= position && position + kTileRows <= to) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      on[i] = keys.bits(position + 32 * i);
      if (many > 1) on[i] &= bits_inside(position + 32 * i, from, to);
    }
    if ((on[0] & on[1]) == 0xffffffffu) return;
    tiles.zero_rows(block, 0, on);
    tiles.zeroed();
  };
  const uint64_t q = tiles.matrix(0), dout = tiles.matrix(1);
  const auto multiply_scores = [&](int block) {
    tiles.template multiply_scores<T>(s, q, 0, block);
    tiles.template multiply_scores<T>(dp, dout, 1, block);
  };
  const auto turn_of = [&](int block, auto is_last) {
    constexpr bool kLast = decltype(is_last)::value;
    // 3a. the stage of the block before gets new keys and values
    if (!kLast && loads && block + kAhead < blocks && elect_one()) {
      if (block > 0) stream.wait_released(block - 1);
      load(block + kAhead);
    }

    // 3b. probabilities, dropout and ds, which is zero where nothing counts, whatever is there
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = exp2_approx(fmaf(s[n][i], c, -lse[i / 2]));
    }
    TilePlace one{};
    one.many = kLast ? many : 1;  // a shared tile has one block
    if constexpr (kDropout) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        drop_keys(dp + 4 * half, dropout, query_call, one, Tiles::kManyBits, 2 * block + half,
                  thread);
      }
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] *= dp[n][i] - delta[i / 2];
    }
    if (kLast || keys.masked) {
      mask_keys(s, 0.f, on[0], one, Tiles::kManyBits, 0, thread);
      mask_keys(s + 4, 0.f, on[1], one, Tiles::kManyBits, 1, thread);
    }
    unsigned ds[4][4];
#pragma unroll
    for (int step = 0; step < 4; ++step) as_operand<T>(ds[step], s[2 * step], s[2 * step + 1]);

    // 3c. dq += ds k, and the next scores
    if constexpr (!kLast) arrive(block + 1, 0);
    wgmma_fence();
    tiles.template add_product<T>(dq, ds, 0, block);
    if constexpr (!kLast) multiply_scores(block + 1);
    wgmma_commit();
    wgmma_wait<0>();
    if (!kLast && thread % 32 == 0) stream.release(block);
  };
  if (blocks > 0) {
    arrive(0, turn);
    wgmma_fence();
    multiply_scores(0);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll 1
    for (int block = 0; block < blocks - 1; ++block) turn_of(block, std::false_type());
    turn_of(blocks - 1, std::true_type());
  }

  // 4. rotate back, scale and write, by way of q's tile, unless somebody's NaN or infinity is in
  // others' sums
  const TilePlace back = TilePlace::get(p.batch, place);
  if (tiles.spoilt(back, all_finite(dq), thread)) return next_alone(p.batch, back);
  if (is_rotary(p.batch)) rotate_whole_heads<kDim>(dq, p.batch, back, thread, same);
  tiles.template store<T>(
      0, dq, anew(p.batch.scale) * p.batch.keep_scale, p.dq, p, back, thread, same,
      [&](int r) { return back.inside(r); }, [](int) { return true; });
  return tiles.turn_after(p.batch, back);
}

template<class T, int kDim, bool kDropout>
__global__ void __launch_bounds__(BulkTiles<kDim>::kMostThreads)
    attention_backward_dq_bulk_kernel(const __grid_constant__ BulkBackward<kDim> p) {
#if defined(BERTFAST_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if (threadIdx.x == 0) {
    for (const auto& heads : p.streamed) tma_prefetch(heads.map);
  }
  await_earlier_kernels();
  using Tiles = BulkTiles<kDim>;
  TilePlace at = find_tile<Tiles::kRows>(p.batch, 0);
  if (Tiles::none(p.batch, at)) return;
  Keys keys(p.batch, at, Tiles::kKeys, int(threadIdx.x), Tiles::kThreads / 32);
  if (kDropout) at.first -= -keys.low & 15;  // as in the forward
  if (at.first >= at.length) return;
  const Tiles tiles(at);
  if (tiles.group >= tiles.warpgroups) return;
  int turn = 0;
  while (const int alone = dq_tile<T, kDim, kDropout>(p, tiles, keys, at, turn)) {
    at = find_tile(p.batch, alone);
    keys.high = at.length;
    ++turn;
  }
#endif
}

}  // namespace

// That bulk copies find the heads, that these can be rotated back where they are summed, that there
// is code of the kernels, and that they are worth it: up to two tiles a sequence memory is the
// limit, and sequences that share a tile of 32 don't fill a warpgroup.
bool fits_bulk_backward(const AttentionBackward& p) {
  const AttentionBatch& of = p.batch;
  if (of.length <= 2 * kTileRows || of.tile != kTileRows || !has_whole_heads(of)) return false;
  Boxes boxes;
  int sequence;
  for (const HeadRows<const void>& heads : {p.q, p.k, p.v, p.dout}) {
    if (!describe_heads(&boxes, &sequence, heads, of)) return false;
  }
  using Tiles = BulkTiles<64>;
  return has_code(attention_backward_dq_bulk_kernel<__half, 64, false>, Tiles::kThreads);
}

cudaError_t launch_dq_bulk(const AttentionBackward& p, DType dtype, Stream stream) {
  return with_bulk_dim(dtype, p.batch.head_dim, [&](auto t, auto dim) {
    using T = decltype(t);
    constexpr int kDim = decltype(dim)::value;
    const auto kernel = p.batch.seed ? attention_backward_dq_bulk_kernel<T, kDim, true>
                                     : attention_backward_dq_bulk_kernel<T, kDim, false>;
    return launch_bulk<kDim>(kernel, p, {p.k, p.v}, 15, stream);
  });
}

}  // namespace bertfast
