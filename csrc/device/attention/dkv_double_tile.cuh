// A tile of 128 keys of dkv's kernel by mma.sync: each of four warps has two parts of 16. The
// phases are those of dkv_tile.cuh, and so is the order of its sums. It stands apart, as tiles of
// 64 made of the same code had an instruction more in a step.
#pragma once

#include "device/attention/key_rows.cuh"
#include "device/attention/own_rows.cuh"
#include "device/attention/rotary.cuh"
#include "device/attention/scores.cuh"
#include "device/attention/turns.cuh"
#include "device/tile.cuh"

namespace bertfast {

// Of two parts registers hold either keys or values. Which of them makes no difference but to the
// compiler, which would spill with the other.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kDropoutHoldsValues = true;
#else
constexpr bool kDropoutHoldsValues = false;
#endif

// Columns of heads that are rotated back. Of those of 64 the code for it, behind the loop, has the
// loop take 3 % more instructions, for want of registers.
constexpr int kRotatedColumns = 32;

template<int kDim, bool kDropout = false>
struct DkvDouble {
  using Rows = Tile<kDim>;
  // Those that aren't held stay in shared memory, before the stages, and are read again for each
  // step.
  static constexpr bool kHoldsValues = kDim == 64 && kDropout && kDropoutHoldsValues;
  static constexpr bool kHoldsKeys = !kHoldsValues;
  static constexpr int kRows = 2 * kTileRows;
  static constexpr int kOwnBytes = kRows * Rows::kRowBytes;
  // Queries and dout come in blocks of kQueries.
  static constexpr int kQueries = kDim == 32 ? 64 : 32;
  static constexpr int kQueryBytes = kQueries * Rows::kRowBytes;
  static constexpr int kFirstStage = kOwnBytes;
  // What is held comes by way of the second stage and what is behind it.
  static constexpr int kSecondStage = kFirstStage + 2 * kQueryBytes;
  static constexpr int kKeyPlace = kHoldsKeys ? kSecondStage : 0;
  static constexpr int kValuePlace = kHoldsValues ? kSecondStage : 0;
  static constexpr int kStatistics =
      kSecondStage + (kOwnBytes > 2 * kQueryBytes ? kOwnBytes : 2 * kQueryBytes);
  static constexpr int kTileBytes = kStatistics + 2 * kQueries * int(sizeof(float2));
};

template<class T, int kDim, bool kDropout>
__device__ __forceinline__ void dkv_double_tile(const AttentionBackward& p, TilePlace at) {
  using Shape = DkvDouble<kDim, kDropout>;
  using Rows = Tile<kDim>;
  constexpr int kParts = 2, kQueries = Shape::kQueries;
  const int thread = anew(int(threadIdx.x)) & (kAttentionThreads - 1);
  const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;

  // 1. where the tile lies, which of its keys count
  at.many = 1, at.alone = at.from = 0;  // the compiler doesn't know
  if (at.first >= at.length && !p.batch.key_mask) return;
  const Keys keys(p.batch, at, Shape::kTileBytes + TilePlace::kSharedBytes, thread);
  if (kDropout) at.first -= -keys.low & 31;  // a call serves keys of one 32 from the first on
  if (at.first >= at.length) return;
  unsigned on[2 * kParts], any = 0;
#pragma unroll
  for (int i = 0; i < 2 * kParts; ++i) {
    const int key = at.first + 32 * i;
    on[i] = i == 0 && key < 0 ? keys.bits(0) << -key : keys.bits(key);  // from -31 on
    any |= on[i];
  }
  at.put(Shape::kTileBytes, thread);
  // Queries come in blocks of 16 from the first key, as in the other kernels.
  const int first_query = kDropout ? -(-keys.low & 15) : 0;
  const int blocks = any ? (at.length - first_query + kQueries - 1) / kQueries : 0;

  // 2. copy the keys and values, and the first queries
  const auto stage = [](int block, int part) {
    return shared_memory<uint4>(Shape::kFirstStage + ((block & 1) * 2 + part) * Shape::kQueryBytes);
  };
  const auto statistics = [](int block) {  // of two rows
    return shared_memory<float4>(Shape::kStatistics + (block & 1) * kQueries * int(sizeof(float2)));
  };
  const Shared<uint4> k_tile = shared_memory<uint4>(Shape::kKeyPlace);
  const Shared<uint4> v_tile = shared_memory<uint4>(Shape::kValuePlace);
  const auto k_copies = copies_of<Rows, Shape::kRows, T>(p.k, p.batch, at, at.first, thread);
  const auto v_copies = copies_of<Rows, Shape::kRows, T>(p.v, p.batch, at, at.first, thread);
  const auto key_on = [&](int i, int) {
    return (on[i / 32] >> k_copies.first() >> (i % 32) & 1) != 0;
  };
  k_copies.start(k_tile, 0, key_on);
  v_copies.start(v_tile, 0, key_on);
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
  const ScoreDropout dropout(p.batch, at, kDropout, Shape::kTileBytes, thread);
  const int my_key = 32 * warp + g;
  cp_async_wait<1>();
  __syncthreads();
  const OwnRows<kDim, kParts, Shape::kHoldsKeys> k_rows(k_tile, false, thread);
  const OwnRows<kDim, kParts, Shape::kHoldsValues> v_rows(v_tile, false, thread);

  // 3. over the queries
  const float c = p.batch.scale * kLog2E;
  const int key_call = ScoreDropout::key_call(at.first - keys.low + my_key);
  float dk[kParts][kDim / 8][4] = {}, dv[kParts][kDim / 8][4] = {};
  for (int block = 0; block < blocks; ++block) {
    cp_async_wait<0>();
    __syncthreads();  // the block is there, and all warps are done with the other stage
    if (block + 1 < blocks) load_block(block + 1);
    cp_async_commit();
#pragma unroll 1
    for (int step = 0; step < kQueries / 16; ++step) {
      // 3a. transposed scores and dp of 16 queries
      float s[kParts][2][4] = {}, dp[kParts][2][4] = {};
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        const auto multiply = [&](float (&sums)[kParts][2][4], const auto& own, int which) {
          unsigned a[kParts][4], b[4];
#pragma unroll
          for (int part = 0; part < kParts; ++part) own.load(a[part], part, k, thread);
          Rows::load_b(b, stage(block, which), 16 * step, k, thread);
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            mma_m16n8k16<T>(sums[part][0], a[part], b[0], b[1]);
            mma_m16n8k16<T>(sums[part][1], a[part], b[2], b[3]);
          }
        };
        multiply(s, k_rows, 0);
        multiply(dp, v_rows, 1);
      }

      // 3b. probabilities. A masked key spoils only its own rows, which are not written.
      float delta[2][2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float4 pairs = statistics(block).load((16 * step + 8 * n) / 2 + t);
        delta[n][0] = pairs.y;
        delta[n][1] = pairs.w;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            s[part][n][i] = exp2_approx(fmaf(s[part][n][i], c, -(i % 2 ? pairs.z : pairs.x)));
          }
        }
      }

      // 3c. dropout of p and dp
      unsigned words[kParts][2][2];
      if constexpr (kDropout) {
        const int query = first_query - keys.low + block * kQueries + 16 * step;
        draw_of_own(words, dropout, query, key_call, thread);
      }
      unsigned p_operand[kParts][4], ds_operand[kParts][4];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        float dropped[2][4];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float &of_p = s[part][n][i], &of_dp = dp[part][n][i];
            dropped[n][i] = of_p;
            if constexpr (kDropout) {
              const unsigned word = words[part][i % 2][n];
              const bool kept = i / 2 ? dropout.keeps_high(word) : dropout.keeps_low(word);
              dropped[n][i] = kept ? dropped[n][i] : 0.f;
              of_dp = kept ? of_dp : 0.f;
            }
            of_p *= of_dp - delta[n][i % 2];
          }
        }
        as_operand<T>(p_operand[part], dropped[0], dropped[1]);
        as_operand<T>(ds_operand[part], s[part][0], s[part][1]);
      }

      // 3d. dv += p^T dout, dk += ds^T q
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        const auto add = [&](float (&sums)[kParts][kDim / 8][4], const unsigned (&a)[kParts][4],
                             int which) {
          unsigned b[4];
          Rows::load_b_trans(b, stage(block, which), 16 * step, n, thread);
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            mma_m16n8k16<T>(sums[part][2 * n], a[part], b[0], b[1]);
            mma_m16n8k16<T>(sums[part][2 * n + 1], a[part], b[2], b[3]);
          }
        };
        add(dv, p_operand, 1);
        add(dk, ds_operand, 0);
      }
    }
  }
  cp_async_wait<0>();

  // 4. rotate dk back, scale and write, by way of the rows that only the warp itself reads; a key
  // that doesn't count gets exact zeros
  TilePlace to = TilePlace::get(p.batch, Shape::kTileBytes);
  to.tile = Shape::kRows;
  const auto inside = [&](int key) { return to.inside(key); };
  const auto counts = [&](int key) {
    return Keys::counts(p.batch, Shape::kTileBytes + TilePlace::kSharedBytes, to.first + key);
  };
  const float dk_factor = anew(p.batch.scale) * p.batch.keep_scale, dv_factor = p.batch.keep_scale;
  const Shared<uint4> place = shared_memory<uint4>(0);
  const auto same = [](int row) { return row; };
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    // As if each part were a warp's.
    const int as = 32 * (kParts * warp + part) + thread % 32;
    if constexpr (kDim == kRotatedColumns) {
      if (is_rotary(p.batch)) rotate_whole_heads<kDim>(dk[part], p.batch, to, as, same);
    }
    Rows::store(place, dk[part], dk_factor, dk_factor, row_of<T>(p.dk, to, to.first), p.dk.token,
                p.batch.head_dim, as, same, inside, counts);
    __syncwarp();
    Rows::store(place, dv[part], dv_factor, dv_factor, row_of<T>(p.dv, to, to.first), p.dv.token,
                p.batch.head_dim, as, same, inside, counts);
  }
}

}  // namespace bertfast
