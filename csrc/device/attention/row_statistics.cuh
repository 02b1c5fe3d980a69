// What dq's kernels know of each row: lse, and delta, the sum of dout * out over the head.
#pragma once

#include "device/attention/place.cuh"
#include "device/reduce.cuh"
#include "device/tile.cuh"
#include "device/vec.cuh"

namespace bertfast {

// The sum of products of eight values.
template<class T>
__device__ __forceinline__ float dot8(uint4 a, uint4 b) {
  const Vec<T, 8> x{a}, y{b};
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum = fmaf(x[i], y[i], sum);
  return sum;
}

// Of a thread's two rows of a tile, whose out it has part of: four lanes share a row.
template<class T, int kDim>
struct RowStatistics {
  using Rows = Tile<kDim>;
  uint4 out[2][kDim / 32] = {};
  float lse[2], delta[2], inverse_keep;

  RowStatistics() = default;
  // Reads out, before dout is there.
  __device__ __forceinline__ RowStatistics(const AttentionBackward& p, const TilePlace& at,
                                           int first_row, int thread) {
    const float keep_scale = anew(p.batch.keep_scale);
    inverse_keep = keep_scale > 0.f ? 1.f / keep_scale : 0.f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + 8 * r;
      if (!at.inside(row)) continue;
      const uint4* chunks = vector_at<const uint4>(row_of<const T>(p.out, at, at.first + row));
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i) {
        if (8 * Rows::quad_chunk(row, i, thread) < p.batch.head_dim) {
          out[r][i] = __ldg(chunks + Rows::quad_chunk(row, i, thread));
        }
      }
    }
  }

  // Sums delta, divided by keep_scale, and leaves both for dkv's kernel. dout(row, chunk): 8
  // values.
  template<class Dout>
  __device__ __forceinline__ void sum(const AttentionBackward& p, const TilePlace& at,
                                      int first_row, int thread, Dout dout) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + 8 * r;
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i) {
        sum += dot8<T>(out[r][i], dout(row, Rows::quad_chunk(row, i, thread)));
      }
      delta[r] = lane_sum<4>(sum) * inverse_keep;
      lse[r] = 0.f;
      if (at.inside(row)) {
        const int64_t index = statistics_of(p.batch, at, at.first + row);
        lse[r] = p.lse[index];
        if (thread % 4 == 0) p.statistics[index] = make_float2(lse[r], delta[r]);
      }
    }
  }
};

}  // namespace bertfast
