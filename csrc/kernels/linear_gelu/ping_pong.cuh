// What the forward and the backward by device/ping_pong.cuh share.
#pragma once

#include "device/ping_pong.cuh"
#include "device/vec.cuh"
#include "kernels/linear_gelu/kernels.h"

namespace bertfast {

static_assert(PingPong::kTile == kLinearGeluTile, "partial sums are of the same rows");

// The biases of a thread's columns of a tile: two of each eight.
template<class T>
struct TileBias {
  Vec<T, 2> pairs[PingPong::kTile / 8];

  __device__ __forceinline__ void load(const void* bias, int first, int cols, int lane) {
    const T* const from = static_cast<const T*>(bias) + first + 2 * (lane % 4);
    if (bias && first + PingPong::kTile <= cols) {  // nothing to ask of each load
#pragma unroll
      for (int n = 0; n < PingPong::kTile / 8; ++n) pairs[n] = Vec<T, 2>::load(from + 8 * n);
      return;
    }
#pragma unroll
    for (int n = 0; n < PingPong::kTile / 8; ++n) {
      pairs[n] = {};
      if (bias && 8 * n < cols - first) pairs[n] = Vec<T, 2>::load(from + 8 * n);
    }
  }
  __device__ __forceinline__ float2 of(int n) const {
    return make_float2(pairs[n][0], pairs[n][1]);
  }
};

// A matrix of dense rows as boxes of 64 of its columns.
inline Boxes slabs(const void* data, int rows, int cols, int64_t stride, int box_rows) {
  return {data, {cols, rows, 1}, {stride, stride * rows}, {PingPong::kDepth, box_rows, 1}};
}

// Fills in the numbers of tiles and steps. False if there are more than a block can count.
inline bool split(int rows, int inner, int cols, PingPongProduct* product) {
  const auto parts = [](int size, int of) { return int64_t(size - 1) / of + 1; };
  const int64_t row_tiles = parts(rows, PingPong::kTile), col_tiles = parts(cols, PingPong::kTile);
  const int64_t steps = parts(inner, PingPong::kDepth);
  product->row_tiles = int(row_tiles);
  product->col_tiles = int(col_tiles);
  product->steps = int(steps);
  return row_tiles * col_tiles <= (1 << 30) / steps;
}

// A block for each multiprocessor, or for each tile. Launches nothing, and `done` is false, where
// the module has no code of the kernel for the current device.
template<class Params>
cudaError_t launch_ping_pong(void (*kernel)(Params), const Gpu& gpu, int shared_bytes,
                             Stream stream, const Params& p, bool* done) {
  *done = has_code(kernel, PingPong::kThreads);
  if (!*done) return cudaSuccess;
  const int tiles = p.product.row_tiles * p.product.col_tiles;
  return launch_early(kernel, dim3(min(tiles, gpu.multiprocessors)), dim3(PingPong::kThreads),
                      shared_bytes, stream, p);
}

}  // namespace bertfast
