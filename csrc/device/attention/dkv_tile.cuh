// A tile of dkv's kernel by mma.sync: 64 keys of one head, 16 for each of four warps.
#pragma once

#include <type_traits>

#include "device/attention/key_rows.cuh"
#include "device/attention/rotary.cuh"
#include "device/attention/scores.cuh"
#include "device/attention/turns.cuh"
#include "device/tile.cuh"

namespace bertfast {

template<int kDim>
struct Dkv {
  using Rows = Tile<kDim>;
  // Queries and dout come in blocks of kQueries. Wide heads leave no registers to hold the keys and
  // values: they stay in shared memory, before the stages.
  static constexpr bool kInRegisters = kDim <= 64;
  static constexpr int kQueries = kInRegisters ? 64 : 32;
  static constexpr int kQueryBytes = kQueries * Rows::kRowBytes;
  static constexpr int kOwnBytes = kTileRows * Rows::kRowBytes;
  static constexpr int kFirstStage = kInRegisters ? 0 : 2 * kOwnBytes;
  static constexpr int kStatistics = kFirstStage + 4 * kQueryBytes;
  static constexpr int kTileBytes = kStatistics + 2 * kQueries * int(sizeof(float2));
};

// A tile of keys, or of a shared one the sequence that is to be done alone; returns which one is
// next. find: gives the tile's place. kByPosition, kRotates: as in dq's.
template<class T, int kDim, bool kDropout, bool kByPosition = false, bool kRotates = kByPosition,
         class Find>
__device__ __forceinline__ int dkv_tile(const AttentionBackward& p, Find find) {
  using Shape = Dkv<kDim>;
  using Rows = Tile<kDim>;
  constexpr int kQueries = Shape::kQueries;
  const int thread = anew(int(threadIdx.x)) & (kAttentionThreads - 1);
  const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;

  // 1. where the tile lies, which of its keys count
  TilePlace at = find();
  if (at.first >= at.length && !p.batch.key_mask) return 0;
  const Keys keys(p.batch, at, Shape::kTileBytes + TilePlace::kSharedBytes, thread);
  const bool drops = kDropout && (!kByPosition || p.batch.seed);
  if (drops) at.first -= -keys.low & 31;  // a call serves keys of one 32 from the first on
  if (at.first >= at.length) return 0;
  at.low_keys = at.first < 0 ? keys.bits(0) << -at.first : keys.bits(at.first);  // from -31 on
  at.high_keys = keys.bits(at.first + 32);
  at.put(Shape::kTileBytes, thread);
  // Queries come in blocks of 16 from the first key, as in the other kernels.
  int first_query = drops ? -(-keys.low & 15) : 0, last_query = at.length;
  if (kByPosition) {  // those that see a key of the tile
    const int end = min(at.first + kTileRows, at.length);
    first_query += max(at.first - p.batch.scores.right - first_query, 0) & ~15;
    last_query = max(min(last_query, end + p.batch.scores.left), first_query);
  }
  const bool any = (at.low_keys | at.high_keys) != 0;
  const int blocks = any ? (last_query - first_query + kQueries - 1) / kQueries : 0;

  // 2. copy the keys and values, into the second stage or where they stay, and the first queries
  const auto stage = [](int block, int part) {
    return shared_memory<uint4>(Shape::kFirstStage + ((block & 1) * 2 + part) * Shape::kQueryBytes);
  };
  const auto statistics = [](int block) {  // of two rows
    return shared_memory<float4>(Shape::kStatistics + (block & 1) * kQueries * int(sizeof(float2)));
  };
  const Shared<uint4> k_tile = Shape::kInRegisters ? stage(1, 0) : shared_memory<uint4>(0);
  const Shared<uint4> v_tile =
      Shape::kInRegisters ? stage(1, 1) : shared_memory<uint4>(Shape::kOwnBytes);
  const auto key_on = [&](int key) { return at.counts(key); };
  copies_of<Rows, kTileRows, T>(p.k, p.batch, at, at.first, thread)
      .start_permuted(k_tile, key_of_row, key_on);
  copies_of<Rows, kTileRows, T>(p.v, p.batch, at, at.first, thread)
      .start_permuted(v_tile, key_of_row, key_on);
  cp_async_commit();
  const auto q_copies = copies_of<Rows, kQueries, T>(p.q, p.batch, at, first_query, thread);
  const auto dout_copies = copies_of<Rows, kQueries, T>(p.dout, p.batch, at, first_query, thread);
  const float2* const statistics_from = p.statistics + statistics_of(p.batch, at, first_query);
  const auto load_block = [&](int block) {
    // Beyond the sequence everything is zero, lse and delta too: p is 1, and its products are zero.
    const int first = first_query - at.from + block * kQueries;
    const auto inside = [&](int, int row) {
      return static_cast<unsigned>(first + row) < static_cast<unsigned>(at.length - at.from);
    };
    q_copies.start(stage(block, 0), block, inside);
    dout_copies.start(stage(block, 1), block, inside);
    const int row = thread;
    if (row < kQueries) {
      cp_async(shared_memory<float2>(Shape::kStatistics), (block & 1) * kQueries + row,
               statistics_from + block * kQueries + row, inside(0, row));
    }
  };
  if (blocks > 0) load_block(0);
  cp_async_commit();
  const ScoreDropout dropout(p.batch, at, drops, Shape::kTileBytes, thread);
  const int my_key = key_of_row(16 * warp + g);
  constexpr int kManyBits = Shape::kTileBytes + ManyBits::kPlace;
  if (at.many > 1) {
    if (drops) __syncthreads();  // what draws need is there
    const int other_key = key_of_row(16 * warp + g + 8);
    const auto find_bits = [&](auto draws) {
      return ManyBits::find<decltype(draws)::value, true, kByPosition>(p.batch, at, dropout, my_key,
                                                                       other_key, thread);
    };
    (drops ? find_bits(std::bool_constant<kDropout>()) : find_bits(std::false_type()))
        .put(kManyBits, thread);
  }
  cp_async_wait<1>();
  __syncthreads();
  constexpr int kHeld = Shape::kInRegisters ? kDim / 16 : 1;
  unsigned k_held[kHeld][4], v_held[kHeld][4];
  if constexpr (Shape::kInRegisters) {
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      Rows::load_a(k_held[k], k_tile, 16 * warp, k, thread);
      Rows::load_a(v_held[k], v_tile, 16 * warp, k, thread);
    }
  }

  // 3. over the queries
  const float scale = p.batch.scale * kLog2E;
  const float c = kByPosition && p.batch.scores.bias ? 1.f : scale;  // of what has a bias already
  const int key_call = ScoreDropout::key_call(at.first - keys.low + my_key);
  float dk[kDim / 8][4] = {}, dv[kDim / 8][4] = {};
  for (int block = 0; block < blocks; ++block) {
    cp_async_wait<0>();
    __syncthreads();  // the block is there, and all warps are done with the other stage
    if (block + 1 < blocks) load_block(block + 1);
    cp_async_commit();
    if (32 * (warp / 2) >= at.tile) continue;
#pragma unroll 1
    for (int step = 0; step < kQueries / 16; ++step) {
      // 3a. transposed scores and dp of 16 queries
      float s[2][4] = {}, dp[2][4] = {};
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        unsigned a[4], b[4];
        const auto own_rows = [&](const unsigned (&held)[kHeld][4], Shared<uint4> tile) {
          if constexpr (Shape::kInRegisters) {
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = held[k][i];
          } else {
            Rows::load_a(a, tile, 16 * warp, k, thread);
          }
        };
        own_rows(k_held, k_tile);
        Rows::load_b(b, stage(block, 0), 16 * step, k, thread);
        mma_m16n8k16<T>(s[0], a, b[0], b[1]);
        mma_m16n8k16<T>(s[1], a, b[2], b[3]);
        own_rows(v_held, v_tile);
        Rows::load_b(b, stage(block, 1), 16 * step, k, thread);
        mma_m16n8k16<T>(dp[0], a, b[0], b[1]);
        mma_m16n8k16<T>(dp[1], a, b[2], b[3]);
      }

      // 3b. probabilities. A masked key spoils only its own rows, which are not written.
      float delta[2][2];
      const int columns = block * kQueries / 8 + 2 * step;  // so far, in eights
      const QueriesByPosition by(p.batch, at, Shape::kTileBytes, first_query + 8 * columns, thread);
      if constexpr (kByPosition) by.add_bias(s, scale);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float4 pairs = statistics(block).load((16 * step + 8 * n) / 2 + t);
        delta[n][0] = pairs.y;
        delta[n][1] = pairs.w;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[n][i] = exp2_approx(fmaf(s[n][i], c, -(i % 2 ? pairs.z : pairs.x)));
        }
      }
      if constexpr (kByPosition) {
        by.mask(s, kManyBits, columns);
      } else if (at.many > 1) {
        const unsigned same = ManyBits::get(kManyBits, thread).same >> (2 * columns);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            s[n][i] = same >> (16 * (i / 2) + 2 * n + i % 2) & 1 ? s[n][i] : 0.f;
          }
        }
      }

      // 3c. dropout of p and dp
      float dropped[2][4];
      unsigned words[2][2];
      if (drops) {
        if (at.many > 1) {
          // Draws that give the bits: the largest, or zero.
          const unsigned keep = ManyBits::get(kManyBits, thread).keep >> (2 * columns);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            words[i % 2][i / 2] = (keep >> i & 0x10001u) * 0xffffu;
          }
        } else {
          share_draws(words, dropout, first_query - keys.low + block * kQueries + 16 * step,
                      key_call, thread);
        }
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          dropped[n][i] = s[n][i];
          if (drops) {
            const unsigned word = words[i % 2][n];
            const bool kept = i / 2 ? dropout.keeps_high(word) : dropout.keeps_low(word);
            dropped[n][i] = kept ? dropped[n][i] : 0.f;
            dp[n][i] = kept ? dp[n][i] : 0.f;
          }
          s[n][i] *= dp[n][i] - delta[n][i % 2];
        }
      }

      // 3d. dv += p^T dout, dk += ds^T q
      unsigned p_operand[4], ds_operand[4];
      as_operand<T>(p_operand, dropped[0], dropped[1]);
      as_operand<T>(ds_operand, s[0], s[1]);
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        unsigned b[4];
        Rows::load_b_trans(b, stage(block, 1), 16 * step, n, thread);
        mma_m16n8k16<T>(dv[2 * n], p_operand, b[0], b[1]);
        mma_m16n8k16<T>(dv[2 * n + 1], p_operand, b[2], b[3]);
        Rows::load_b_trans(b, stage(block, 0), 16 * step, n, thread);
        mma_m16n8k16<T>(dk[2 * n], ds_operand, b[0], b[1]);
        mma_m16n8k16<T>(dk[2 * n + 1], ds_operand, b[2], b[3]);
      }
    }
  }
  cp_async_wait<0>();

  // 4. rotate dk back, scale and write, unless somebody's NaN or infinity is in others' sums; a key
  // that doesn't count gets exact zeros
  const TilePlace to = TilePlace::get(p.batch, Shape::kTileBytes);
  if (spoilt(to, all_finite(dk) && all_finite(dv))) return next_alone(p.batch, to);
  const auto inside = [&](int key) { return to.inside(key); };
  const auto counts = [&](int key) { return to.counts(key); };
  const float dk_factor = anew(p.batch.scale) * p.batch.keep_scale, dv_factor = p.batch.keep_scale;
  if constexpr (kByPosition) {
    const int byte = Shape::kFirstStage + (blocks & 1) * 2 * Shape::kQueryBytes;
    if (is_rotary(p.batch)) rotate_back<kDim>(dk, p.batch, to, thread, key_of_row, byte);
  } else if constexpr (kRotates) {
    if (is_rotary(p.batch)) rotate_whole_heads<kDim>(dk, p.batch, to, thread, key_of_row);
  }
  Rows::store(stage(blocks, 0), dk, dk_factor, dk_factor, row_of<T>(p.dk, to, to.first), p.dk.token,
              p.batch.head_dim, thread, key_of_row, inside, counts);
  __syncwarp();
  Rows::store(stage(blocks, 0), dv, dv_factor, dv_factor, row_of<T>(p.dv, to, to.first), p.dv.token,
              p.batch.head_dim, thread, key_of_row, inside, counts);
  return turn_after(p.batch, to);
}

}  // namespace bertfast
