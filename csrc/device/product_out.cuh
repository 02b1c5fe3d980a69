// How a product's sums leave their block: through shared memory, so that a thread has 8
// neighbouring columns, always the same, of every so many rows. What belongs to a column is then
// read once, tensors move 16 bytes a thread, and a column's sum grows in a register.
//
// Either all sums go at once, rounded to 16 bits, or those of a tile of 128 x 128 in float32, half
// the rows at a time.
#pragma once

#include "device/product.cuh"
#include "device/vec.cuh"

namespace bertfast {

constexpr int kOutVec = 8;  // columns of a thread

// A thread's part of kRows rows of kCols columns.
template<int kRows, int kCols = kRows>
struct OutColumns {
  static constexpr int kChunks = kCols / kOutVec;             // threads beside each other
  static constexpr int kRowStep = kProductThreads / kChunks;  // between a thread's rows
  static constexpr int kCount = kRows / kRowStep;             // of a thread's rows
  static_assert(kRowStep % 8 == 0, "rows that many apart have the same order of chunks");
  static_assert(kChunks % 4 == 0, "the threads that read at once have at most two rows");

  int row;    // its first, in the tile
  int chunk;  // which eight
  int col;    // the first of them, in the tensor
  int left;   // rows from its first one on; none if it has no columns

  // first: the tile's column. rows: those of the tile that are there.
  __device__ __forceinline__ OutColumns(int first, int rows, int cols, int thread)
      : row(thread / kChunks), chunk(thread % kChunks), col(first + kOutVec * chunk) {
    // Two rows of four chunks are to lie in different banks: rows 4 apart do.
    if constexpr (kChunks == 4) row = (row & ~7) | (row & 1) << 2 | (row >> 1 & 3);
    left = col < cols ? rows - row : 0;
  }
};

// Eight biases, or zeros.
template<class T>
__device__ __forceinline__ void load_bias(float (&bias)[kOutVec], const void* from, int col,
                                          bool inside) {
  Vec<T, kOutVec> bits{};
  if (from && inside) bits = Vec<T, kOutVec>::load(static_cast<const T*>(from) + col);
#pragma unroll
  for (int j = 0; j < kOutVec; ++j) bias[j] = bits[j];
}

// Rounds all sums and puts them, as Tile<kTile>, at the beginning of shared memory.
template<class T, int kTile>
__device__ __forceinline__ void put_rounded(const ProductSums<kTile>& sums, int thread) {
  using Rows = Tile<kTile>;
  const Shared<unsigned> pairs = shared_memory<unsigned>(0);
  const int g = thread % 32 / 4, t = thread % 4;
  const int row = product_warp_row<kTile>(thread) + g;
  const int first = Rows::place(row, product_warp_col<kTile>(thread) / kOutVec);
#pragma unroll
  for (int i = 0; i < kTile / 32; ++i) {
#pragma unroll
    for (int n = 0; n < kTile / 16; ++n) {
      const int upper = (first ^ n) + 16 * i * Rows::kChunks, lower = upper + 8 * Rows::kChunks;
      pairs.store(4 * upper + t, pack<T>(sums[i][n][0], sums[i][n][1]));
      pairs.store(4 * lower + t, pack<T>(sums[i][n][2], sums[i][n][3]));
    }
  }
}

// Half a tile of 128 x 128 float32 sums at a time, at the beginning of shared memory: it has the
// first or the last 32 of both warps' 64 rows.
struct OutHalf {
  static constexpr int kTile = 128;
  using Mine = OutColumns<kTile>;
  static constexpr int kRows = Mine::kCount / 2;  // of a thread
  static constexpr int kBytes = kTile / 2 * kTile * 4;

  // Where a chunk of four values lies: so that neither the pairs of 4 rows that half a warp writes
  // nor the even, or the odd, chunks of a row that 8 threads read share banks.
  static __device__ __forceinline__ int place(int row, int chunk) {
    return row * (kTile / 4) + (chunk ^ 2 * (row & 3) ^ (chunk >> 3 & 1));
  }

  // How far down the tile a thread's i-th row lies from its first.
  static __device__ __forceinline__ constexpr int row(int half, int i) {
    return Mine::kRowStep * i + 32 * half + (i >= kRows / 2 ? 32 : 0);
  }

  static __device__ __forceinline__ void put(const ProductSums<kTile>& sums, int half, int thread) {
    const Shared<float2> pairs = shared_memory<float2>(0);
    const int g = thread % 32 / 4, t = thread % 4;
    const int row = product_warp_row<kTile>(thread) / 2 + g;
    const int first = place(row, product_warp_col<kTile>(thread) / 4 + t / 2);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float (&four)[4] = sums[2 * half + i][n];
        const int upper = (first ^ 2 * n ^ n / 4) + 16 * i * (kTile / 4);
        const int lower = upper + 8 * (kTile / 4);
        pairs.store(2 * upper + t % 2, make_float2(four[0], four[1]));
        pairs.store(2 * lower + t % 2, make_float2(four[2], four[3]));
      }
    }
  }

  // The same of a thread's rows in the order of both halves.
  static __device__ __forceinline__ constexpr int row(int number) {
    return row(number / kRows, number % kRows);
  }

  // The sums of a thread's i-th row.
  static __device__ __forceinline__ void get(float (&sums)[kOutVec], const Mine& mine, int i) {
    const Shared<float4> staged = shared_memory<float4>(0);
    const int from = place(mine.row, 2 * mine.chunk) + i * Mine::kRowStep * (kTile / 4);
    const float4 low = staged.load(from), high = staged.load(from ^ 1);
    const float all[kOutVec] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int j = 0; j < kOutVec; ++j) sums[j] = all[j];
  }

  // Eight values of a tensor's row `row` further on. Rows that aren't there have a slope, and sums
  // of zero.
  template<class T>
  static __device__ __forceinline__ Vec<T, kOutVec> load_row(const T* from, int row, int64_t stride,
                                                             int left) {
    return row < left ? Vec<T, kOutVec>::load(from + row * stride) : Vec<T, kOutVec>{};
  }
};

// Sums of a tile's 128 columns over the block, of 8 threads each: two in each warp, then the
// warps'. `at` is where their 2304 bytes of shared memory begin; a barrier lies between putting and
// getting.
struct OutSums {
  static constexpr int kCols = OutHalf::kTile;
  // Sums of a warp's columns: the lower fours of all chunks, then from 16 banks on the upper ones.
  static constexpr int kUpperFours = kCols / 2 + 16;
  static constexpr int kOfWarp = kUpperFours + kCols / 2;
  static constexpr int kBytes = kProductThreads / 32 * kOfWarp * 4;
  static_assert(kProductThreads == kCols, "a thread adds up a column");

  // total: a thread's, of its columns.
  static __device__ __forceinline__ void put(float (&total)[kOutVec], int chunk, int thread,
                                             int at) {
    constexpr int kChunks = OutHalf::Mine::kChunks;
#pragma unroll
    for (int j = 0; j < kOutVec; ++j) {
      total[j] += __shfl_xor_sync(0xffffffffu, total[j], kChunks);
    }
    if (thread % 32 < kChunks) {
      const Shared<float4> to = shared_memory<float4>(at);
      const int first = thread / 32 * (kOfWarp / 4) + chunk;
      to.store(first, make_float4(total[0], total[1], total[2], total[3]));
      to.store(first + kUpperFours / 4, make_float4(total[4], total[5], total[6], total[7]));
    }
  }

  // That of the tile's column `thread`.
  static __device__ __forceinline__ float get(int thread, int at) {
    const Shared<float> warps = shared_memory<float>(at);
    const int from = thread / 8 * 4 + thread % 4 + thread / 4 % 2 * kUpperFours;
    return (warps.load(from) + warps.load(from + kOfWarp)) +
           (warps.load(from + 2 * kOfWarp) + warps.load(from + 3 * kOfWarp));
  }
};

}  // namespace bertfast
