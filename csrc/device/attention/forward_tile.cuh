// A tile of attention's forward: kParts times 64 queries of one head, of which each of four warps
// has kParts times 16, one 16 after the other. Keys and values are read from shared memory once for
// all of a warp's rows.
#pragma once

#include <cmath>
#include <type_traits>

#include "device/attention/forward_products.cuh"
#include "device/attention/scores.cuh"
#include "device/attention/softmax.cuh"
#include "device/attention/turns.cuh"
#include "device/reduce.cuh"
#include "device/tile.cuh"

namespace bertfast {

template<int kDim, int kParts>
struct Forward {
  // Wider heads take fewer keys at a time, so that two blocks or more fit a multiprocessor.
  static constexpr int kKeys = kDim <= 64 ? 64 : 32;
  static constexpr int kKeyBytes = kKeys * Tile<kDim>::kRowBytes;
  static constexpr int kStageBytes = 2 * kKeyBytes;  // keys, then values
  static constexpr int kRows = kParts * kTileRows;
  static constexpr int kQueryBytes = kRows * Tile<kDim>::kRowBytes;
  // Registers hold the queries as operands, but for those of two parts of the widest heads. They
  // come by way of the second stage and what is behind it; otherwise they stay behind the stages.
  static constexpr bool kHeld = kParts == 1 || kDim <= 96;
  static constexpr bool kInStage = kHeld && kQueryBytes <= kStageBytes;
  static constexpr int kQueryPlace = kHeld ? kStageBytes : 2 * kStageBytes;
  static constexpr int kTileBytes = kInStage ? 2 * kStageBytes : kQueryPlace + kQueryBytes;
};

// A tile, or of a shared one the sequence that is to be done alone; returns which one is next. With
// two parts: a tile of one sequence. kByPosition: of a call with a window or a bias, and kDropout
// then says that there may be dropout.
template<class T, int kDim, bool kDropout, int kParts, bool kByPosition = false>
__device__ __forceinline__ int forward_tile(const AttentionForward& p, TilePlace at) {
  using Shape = Forward<kDim, kParts>;
  using Rows = Tile<kDim>;
  constexpr int kKeys = Shape::kKeys;
  using Products = ForwardProducts<T, kDim, kKeys, kParts>;
  const int thread = anew(int(threadIdx.x)) & (kAttentionThreads - 1);
  const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;

  // 1. where the tile lies, which keys count
  // The compiler doesn't know, and where there are three blocks it had better not: it would keep
  // what draws need in registers.
  if (kParts > 1 && !(kDim == 32 && kDropout)) at.many = 1, at.alone = at.from = 0;
  if (at.first >= at.length && !p.batch.key_mask) return 0;
  Keys keys(p.batch, at, Shape::kTileBytes + TilePlace::kSharedBytes, thread);
  // Dropout counts from the first key that counts: fragments must start at multiples of 16 from it.
  const bool drops = kDropout && (!kByPosition || p.batch.seed);
  if (drops) at.first -= -keys.low & 15;
  if (at.first >= at.length) return 0;
  const int last = min(at.first + Shape::kRows, at.length);
  const int before = kByPosition ? keys.keep_seen(p.batch.scores, at.first, last) : 0;
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
  const Shared<uint4> queries = shared_memory<uint4>(Shape::kQueryPlace);
  copies_of<Rows, Shape::kRows, T>(p.q, p.batch, at, at.first, thread).start(queries, 0, tile_row);
  cp_async_commit();
  const auto k_copies = copies_of<Rows, kKeys, T>(p.k, p.batch, at, keys.low, thread);
  const auto v_copies = copies_of<Rows, kKeys, T>(p.v, p.batch, at, keys.low, thread);
  KeyBits<kKeys> next(keys, 0);
  if (blocks > 0) {
    next.start(k_copies, stage(0), 0);
    next.start(v_copies, value_stage(0), 0);
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
  cp_async_wait<1>();
  __syncthreads();
  const OwnRows<kDim, kParts, Shape::kHeld> q(queries, p.batch.scale < 0.f, thread);

  // 3. over the keys
  const float scale = fmaxf(fabsf(p.batch.scale) * kLog2E, 0x1p-126f);
  const float c = kByPosition && p.batch.scores.bias ? 1.f : scale;  // of what has a bias already
  const int query_call =
      ScoreDropout::query_call(at.first - keys.low + before + 16 * kParts * warp + g);
  OnlineSoftmax softmax[kParts];
  float sums[kParts][kDim / 8][4] = {};
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
    if (kParts == 1 && 16 * warp >= at.tile && !Products::by_wgmma()) continue;

    // 3a. scores
    float s[kParts][kKeys / 8][4];
    Products::scores(s, q, stage(block), thread);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int half = 0; half < kKeys / 32; ++half) {
        const int group = block * kKeys / 32 + half;
        if constexpr (kByPosition) {
          const int query = at.first + 16 * (kParts * warp + part), key = keys.low + 32 * group;
          const KeysByPosition by(p.batch, at, Shape::kTileBytes, query, key, thread);
          by.add_bias(s[part] + 4 * half, scale);
          by.mask(s[part] + 4 * half, -INFINITY, on.words[half], kManyBits, group);
        } else {
          mask_keys(s[part] + 4 * half, -INFINITY, on.words[half], at, kManyBits, group, thread);
        }
      }
    }

    // 3b. probabilities
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      softmax[part].next(s[part], c);
    }
    if (block > 0) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) softmax[part].scale(sums[part]);
    }

    // 3c. dropout
    if (drops) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int half = 0; half < kKeys / 32; ++half) {
          const int group = block * kKeys / 32 + half;
          const int call = query_call + 8 * part;
          drop_keys(s[part] + 4 * half, dropout, call, at, kManyBits, group, thread,
                    ScoreDropout::key_call(before));
        }
      }
    }

    // 3d. times the values
    Products::add_values(sums, s, value_stage(block), thread);
  }
  cp_async_wait<0>();

  // 4. normalise and write, unless somebody's NaN or infinity is in others' sums
  TilePlace to = TilePlace::get(p.batch, Shape::kTileBytes);
  to.tile *= kParts;
  if (kParts == 1 && spoilt(to, all_finite(sums[0]))) return next_alone(p.batch, to);
  // Nobody reads the stage that comes next any more.
  if (Shape::kHeld && !Shape::kInStage) __syncthreads();
  const Shared<uint4> place = Shape::kInStage ? stage(blocks) : queries;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const int first = 16 * (kParts * warp + part);
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = lane_sum<4>(softmax[part].l[r]);
      const bool empty = sum == 0.f;
      factor[r] = empty ? 0.f : p.batch.keep_scale / sum;
      const int row = first + g + 8 * r;
      if (p.lse && t == 0 && to.inside(row)) {
        p.lse[statistics_of(p.batch, to, to.first + row)] =
            empty ? 0.f : softmax[part].m[r] + log2_approx(sum);
      }
    }
    // As if each part were a warp's.
    const int as = 2 * first + thread % 32;
    Rows::store(
        place, sums[part], factor[0], factor[1], row_of<T>(p.out, to, to.first), p.out.token,
        p.batch.head_dim, as, [](int row) { return row; }, [&](int row) { return to.inside(row); },
        [](int) { return true; });
  }
  return turn_after(p.batch, to);
}

}  // namespace bertfast
