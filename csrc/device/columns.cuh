// How kernels that take each element by itself split rows over threads.
//
// A thread takes neighbouring columns, 16 bytes where it can, in several rows, so it loads their
// biases once. blockDim.x threads lie beside each other in a row, blockDim.y below
// each other; a row takes `tiles` blocks. Blocks are numbered along the rows, as memory is.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "device/vec.cuh"
#include "params.h"

namespace bertfast {

inline constexpr int kColumnThreads = 256;  // of a block, at most

// Where a thread works: its first column, and how many threads lie above it in all blocks. The last
// block of a row may reach beyond 2^31 columns, though no row does.
struct Place {
  unsigned col;
  int64_t row;

  __device__ __forceinline__ Place(int vec, int tiles) {
    const unsigned group = blockIdx.x / static_cast<unsigned>(tiles);
    col = ((blockIdx.x - group * tiles) * blockDim.x + threadIdx.x) * vec;
    row = int64_t(group) * blockDim.y + threadIdx.y;
  }
};

// The biases of a thread's columns, or 0.
template<class T, int kVec>
__device__ __forceinline__ void load_bias(float (&bias)[kVec], const void* biases, unsigned col) {
  if (biases) {
    const auto bits = Vec<T, kVec>::load(static_cast<const T*>(biases) + col);
#pragma unroll
    for (int k = 0; k < kVec; ++k) bias[k] = bits[k];
  } else {
#pragma unroll
    for (int k = 0; k < kVec; ++k) bias[k] = 0.f;
  }
}

// How a row is split over blocks, and which of them there are.
struct Blocks {
  int tiles;
  dim3 grid, block;
};

// `rows` are rows of threads. False if there are more blocks than a launch can have.
inline bool split(int cols, int vec, int64_t rows, Blocks& blocks) {
  const int vectors = (cols - 1) / vec + 1;
  blocks.tiles = (vectors - 1) / kColumnThreads + 1;
  const int wide = (vectors - 1) / blocks.tiles + 1;  // as even as it goes: 384 vectors are 2 x 192
  const int high = kColumnThreads / wide;
  const int64_t groups = (rows - 1) / high + 1;
  blocks.block = dim3(wide, high);
  blocks.grid = dim3(static_cast<unsigned>(groups * blocks.tiles));
  return groups * blocks.tiles <= 0x7fffffff;
}

template<class Use>
cudaError_t with_flag(bool flag, Use use) {
  return flag ? use(std::true_type()) : use(std::false_type());
}

// Whether all sizes, in elements, are whole vectors.
inline bool are_vectors(DType dtype, std::initializer_list<int> sizes) {
  const int vec = dtype == DType::kFloat32 ? 4 : 8;
  for (int size : sizes) {
    if (size % vec) return false;
  }
  return true;
}

}  // namespace bertfast
