// The main loop of a matrix product on tensor cores: a block's tile of float32 sums, left in
// registers for the kernel to go on with.
//
// A block has 128 x 128 sums and 4 warps, of which each has 64 x 64: so what ldmatrix reads of
// shared memory takes half the time of the products. 32 values of the inner dimension at a time lie
// in shared memory, three of these stages in turn: while one is worked on the two after it are
// copied, with one barrier a stage. Three times 16 KB let two blocks fit the 100 KB of a small
// multiprocessor; one's copies and epilogue overlap the other's products. Where there are too few
// such tiles for a GPU, ones of 64 x 64 take its inner dimension 64 at a time. A sum is the same to
// the bit in both.
//
// Zeros stand for what lies beyond the inner dimension, as a gap between rows may hold NaN; and for
// rows beyond the last one, whose sums are then zero whatever is multiplied with them.
#pragma once

#include "device/tile.cuh"

namespace bertfast {

constexpr int kProductThreads = 128;
constexpr int kProductStages = 3;
constexpr int kProductOperandBytes = 8 * 1024;
constexpr int kProductStageBytes = 2 * kProductOperandBytes;
constexpr int kProductBytes = kProductStages * kProductStageBytes;
constexpr int kProductBlocks = 2;  // of a multiprocessor

// Of a tile's rows, and columns: how much of the inner dimension is in a stage.
constexpr int product_depth(int tile) {
  return kProductOperandBytes / 2 / tile;
}

// The tile of a block. Blocks that run at the same time should share what they read: they walk down
// up to eight tiles of rows before they go on to the next columns.
template<int kTile>
struct ProductTile {
  int row, col;  // the first ones; row < rows unless there is nothing to do
  int rows;      // of the tile that are there; below 1: none

  __device__ __forceinline__ ProductTile(int all_rows, int group_bits) {
    const int group = blockIdx.y + blockIdx.z * gridDim.y;
    const int in_group = blockIdx.x & ((1 << group_bits) - 1);
    // Beyond the last row by less than 2^17 tiles: 2^30 rows leave 32 bits room.
    row = ((group << group_bits) + in_group) * kTile;
    col = (blockIdx.x >> group_bits) * kTile;
    rows = all_rows - row;
  }
};

// The grid, and the bits of the number of tiles in a group.
template<int kTile>
dim3 product_grid(int rows, int cols, int& group_bits) {
  const int row_tiles = (rows - 1) / kTile + 1, col_tiles = (cols - 1) / kTile + 1;
  group_bits = row_tiles >= 8 ? 3 : row_tiles >= 4 ? 2 : row_tiles >= 2 ? 1 : 0;
  const int groups = ((row_tiles - 1) >> group_bits) + 1;
  const int z = (groups - 1) / 65535 + 1;
  return dim3(col_tiles << group_bits, (groups - 1) / z + 1, z);
}

// An operand whose rows lie along the inner dimension: a thread's part of its copies.
template<class T, int kTile>
struct AlongRows {
  static constexpr int kDepth = product_depth(kTile);
  using Rows = Tile<kDepth>;
  static constexpr int kStep = kProductThreads / Rows::kLanes;
  static_assert(kStep % 8 == 0, "rows that many apart have the same order of chunks");

  const T* from;  // the thread's chunk of its first row, of the next stage
  int64_t step;
  int rows;  // that are there, from the thread's first one on
  int left;  // of the inner dimension, from the thread's chunk on
  int place;

  // data: the tile's first row.
  __device__ __forceinline__ AlongRows(const T* data, int64_t stride, int rows, int inner,
                                       int thread) {
    const int first = thread / Rows::kLanes, lane = thread % Rows::kLanes;
    from = data + first * stride + 8 * lane;
    step = kStep * stride;
    this->rows = rows - first;
    left = inner - 8 * lane;
    place = Rows::place(first, lane);
  }

  // Starts copying the next stage.
  __device__ __forceinline__ void start(Shared<uint4> tile) {
    const int there = left > 0 ? rows : 0;
    const T* row = from;
#pragma unroll
    for (int i = 0; i < kTile / kStep; ++i) {
      cp_async(tile, place + i * kStep * Rows::kChunks, reinterpret_cast<const uint4*>(row),
               i * kStep < there);
      row += step;
    }
    from += kDepth;
    left -= kDepth;
  }

  // Where a thread's row of fragments of 16 rows lies, 16 columns of the inner dimension; others
  // are 16 k columns on at ^ 2 k, and 16 i rows on at + 16 i rows.
  static __device__ __forceinline__ int place_a(int row, int thread) {
    const int lane = thread % 32;
    return Rows::place(row + lane % 16, lane / 16);
  }
  static __device__ __forceinline__ int place_b(int row, int thread) {
    const int lane = thread % 32;
    return Rows::place(row + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }
  static __device__ __forceinline__ void load_b(unsigned (&b)[4], Shared<uint4> tile, int place,
                                                int k, int n) {
    ldmatrix(b, tile, (place ^ 2 * k) + 16 * n * Rows::kChunks);
  }
};

// The same of two operands, `apart` rows from each other, of which a tile has half its rows each.
template<class T, int kTile>
struct AlongRowsOfTwo : AlongRows<T, kTile> {
  using One = AlongRows<T, kTile>;
  static constexpr int kCopies = kTile / One::kStep;
  static_assert(kCopies % 2 == 0, "a thread copies as many rows of both");

  int64_t to_other;  // from the row after the thread's last one of the first to that of the second

  // data, rows: of the first.
  __device__ __forceinline__ AlongRowsOfTwo(const T* data, int64_t stride, int apart, int rows,
                                            int inner, int thread)
      : One(data, stride, rows, inner, thread), to_other((apart - kTile / 2) * stride) {}

  __device__ __forceinline__ void start(Shared<uint4> tile) {
    const int there = this->left > 0 ? this->rows : 0;
    const T* row = this->from;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if (i == kCopies / 2) row += to_other;
      cp_async(tile, this->place + i * One::kStep * One::Rows::kChunks,
               reinterpret_cast<const uint4*>(row), i % (kCopies / 2) * One::kStep < there);
      row += this->step;
    }
    this->from += One::kDepth;
    this->left -= One::kDepth;
  }
};

// An operand whose rows are the inner dimension.
template<class T, int kTile>
struct DownRows {
  static constexpr int kDepth = product_depth(kTile);
  using Rows = Tile<kTile>;
  static constexpr int kStep = kProductThreads / Rows::kLanes;
  static_assert(kStep % 8 == 0, "rows that many apart have the same order of chunks");

  const T* from;
  int64_t step;
  int cols;  // that are there, from the thread's first chunk on
  int left;  // of the inner dimension, from the thread's first row on
  int place;

  // data: the tile's first column.
  __device__ __forceinline__ DownRows(const T* data, int64_t stride, int cols, int inner,
                                      int thread) {
    const int first = thread / Rows::kLanes, lane = thread % Rows::kLanes;
    from = data + first * stride + 8 * lane;
    step = kStep * stride;
    this->cols = cols - 8 * lane;
    left = inner - first;
    place = Rows::place(first, lane);
  }

  __device__ __forceinline__ void start(Shared<uint4> tile) {
#pragma unroll
    for (int i = 0; i < kDepth / kStep; ++i) {
      const int there = i * kStep < left ? cols : 0;
#pragma unroll
      for (int chunk = 0; chunk < Rows::kChunks; chunk += Rows::kLanes) {
        cp_async(tile, place + i * kStep * Rows::kChunks + chunk,
                 reinterpret_cast<const uint4*>(from + 8 * chunk), 8 * chunk < there);
      }
      from += step;
    }
    left -= kDepth;
  }

  static __device__ __forceinline__ int place_b(int col, int thread) {
    const int lane = thread % 32;
    return Rows::place(lane % 16, col / 8 + lane / 16);
  }
  static __device__ __forceinline__ void load_b(unsigned (&b)[4], Shared<uint4> tile, int place,
                                                int k, int n) {
    ldmatrix_trans(b, tile, (place ^ 2 * n) + 16 * k * Rows::kChunks);
  }
};

// The sums of a warp: [i][n] is the fragment of rows from 16 i and columns from 8 n of its quarter
// of the tile.
template<int kTile>
using ProductSums = float[kTile / 32][kTile / 16][4];

template<int kTile>
__device__ __forceinline__ int product_warp_row(int thread) {
  return thread / 64 * (kTile / 2);
}
template<int kTile>
__device__ __forceinline__ int product_warp_col(int thread) {
  return thread / 32 % 2 * (kTile / 2);
}

// Adds x w^T, or x w where w is DownRows. Afterwards no copy is under way and shared memory is
// free, but others may still read it: a barrier has to follow.
template<class T, int kTile, class Right>
__device__ __forceinline__ void add_product(ProductSums<kTile>& sums, AlongRows<T, kTile> x,
                                            Right w, int inner, int thread) {
  using Left = AlongRows<T, kTile>;
  const auto x_stage = [](int stage) { return shared_memory<uint4>(stage * kProductStageBytes); };
  const auto w_stage = [](int stage) {
    return shared_memory<uint4>(stage * kProductStageBytes + kProductOperandBytes);
  };
  const int turns = (inner + Left::kDepth - 1) / Left::kDepth;
#pragma unroll
  for (int stage = 0; stage < kProductStages - 1; ++stage) {
    if (stage < turns) {
      x.start(x_stage(stage));
      w.start(w_stage(stage));
    }
    cp_async_commit();
  }
  const int a_place = Left::place_a(product_warp_row<kTile>(thread), thread);
  const int b_place = Right::place_b(product_warp_col<kTile>(thread), thread);
  int reads = 0, writes = kProductStages - 1;
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    cp_async_wait<kProductStages - 2>();
    __syncthreads();  // the stage is there, and all warps are done with the one before
#pragma unroll
    for (int k = 0; k < Left::kDepth / 16; ++k) {
      unsigned a[kTile / 32][4], b[kTile / 32][4];
#pragma unroll
      for (int i = 0; i < kTile / 32; ++i) {
        ldmatrix(a[i], x_stage(reads), (a_place ^ 2 * k) + 16 * i * Left::Rows::kChunks);
        Right::load_b(b[i], w_stage(reads), b_place, k, i);
      }
      if (k == 0) {  // while the first operands are on their way to registers
        if (turn + kProductStages - 1 < turns) {
          x.start(x_stage(writes));
          w.start(w_stage(writes));
        }
        cp_async_commit();
      }
#pragma unroll
      for (int i = 0; i < kTile / 32; ++i) {
#pragma unroll
        for (int n = 0; n < kTile / 32; ++n) {
          mma_m16n8k16<T>(sums[i][2 * n], a[i], b[n][0], b[n][1]);
          mma_m16n8k16<T>(sums[i][2 * n + 1], a[i], b[n][2], b[n][3]);
        }
      }
    }
    reads = reads + 1 == kProductStages ? 0 : reads + 1;
    writes = writes + 1 == kProductStages ? 0 : writes + 1;
  }
}

}  // namespace bertfast
