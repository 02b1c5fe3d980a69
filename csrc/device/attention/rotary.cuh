// Rotary positions in attention's backward. Its kernels read rotated queries and keys, which
// rotate.cu makes, so their sums are the gradients of those. Here they become the gradients of the
// queries and keys themselves: with the halves d1 and d2 of a row, and the tables' row of its
// position,
//   d1 cos + d2 sin,  d2 cos - d1 sin
// in float32, before they are rounded.
#pragma once

#include "device/attention/place.cuh"
#include "device/vec.cuh"

namespace bertfast {

// The position of a tile's row in its own sequence.
__device__ __forceinline__ int position_of(const AttentionBatch& p, const TilePlace& at, int row) {
  const int position = at.first + row;
  int origin = 0;
#pragma unroll 1
  for (int n = 1; n < at.many; ++n) {
    const int bound = p.cu_seqlens[at.batch + n] - at.start;
    if (bound <= position) origin = bound;
  }
  return position - origin;
}

// What a thread needs for its two rows of a warp's 16, rows g and g + 8.
struct RotaryRows {
  const float* cos[2];
  const float* sin[2];
  int half;  // of a head's columns

  // target(r): the tile's row at place r. Of a row that isn't written, any position will do.
  template<class Target>
  __device__ __forceinline__ RotaryRows(const AttentionBatch& p, const TilePlace& at, int thread,
                                        Target target)
      : half(anew(p.scores.half)) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = target(thread / 32 * 16 + thread % 32 / 4 + 8 * r);
      const int position = at.inside(row) ? position_of(p, at, row) : 0;
      cos[r] = p.scores.cos + int64_t(position) * half;
      sin[r] = p.scores.sin + int64_t(position) * half;
    }
  }
};

// Of heads of kDim columns, whose halves' columns are in the same thread.
template<int kDim>
__device__ __forceinline__ void rotate_in_registers(float (&sums)[kDim / 8][4],
                                                    const RotaryRows& rows, int thread) {
#pragma unroll
  for (int n = 0; n < kDim / 16; ++n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int column = 8 * n + 2 * (thread % 4);
      const auto cos = Vec<float, 2>::load(rows.cos[r] + column);
      const auto sin = Vec<float, 2>::load(rows.sin[r] + column);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float &lower = sums[n][2 * r + e], &upper = sums[n + kDim / 16][2 * r + e];
        const float first = lower, second = upper;
        lower = first * cos[e] + second * sin[e];
        upper = second * cos[e] - first * sin[e];
      }
    }
  }
}

// Of any heads, by way of the tile of kDim values of 16 bits that begins at byte `shared`: by the
// warp's own 16 rows, which hold 8 rows of sums.
template<int kDim>
__device__ __forceinline__ void rotate_through_shared(float (&sums)[kDim / 8][4],
                                                      const RotaryRows& rows, int thread,
                                                      int shared) {
  const int g = thread % 32 / 4, t = thread % 4;
  shared += thread / 32 * 16 * 2 * kDim;
  // So the pairs of four rows, and a column of each lane's in eight, fall into all banks.
  const auto place = [&](int column) { return g * kDim + (column ^ ((g & 3) << 3 | (g & 4))); };
  const Shared<float> values = shared_memory<float>(shared);
  const Shared<float2> pairs = shared_memory<float2>(shared);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      pairs.store(place(8 * n + 2 * t) / 2, make_float2(sums[n][2 * r], sums[n][2 * r + 1]));
    }
    __syncwarp();
#pragma unroll 1
    for (int column = t; column < rows.half; column += 4) {
      const float cos = __ldg(rows.cos[r] + column), sin = __ldg(rows.sin[r] + column);
      const int lower = place(column), upper = place(column + rows.half);
      const float first = values.load(lower), second = values.load(upper);
      values.store(lower, first * cos + second * sin);
      values.store(upper, second * cos - first * sin);
    }
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const float2 pair = pairs.load(place(8 * n + 2 * t) / 2);
      sums[n][2 * r] = pair.x;
      sums[n][2 * r + 1] = pair.y;
    }
  }
  __syncwarp();
}

// Whether there are rotary positions. Like thread below it is taken anew, so that what follows from
// it keeps no register before.
__device__ __forceinline__ bool is_rotary(const AttentionBatch& p) {
  return anew(p.scores.half) != 0;
}

// Whether a call has no rotary positions, or heads that fill the columns of a kernel, 32 and more,
// so that rotate_whole_heads can rotate them.
inline bool has_whole_heads(const AttentionBatch& p) {
  const int half = p.scores.half;
  return half == 0 || (2 * half == p.head_dim && half % 16 == 0);
}

// Heads of kDim columns.
template<int kDim, class Target>
__device__ __forceinline__ void rotate_whole_heads(float (&sums)[kDim / 8][4],
                                                   const AttentionBatch& p, const TilePlace& at,
                                                   int thread, Target target) {
  thread = anew(thread);
  rotate_in_registers<kDim>(sums, RotaryRows(p, at, thread, target), thread);
}

// Heads of kDim columns in registers, others by way of the tile that begins at byte `shared`.
template<int kDim, class Target>
__device__ __forceinline__ void rotate_back(float (&sums)[kDim / 8][4], const AttentionBatch& p,
                                            const TilePlace& at, int thread, Target target,
                                            int shared) {
  thread = anew(thread);
  const RotaryRows rows(p, at, thread, target);
  if (2 * rows.half == kDim) {
    rotate_in_registers<kDim>(sums, rows, thread);
  } else {
    rotate_through_shared<kDim>(sums, rows, thread, shared);
  }
}

}  // namespace bertfast
