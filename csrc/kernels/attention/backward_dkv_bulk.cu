// dk and dv, the gradients of attention's keys and values, for Hopper: by bulk copies and wgmma.
// What it computes stands in backward_dkv.cu. dq's kernel has run before, and left lse and delta of
// each row.
//
// A block has two tiles of 64 keys and streams queries and dout to both. It multiplies the
// transposed scores, keys as rows: then p and ds are operands where they are. The tiles of keys and
// values stay in shared memory, from where wgmma reads them. While one warpgroup makes
// probabilities the other multiplies, and the next block's scores are multiplied together with this
// one's p and ds, so there is one wait a block.
//
// Moves what backward_dkv.cu moves, queries and dout half as often.
#include "device/attention/bulk_backward.cuh"
#include "device/attention/key_rows.cuh"
#include "device/attention/rotary.cuh"
#include "device/earlier.cuh"
#include "kernels/attention/kernels.h"

namespace bertfast {
namespace {

// A tile of keys, or of a shared one the sequence that is to be done alone; returns which one is
// next. turn: how many came before.
template<class T, int kDim, bool kDropout>
__device__ __forceinline__ int dkv_tile(const BulkBackward<kDim>& p, const BulkTiles<kDim>& tiles,
                                        int first_key, TilePlace at, int turn) {
  using Tiles = BulkTiles<kDim>;
  const int thread = anew(int(threadIdx.x)) & (kWarpgroup - 1);
  const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  const int place = Tiles::kPlaces + tiles.group * TilePlace::kSharedBytes;
  const int many = warp_uniform(at.many);
  const auto& stream = tiles.stream;

  // 1. copy the first queries, the keys and values. Queries come in blocks of 16 from the first
  // key, as in the other kernels.
  const int first_query = kDropout ? -(-first_key & 15) : 0;
  const int rows[2] = {p.streamed[0].row(at, first_query), p.streamed[1].row(at, first_query)};
  const int head = at.head, from = warp_uniform(at.from), to = warp_uniform(at.length);
  const int blocks = warp_uniform((to - first_query + kTileRows - 1) / kTileRows);
  const auto load = [&](int block) {
    stream.load(p.streamed[0], p.streamed[1], head, rows, block);
  };
  const bool loads = warp_uniform(int(threadIdx.x) / 32) == 0;
  constexpr int kAhead = Tiles::Stream::kStages - 1;
  if (loads && elect_one()) {
    for (int block = 0; block < kAhead && block < blocks; ++block) load(block);
  }
  const auto key_on = [&](int key) { return at.counts(key); };
  tiles.template start_copy<T>(0, p.k, p, at, thread, key_of_row, key_on);
  tiles.template start_copy<T>(1, p.v, p, at, thread, key_of_row, key_on);
  // lse and delta of a block's queries. Beyond the sequence they are zero, as all else is: p is 1,
  // and its products are zero.
  const int statistics = Tiles::kStatistics + tiles.group * Tiles::kStatisticsBytes;
  const float2* const statistics_from = p.statistics + statistics_of(p.batch, at, first_query);
  const auto load_statistics = [&](int block) {
    const int query = block * kTileRows + thread;
    if (thread < kTileRows) {
      cp_async(shared_memory<float2>(statistics), (block & 1) * kTileRows + thread,
               statistics_from + query, first_query + query >= from && first_query + query < to);
    }
    cp_async_commit();
  };
  load_statistics(0);
  at.put(place, thread);
  const ScoreDropout dropout(p.batch, at, kDropout, place, thread);
  const int my_key = key_of_row(16 * warp + g);
  if (many > 1) {
    // What draws need is there.
    if (kDropout) named_barrier_sync(tiles.of_group(), kWarpgroup);
    const int other_key = key_of_row(16 * warp + g + 8);
    ManyBits::find<kDropout, true>(p.batch, at, dropout, my_key, other_key, thread)
        .put(Tiles::kManyBits, thread);
  }
  cp_async_wait<0>();
  async_proxy_fence();
  named_barrier_sync(tiles.of_group(), kWarpgroup);

  // 2. over the queries
  const float c = p.batch.scale * kLog2E;
  const int key_call = ScoreDropout::key_call(at.first - first_key + my_key);
  // Wide heads leave registers for the scores of half a block's queries at a time.
  constexpr int kQueries = kDim <= 64 ? kTileRows : kTileRows / 2;
  constexpr int kParts = kTileRows / kQueries, kSteps = kQueries / 16;
  float dk[kDim / 8][4] = {}, dv[kDim / 8][4] = {}, s[kQueries / 8][4] = {},
                  dp[kQueries / 8][4] = {};
  // Waits for a block; what isn't the sequence's becomes zeros.
  const auto arrive = [&](int block, int again) {
    stream.wait(block, again);
    const int position = first_query + block * kTileRows;
    if (from <= position && position + kTileRows <= to) return;
    const BlockBits inside = {bits_inside(position, from, to),
                              bits_inside(position + 32, from, to)};
    tiles.zero_rows(block, 0, inside);
    tiles.zero_rows(block, 1, inside);
    tiles.zeroed();
  };
  const uint64_t k = tiles.matrix(0), v = tiles.matrix(1);
  const auto multiply_scores = [&](int block, int row) {
    tiles.template multiply_scores<T>(s, k, 0, block, row);
    tiles.template multiply_scores<T>(dp, v, 1, block, row);
  };
  const auto turn_of = [&](int block, auto of_last, auto which) {
    constexpr bool kLast = decltype(of_last)::value;  // block
    constexpr int kPart = decltype(which)::value, kFirst = kPart * kQueries;
    constexpr bool kEnds = kPart == kParts - 1;  // the block
    // 2a. the stage of the block before gets new queries
    if constexpr (!kLast && kPart == 0) {
      if (loads && block + kAhead < blocks && elect_one()) {
        if (block > 0) stream.wait_released(block - 1);
        load(block + kAhead);
      }
      load_statistics(block + 1);
    }

    // 2b. probabilities, dropout and ds. A masked key spoils only its own rows, which are not
    // written.
    ManyBits bits;  // a shared tile has one block
    if (kLast && many > 1) bits = ManyBits::get(Tiles::kManyBits, thread);
    unsigned p_operands[kSteps][4], ds_operands[kSteps][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      [[maybe_unused]] unsigned words[2][2];
      if constexpr (kDropout) {
        if (kLast && many > 1) {
          // Draws that give the bits: the largest, or zero.
          const unsigned keep = bits.keep >> (kFirst / 4 + 4 * step);
#pragma unroll
          for (int i = 0; i < 4; ++i) words[i % 2][i / 2] = (keep >> i & 0x10001u) * 0xffffu;
        } else {
          share_draws(words, dropout,
                      first_query - first_key + block * kTileRows + kFirst + 16 * step, key_call,
                      thread);
        }
      }
      float dropped[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float (&scores)[4] = s[2 * step + n];
        float (&slopes)[4] = dp[2 * step + n];
        const int query = (block & 1) * kTileRows + kFirst + 16 * step + 8 * n;
        const float4 pairs = shared_memory<float4>(statistics).load(query / 2 + t);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scores[i] = exp2_approx(fmaf(scores[i], c, -(i % 2 ? pairs.z : pairs.x)));
          if (kLast && many > 1) {
            const bool same =
                bits.same >> (kFirst / 4 + 4 * step + 16 * (i / 2) + 2 * n + i % 2) & 1;
            scores[i] = same ? scores[i] : 0.f;
          }
          dropped[n][i] = scores[i];
          if constexpr (kDropout) {
            const unsigned word = words[i % 2][n];
            const bool kept = i / 2 ? dropout.keeps_high(word) : dropout.keeps_low(word);
            dropped[n][i] = kept ? dropped[n][i] : 0.f;
            slopes[i] = kept ? slopes[i] : 0.f;
          }
          scores[i] *= slopes[i] - (i % 2 ? pairs.w : pairs.y);
        }
      }
      as_operand<T>(p_operands[step], dropped[0], dropped[1]);
      as_operand<T>(ds_operands[step], s[2 * step], s[2 * step + 1]);
    }

    // 2c. dv += p^T dout, dk += ds^T q, and the next scores
    if constexpr (!kLast && kEnds) arrive(block + 1, 0);
    wgmma_fence();
    tiles.template add_product<T>(dv, p_operands, 1, block, kFirst);
    tiles.template add_product<T>(dk, ds_operands, 0, block, kFirst);
    if constexpr (!kEnds) {
      multiply_scores(block, kFirst + kQueries);
    } else if constexpr (!kLast) {
      multiply_scores(block + 1, 0);
    }
    wgmma_commit();
    if constexpr (!kLast && kEnds) {
      cp_async_wait<0>();
      // The next statistics are there.
      named_barrier_sync(tiles.of_group(), kWarpgroup);
    }
    wgmma_wait<0>();
    if (!kLast && kEnds && thread % 32 == 0) stream.release(block);
  };
  const auto parts_of = [&](int block, auto of_last) {
    turn_of(block, of_last, std::integral_constant<int, 0>());
    if constexpr (kParts > 1) turn_of(block, of_last, std::integral_constant<int, 1>());
  };
  arrive(0, turn);
  wgmma_fence();
  multiply_scores(0, 0);
  wgmma_commit();
  wgmma_wait<0>();
#pragma unroll 1
  for (int block = 0; block < blocks - 1; ++block) parts_of(block, std::false_type());
  parts_of(blocks - 1, std::true_type());

  // 3. rotate dk back, scale and write, by way of the tiles, unless somebody's NaN or infinity is
  // in others' sums; a key that doesn't count gets exact zeros
  const TilePlace back = TilePlace::get(p.batch, place);
  if (tiles.spoilt(back, all_finite(dk) && all_finite(dv), thread)) {
    return next_alone(p.batch, back);
  }
  const auto inside = [&](int key) { return back.inside(key); };
  const auto counts = [&](int key) { return back.counts(key); };
  if (is_rotary(p.batch)) rotate_whole_heads<kDim>(dk, p.batch, back, thread, key_of_row);
  tiles.template store<T>(0, dk, anew(p.batch.scale) * p.batch.keep_scale, p.dk, p, back, thread,
                          key_of_row, inside, counts);
  tiles.template store<T>(1, dv, p.batch.keep_scale, p.dv, p, back, thread, key_of_row, inside,
                          counts);
  return tiles.turn_after(p.batch, back);
}

template<class T, int kDim, bool kDropout>
__global__ void __launch_bounds__(BulkTiles<kDim>::kMostThreads)
    attention_backward_dkv_bulk_kernel(const __grid_constant__ BulkBackward<kDim> p) {
#if defined(BERTFAST_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if (threadIdx.x == 0) {
    for (const auto& heads : p.streamed) tma_prefetch(heads.map);
  }
  await_earlier_kernels();
  using Tiles = BulkTiles<kDim>;
  TilePlace at = find_tile<Tiles::kRows>(p.batch, 0);
  if (Tiles::none(p.batch, at)) return;
  const Keys keys(p.batch, at, Tiles::kKeys, int(threadIdx.x), Tiles::kThreads / 32);
  if (kDropout) at.first -= -keys.low & 31;  // a call serves keys of one 32 from the first on
  if (at.first >= at.length) return;
  const Tiles tiles(at);
  if (tiles.group >= tiles.warpgroups) return;
  at.low_keys = at.first < 0 ? keys.bits(0) << -at.first : keys.bits(at.first);  // from -31 on
  at.high_keys = keys.bits(at.first + 32);
  int turn = 0;
  while (const int alone = dkv_tile<T, kDim, kDropout>(p, tiles, keys.low, at, turn)) {
    at = find_tile(p.batch, alone);
    at.low_keys = bits_inside(0, at.from, at.length);
    at.high_keys = bits_inside(32, at.from, at.length);
    ++turn;
  }
#endif
}

}  // namespace

cudaError_t launch_dkv_bulk(const AttentionBackward& p, DType dtype, Stream stream) {
  return with_bulk_dim(dtype, p.batch.head_dim, [&](auto t, auto dim) {
    using T = decltype(t);
    constexpr int kDim = decltype(dim)::value;
    const auto kernel = p.batch.seed ? attention_backward_dkv_bulk_kernel<T, kDim, true>
                                     : attention_backward_dkv_bulk_kernel<T, kDim, false>;
    return launch_bulk<kDim>(kernel, p, {p.q, p.dout}, 31, stream);
  });
}

}  // namespace bertfast
