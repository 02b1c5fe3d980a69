// Tiles of rows in shared memory, and their way to the tensor cores and back.
//
// A row is kDim values of 16 bits, in chunks of 16 bytes. Chunk c of row r lies at place c ^ (bits
// of r) of its row, so that eight rows' chunks c fall into all 32 banks: what ldmatrix reads at
// once. Rows of 64 and 128 values start at bank 0 and take r's low three bits; rows of 32 and 96
// start alternately at bank 0 and 16 and take the two bits above.
#pragma once

#include "device/math.cuh"
#include "device/mma.cuh"

namespace bertfast {

// thread: the caller's, of the block.
template<int kDim>
struct Tile {
  static_assert(kDim % 32 == 0, "rows are whole groups of four chunks");
  static constexpr int kChunks = kDim / 8;
  static constexpr bool kWide = kChunks % 8 == 0;
  static constexpr int kRowBytes = 2 * kDim;

  static __device__ __forceinline__ int place(int row, int chunk) {
    return row * kChunks + (chunk ^ (kWide ? row & 7 : row >> 1 & 3));
  }

  // How kThreads threads copy rows: kLanes along a row, so that a warp reads whole sectors, and
  // each thread the rows kStep apart.
  static constexpr int kLanes = kWide ? 8 : 4;

  // A thread's part of the copies of kRows rows, which may go on block after block.
  template<int kRows, int kThreads, class T>
  struct Copies {
    static constexpr int kStep = kThreads / kLanes;
    static_assert(kRows % kStep == 0 && kStep <= 32, "each thread copies the same number of rows");
    const int thread;
    const T* from;  // the thread's first chunk of its first row
    int stride;     // between rows
    int columns;    // of a row; up to kDim there are zeros

    __device__ __forceinline__ Copies(const T* rows, int stride, int columns, int thread)
        : thread(thread),
          from(rows + int64_t(first()) * stride + 8 * lane()),
          stride(stride),
          columns(columns) {}
    __device__ __forceinline__ int first() const { return thread / kLanes; }
    __device__ __forceinline__ int lane() const { return thread % kLanes; }

    // Starts copying the rows of a block: row r = first() + i if inside(i, r), else zeros.
    template<class Inside>
    __device__ __forceinline__ void start(Shared<uint4> tile, int block, Inside inside) const {
      const T* rows = from + int64_t(block * kRows) * stride;
#pragma unroll
      for (int i = 0; i < kRows; i += kStep) {
        copy_row(tile, first() + i, rows + i * stride, inside(i, first() + i));
      }
    }

    // The same of rows in another order: row source(r) of the first block goes to place r.
    template<class Source, class Inside>
    __device__ __forceinline__ void start_permuted(Shared<uint4> tile, Source source,
                                                   Inside inside) const {
#pragma unroll
      for (int i = 0; i < kRows; i += kStep) {
        const int row = source(first() + i);
        copy_row(tile, first() + i, from + int64_t(row - first()) * stride, inside(row));
      }
    }

   private:
    __device__ __forceinline__ void copy_row(Shared<uint4> tile, int to, const T* row,
                                             bool inside) const {
#pragma unroll
      for (int chunk = 0; chunk < kChunks; chunk += kLanes) {
        cp_async(tile, place(to, chunk + lane()), reinterpret_cast<const uint4*>(row + 8 * chunk),
                 inside && 8 * (chunk + lane()) < columns);
      }
    }
  };

  // The A fragment (16 x 16) of rows from `row` and columns from 16 k.
  static __device__ __forceinline__ void load_a(unsigned (&a)[4], Shared<uint4> tile, int row,
                                                int k, int thread) {
    const int lane = thread % 32;
    ldmatrix(a, tile, place(row + lane % 16, 2 * k + lane / 16));
  }

  // Two B fragments for products with the tile's transpose: columns (of B) are the 16 rows from
  // `row`, rows are the columns from 16 k. b[0], b[1] are the first eight's, b[2], b[3] the
  // others'.
  static __device__ __forceinline__ void load_b(unsigned (&b)[4], Shared<uint4> tile, int row,
                                                int k, int thread) {
    const int lane = thread % 32;
    ldmatrix(b, tile, place(row + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
  }

  // Two B fragments for products with the tile itself: rows are the 16 rows from `row`, columns
  // those from 16 n.
  static __device__ __forceinline__ void load_b_trans(unsigned (&b)[4], Shared<uint4> tile, int row,
                                                      int n, int thread) {
    const int lane = thread % 32;
    ldmatrix_trans(b, tile, place(row + lane % 16, 2 * n + lane / 16));
  }

  // Where lane l % 4 of four finds the i-th of its chunks of a row. Of wide rows odd ones take
  // pairs of fours in the other order, lest two rows read the same banks.
  static __device__ __forceinline__ int quad_chunk(int row, int i, int thread) {
    return thread % 4 + 4 * (i ^ (kWide ? row & 1 : 0));
  }

  // Rounds 16 rows of sums, times their factor (rows g, and g + 8), and writes them to rows from
  // 16 * warp of the tile, which only this warp touches, and from there to memory, 16 bytes a lane:
  // what is at place r becomes row target(r) if inside(target(r)), zeros unless counts(target(r)).
  template<class T, class Target, class Inside, class Counts>
  static __device__ __forceinline__ void store(Shared<uint4> tile, const float (&sums)[kDim / 8][4],
                                               float factor0, float factor1, T* to, int stride,
                                               int columns, int thread, Target target,
                                               Inside inside, Counts counts) {
    const int lane = thread % 32, first = thread / 32 * 16;
    const Shared<unsigned> pairs = as_pairs(tile);
#pragma unroll
    for (int n = 0; n < kChunks; ++n) {
      const int upper = 4 * place(first + lane / 4, n) + lane % 4;
      const int lower = 4 * place(first + lane / 4 + 8, n) + lane % 4;
      pairs.store(upper, pack<T>(sums[n][0] * factor0, sums[n][1] * factor0));
      pairs.store(lower, pack<T>(sums[n][2] * factor1, sums[n][3] * factor1));
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kLanes / 2; ++i) {
      const int r = first + i * (32 / kLanes) + lane / kLanes;
      const int row = target(r);
      const bool writes = inside(row), zeroes = !counts(row);
      T* values = to + int64_t(row) * stride;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; chunk += kLanes) {
        const int c = chunk + lane % kLanes;
        uint4 bits = tile.load(place(r, c));
        if (zeroes) bits = make_uint4(0, 0, 0, 0);
        if (writes && 8 * c < columns) *vector_at<uint4>(values + 8 * c) = bits;
      }
    }
  }

 private:
  static __device__ __forceinline__ Shared<unsigned> as_pairs(Shared<uint4> tile) {
#ifdef BERTFAST_HOST
    return {tile.byte_offset};
#else
    return {reinterpret_cast<unsigned*>(tile.ptr)};
#endif
  }
};

}  // namespace bertfast
