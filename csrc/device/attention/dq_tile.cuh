// A tile of dq's kernels by mma.sync: kParts times 64 queries of one head, of which each of four
// warps has kParts times 16, one 16 after the other.
#pragma once

#include <type_traits>

#include "device/attention/rotary.cuh"
#include "device/attention/row_statistics.cuh"
#include "device/attention/scores.cuh"
#include "device/attention/turns.cuh"

namespace bertfast {

template<int kDim, int kParts>
struct Dq {
  using Rows = Tile<kDim>;
  // Keys and values in blocks, worked on 32 at a time.
  static constexpr int kKeys = kParts == 1 ? 64 : 32;
  static constexpr int kKeyBytes = kKeys * Rows::kRowBytes;
  static constexpr int kStageBytes = 2 * kKeyBytes;
  // q and dout come by way of the second stage and what is behind it.
  static constexpr int kRows = kParts * kTileRows;
  static constexpr int kQueryBytes = kRows * Rows::kRowBytes;
  static constexpr int kTileBytes = kStageBytes + 2 * kQueryBytes;
};

// A tile of queries, or of a shared one the sequence that is to be done alone; returns which one is
// next. With two parts: a tile of one sequence. kByPosition: as in the forward. kRotates: of a call
// that may have rotary positions, and then, but by position, whole heads.
template<class T, int kDim, bool kDropout, int kParts, bool kByPosition = false,
         bool kRotates = kByPosition>
__device__ __forceinline__ int dq_tile(const AttentionBackward& p, TilePlace at) {
  using Shape = Dq<kDim, kParts>;
  using Rows = Tile<kDim>;
  constexpr int kKeys = Shape::kKeys;
  const int thread = anew(int(threadIdx.x)) & (kAttentionThreads - 1);
  const int warp = thread / 32, g = thread % 32 / 4;

  // 1. where the tile lies, which keys count
  if (kParts > 1) at.many = 1, at.alone = at.from = 0;  // the compiler doesn't know
  if (at.first >= at.length && !p.batch.key_mask) return 0;
  Keys keys(p.batch, at, Shape::kTileBytes + TilePlace::kSharedBytes, thread);
  const bool drops = kDropout && (!kByPosition || p.batch.seed);
  if (drops) at.first -= -keys.low & 15;  // as in the forward
  if (at.first >= at.length) return 0;
  const int last = min(at.first + Shape::kRows, at.length);
  const int before = kByPosition ? keys.keep_seen(p.batch.scores, at.first, last) : 0;
  at.put(Shape::kTileBytes, thread);
  const int blocks = (keys.high - keys.low + kKeys - 1) / kKeys;

  // 2. copy q and dout, into the second stage, and the first block of keys and values
  const auto stage = [](int block, int part) {
    return shared_memory<uint4>(((block & 1) * 2 + part) * Shape::kKeyBytes);
  };
  const auto tile_row = [&](int, int row) { return at.inside(row); };
  const Shared<uint4> q_tile = shared_memory<uint4>(Shape::kStageBytes);
  const Shared<uint4> dout_tile = shared_memory<uint4>(Shape::kStageBytes + Shape::kQueryBytes);
  copies_of<Rows, Shape::kRows, T>(p.q, p.batch, at, at.first, thread).start(q_tile, 0, tile_row);
  copies_of<Rows, Shape::kRows, T>(p.dout, p.batch, at, at.first, thread)
      .start(dout_tile, 0, tile_row);
  cp_async_commit();
  const auto k_copies = copies_of<Rows, kKeys, T>(p.k, p.batch, at, keys.low, thread);
  const auto v_copies = copies_of<Rows, kKeys, T>(p.v, p.batch, at, keys.low, thread);
  KeyBits<kKeys> next(keys, 0);
  if (blocks > 0) {
    next.start(k_copies, stage(0, 0), 0);
    next.start(v_copies, stage(0, 1), 0);
  }
  cp_async_commit();
  const ScoreDropout dropout(p.batch, at, drops, Shape::kTileBytes, thread);
  constexpr int kManyBits = Shape::kTileBytes + ManyBits::kPlace;
  if (kParts == 1 && at.many > 1) {
    if (drops) __syncthreads();  // what draws need is there
    const int row = 16 * warp + g;
    const auto find_bits = [&](auto draws) {
      return ManyBits::find<decltype(draws)::value, false, kByPosition>(p.batch, at, dropout, row,
                                                                        row + 8, thread);
    };
    (drops ? find_bits(std::bool_constant<kDropout>()) : find_bits(std::false_type()))
        .put(kManyBits, thread);
  }

  // 3. delta, a row by four lanes, while they wait; lse
  RowStatistics<T, kDim> rows[kParts];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    rows[part] = {p, at, 16 * (kParts * warp + part) + g, thread};
  }
  cp_async_wait<1>();
  __syncthreads();
  unsigned q[kParts][kDim / 16][4], dout[kParts][kDim / 16][4];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int first = 16 * (kParts * warp + part);
    rows[part].sum(p, at, first + g, thread,
                   [&](int row, int chunk) { return dout_tile.load(Rows::place(row, chunk)); });
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      Rows::load_a(q[part][k], q_tile, first, k, thread);
      Rows::load_a(dout[part][k], dout_tile, first, k, thread);
    }
  }

  // 4. over the keys
  const float scale = p.batch.scale * kLog2E;
  const float c = kByPosition && p.batch.scores.bias ? 1.f : scale;  // of what has a bias already
  const int query_call =
      ScoreDropout::query_call(at.first - keys.low + before + 16 * kParts * warp + g);
  float dq[kParts][kDim / 8][4] = {};
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
    if (kParts == 1 && 16 * warp >= at.tile) continue;
#pragma unroll 1
    for (int half = 0; half < kKeys / 32; ++half) {
      const int group = block * kKeys / 32 + half;

      // 4a. scores and dp
      float s[kParts][4][4] = {}, dp[kParts][4][4] = {};
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          unsigned b[4];
          Rows::load_b(b, stage(block, 0), 32 * half + 16 * n, k, thread);
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            mma_m16n8k16<T>(s[part][2 * n], q[part][k], b[0], b[1]);
            mma_m16n8k16<T>(s[part][2 * n + 1], q[part][k], b[2], b[3]);
          }
          Rows::load_b(b, stage(block, 1), 32 * half + 16 * n, k, thread);
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            mma_m16n8k16<T>(dp[part][2 * n], dout[part][k], b[0], b[1]);
            mma_m16n8k16<T>(dp[part][2 * n + 1], dout[part][k], b[2], b[3]);
          }
        }
      }
      // The widest heads leave no registers to keep the bits in.
      const unsigned bits = kDim == 128          ? keys.bits(keys.low + 32 * group)
                            : kKeys > 32 && half ? on.words[kKeys / 32 - 1]
                                                 : on.words[0];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        // 4b. probabilities; zero where nothing counts, whatever lse is
        const RowStatistics<T, kDim>& of = rows[part];
        const int query = at.first + 16 * (kParts * warp + part), key = keys.low + 32 * group;
        const KeysByPosition by(p.batch, at, Shape::kTileBytes, query, key, thread);
        if constexpr (kByPosition) by.add_bias(s[part], scale);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            s[part][n][i] = exp2_approx(fmaf(s[part][n][i], c, -of.lse[i / 2]));
          }
        }
        if constexpr (kByPosition) {
          by.mask(s[part], 0.f, bits, kManyBits, group);
        } else {
          mask_keys(s[part], 0.f, bits, at, kManyBits, group, thread);
        }

        // 4c. dropout
        if (drops) {
          drop_keys(dp[part], dropout, query_call + 8 * part, at, kManyBits, group, thread,
                    ScoreDropout::key_call(before));
        }

        // 4d. ds
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) s[part][n][i] *= dp[part][n][i] - of.delta[i / 2];
        }
      }

      // 4e. dq += ds k
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        unsigned a[kParts][4];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          as_operand<T>(a[part], s[part][2 * k], s[part][2 * k + 1]);
        }
#pragma unroll
        for (int n = 0; n < kDim / 16; ++n) {
          unsigned b[4];
          Rows::load_b_trans(b, stage(block, 0), 32 * half + 16 * k, n, thread);
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            mma_m16n8k16<T>(dq[part][2 * n], a[part], b[0], b[1]);
            mma_m16n8k16<T>(dq[part][2 * n + 1], a[part], b[2], b[3]);
          }
        }
      }
    }
  }
  cp_async_wait<0>();

  // 5. rotate back, scale and write, by way of the stage that nobody reads any more, unless
  // somebody's NaN or infinity is in others' sums
  TilePlace to = TilePlace::get(p.batch, Shape::kTileBytes);
  to.tile *= kParts;
  if (kParts == 1 && spoilt(to, all_finite(dq[0]))) return next_alone(p.batch, to);
  if (kParts > 1) __syncthreads();  // two parts need more than a stage
  const Shared<uint4> place = kParts > 1 ? q_tile : stage(blocks, 0);
  const float factor = anew(p.batch.scale) * p.batch.keep_scale;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    // As if each part were a warp's.
    const int as = 32 * (kParts * warp + part) + thread % 32;
    const auto same = [](int row) { return row; };
    if constexpr (kByPosition) {
      const int byte = (blocks & 1) * Shape::kStageBytes;
      if (is_rotary(p.batch)) rotate_back<kDim>(dq[part], p.batch, to, as, same, byte);
    } else if constexpr (kRotates) {
      if (is_rotary(p.batch)) rotate_whole_heads<kDim>(dq[part], p.batch, to, as, same);
    }
    Rows::store(
        place, dq[part], factor, factor, row_of<T>(p.dq, to, to.first), p.dq.token,
        p.batch.head_dim, as, same, [&](int row) { return to.inside(row); },
        [](int) { return true; });
  }
  return turn_after(p.batch, to);
}

}  // namespace bertfast
