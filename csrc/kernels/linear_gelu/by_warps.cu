// A product and the GELU that follows it, in one kernel, whose warps multiply by mma.sync.
//
//   forward   u = x weight^T, rounded;  y = gelu(u + bias)
//   backward  dv = (dy weight) * gelu'(u + bias), dbias = its columns' sums
//
// Saved for the backward: u, without its bias. y is that of the rounded u, so the backward's slope
// belongs to it. The backward's weight is that of the product that takes y: (its outputs, width).
//
// Shapes: x (rows, inner), weight (cols, inner), y, u and dv (rows, cols); dy (rows, inner), and in
// the backward weight is (inner, cols). Widths are multiples of 8; x, dy and weight have rows that
// may be further apart, by a multiple of 8.
//
// A block makes 128 x 128 sums (device/product.cuh). Then it takes them through shared memory, so
// that a thread has 8 neighbouring columns, always the same, of every 8th row: bias is read once,
// u, y and dv move 16 bytes a thread, and a column's sum for dbias grows in a register. The forward
// rounds before it, to u; the backward stages float32, half the rows at a time. Sums for dbias are
// float32, of the unrounded dv, in a fixed order: 16 rows in a thread, 8 threads, then the tiles of
// rows, which column_sum.cu adds.
//
// Moves, beside the operands (read once for each 128 rows or columns, mostly from the second-level
// cache), y and u, or u and dv, once each: 4 bytes a value, and 4 / 128 for dbias.
#include "device/earlier.cuh"
#include "device/gelu.cuh"
#include "device/product.cuh"
#include "device/vec.cuh"
#include "kernels/linear_gelu/kernels.h"

namespace bertfast {
namespace {

constexpr int kLarge =
    kLinearGeluTile;     // rows, and columns, of a block; of a forward with few tiles half that
constexpr int kVec = 8;  // columns of a thread

// A thread's 8 columns, after the sums went through shared memory.
template<int kTile>
struct Columns {
  static constexpr int kChunks = kTile / kVec;                // threads beside each other
  static constexpr int kRowStep = kProductThreads / kChunks;  // between a thread's rows
  static constexpr int kRows = kTile / kRowStep;              // of a thread
  static_assert(kRowStep % 8 == 0, "rows that many apart have the same order of chunks");

  int row;    // its first, in the tile
  int chunk;  // which eight
  int left;   // rows from its first one on; none if it has no columns

  __device__ __forceinline__ Columns(const ProductTile<kTile>& at, int cols, int thread)
      : row(thread / kChunks), chunk(thread % kChunks) {
    left = at.col + kVec * chunk < cols ? at.rows - row : 0;
  }
};

template<class T>
__device__ __forceinline__ void load_bias(float (&bias)[kVec], const void* from, int col,
                                          bool inside) {
  Vec<T, kVec> bits{};
  if (from && inside) bits = Vec<T, kVec>::load(static_cast<const T*>(from) + col);
#pragma unroll
  for (int j = 0; j < kVec; ++j) bias[j] = bits[j];
}

template<class T, bool kTanh, int kTile>
__global__ void __launch_bounds__(kProductThreads, kProductBlocks)
    linear_gelu_forward_kernel(LinearGeluForward p) {
  await_earlier_kernels();
  const int thread = int(threadIdx.x);
  const ProductTile<kTile> at(p.rows, p.group_bits);
  if (at.rows <= 0) return;

  // 1. sums
  ProductSums<kTile> sums = {};
  {
    const T* const x = static_cast<const T*>(p.x) + int64_t(at.row) * p.x_row_stride;
    const T* const weight = static_cast<const T*>(p.weight) + int64_t(at.col) * p.weight_row_stride;
    const AlongRows<T, kTile> left(x, p.x_row_stride, at.rows, p.inner, thread);
    const AlongRows<T, kTile> right(weight, p.weight_row_stride, p.cols - at.col, p.inner, thread);
    add_product<T, kTile>(sums, left, right, p.inner, thread);
  }

  // 2. rounded, through shared memory
  using Rows = Tile<kTile>;
  using Mine = Columns<kTile>;
  const Mine mine(at, p.cols, thread);
  const int col = at.col + kVec * mine.chunk;
  float bias[kVec];
  load_bias<T>(bias, p.bias, col, mine.left > 0);
  __syncthreads();  // nobody reads the stages any more
  {
    const Shared<unsigned> pairs = shared_memory<unsigned>(0);
    const int g = thread % 32 / 4, t = thread % 4;
    const int row = product_warp_row<kTile>(thread) + g;
    const int first = Rows::place(row, product_warp_col<kTile>(thread) / kVec);
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
  __syncthreads();

  // 3. GELU, and write
  const Shared<uint4> rounded = shared_memory<uint4>(0);
  const int place = Rows::place(mine.row, mine.chunk);
  const int64_t offset = int64_t(at.row + mine.row) * p.cols + col;
  const int64_t step = int64_t(Mine::kRowStep) * p.cols;
  T* y = static_cast<T*>(p.y) + offset;
  T* u = static_cast<T*>(p.u) + offset;
#pragma unroll
  for (int i = 0; i < Mine::kRows; ++i) {
    const Vec<T, kVec> v{rounded.load(place + i * Mine::kRowStep * Rows::kChunks)};
    float values[kVec];
#pragma unroll
    for (int j = 0; j < kVec; ++j) values[j] = Gelu<kTanh, false>::value(v[j] + bias[j]);
    if (i * Mine::kRowStep < mine.left) {
      Vec<T, kVec>::store(y, values);
      if (p.u) *vector_at<uint4>(u) = v.bits;
    }
    y += step;
    u += step;
  }
}

// The backward's: half a tile at a time.
using Mine = Columns<kLarge>;
constexpr int kHalfRows = Mine::kRows / 2;  // of a thread
constexpr int kHalfBytes = kLarge / 2 * kLarge * 4;
// Sums of a warp's columns: the lower fours of all chunks, then from 16 banks on the upper ones.
constexpr int kUpperFours = kLarge / 2 + 16;
constexpr int kWarpSums = kUpperFours + kLarge / 2;
static_assert(kHalfBytes + kProductThreads / 32 * kWarpSums * 4 <= kProductBytes,
              "sums lie beside half a tile");
static_assert(kProductThreads == kLarge, "a thread prefetches a row, and adds up a column");

// Where a chunk of four float32 values lies in half a tile: so that neither the pairs of 4 rows
// that half a warp writes nor the even, or the odd, chunks of a row that 8 threads read share
// banks.
__device__ __forceinline__ int float_place(int row, int chunk) {
  return row * (kLarge / 4) + (chunk ^ 2 * (row & 3) ^ (chunk >> 3 & 1));
}

// Of 16 rows of each 64, the number in the tile of a thread's i-th: half a tile has the first or
// the last 32 of both warps' 64 rows.
__device__ __forceinline__ constexpr int row_of_half(int half, int i) {
  return Mine::kRowStep * i + 32 * half + (i >= kHalfRows / 2 ? 32 : 0);
}

// Eight values of a row `row` further on. Rows that aren't there have a slope, and sums of zero.
template<class T>
__device__ __forceinline__ Vec<T, kVec> load_row(const T* from, int row, int cols, int left) {
  return row < left ? Vec<T, kVec>::load(from + int64_t(row) * cols) : Vec<T, kVec>{};
}

template<class T, bool kTanh>
__global__ void __launch_bounds__(kProductThreads, kProductBlocks)
    linear_gelu_backward_kernel(LinearGeluBackward p) {
  await_earlier_kernels();
  const int thread = int(threadIdx.x);
  const ProductTile<kLarge> at(p.rows, p.group_bits);
  if (at.rows <= 0) return;

  // 1. u on its way, as far as a cache; registers have no room for it yet
  if (thread < at.rows) {
    const T* const row = static_cast<const T*>(p.u) + int64_t(at.row + thread) * p.cols + at.col;
    prefetch(row);
    if (at.col + kLarge / 2 < p.cols) prefetch(row + kLarge / 2);
  }

  // 2. sums
  ProductSums<kLarge> sums = {};
  {
    const T* const dy = static_cast<const T*>(p.dy) + int64_t(at.row) * p.dy_row_stride;
    const T* const weight = static_cast<const T*>(p.weight) + at.col;
    const AlongRows<T, kLarge> left(dy, p.dy_row_stride, at.rows, p.inner, thread);
    const DownRows<T, kLarge> right(weight, p.weight_row_stride, p.cols - at.col, p.inner, thread);
    add_product<T, kLarge>(sums, left, right, p.inner, thread);
  }

  // 3. half the rows at a time: through shared memory, times the slope, and written
  const Mine mine(at, p.cols, thread);
  const int col = at.col + kVec * mine.chunk;
  const int64_t offset = int64_t(at.row + mine.row) * p.cols + col;
  const T* const u = static_cast<const T*>(p.u) + offset;
  T* const dv = static_cast<T*>(p.dv) + offset;
  float bias[kVec], total[kVec] = {};
  load_bias<T>(bias, p.bias, col, mine.left > 0);
  Vec<T, kVec> pre[kHalfRows];
#pragma unroll
  for (int i = 0; i < kHalfRows; ++i) pre[i] = load_row(u, row_of_half(0, i), p.cols, mine.left);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    __syncthreads();  // nobody reads the stages, or the other half, any more
    {
      const Shared<float2> pairs = shared_memory<float2>(0);
      const int g = thread % 32 / 4, t = thread % 4;
      const int row = product_warp_row<kLarge>(thread) / 2 + g;
      const int first = float_place(row, product_warp_col<kLarge>(thread) / 4 + t / 2);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const float (&four)[4] = sums[2 * half + i][n];
          const int upper = (first ^ 2 * n ^ n / 4) + 16 * i * (kLarge / 4);
          const int lower = upper + 8 * (kLarge / 4);
          pairs.store(2 * upper + t % 2, make_float2(four[0], four[1]));
          pairs.store(2 * lower + t % 2, make_float2(four[2], four[3]));
        }
      }
    }
    __syncthreads();
    const Shared<float4> staged = shared_memory<float4>(0);
    const int place = float_place(mine.row, 2 * mine.chunk);
#pragma unroll
    for (int i = 0; i < kHalfRows; ++i) {
      const int from = place + i * Mine::kRowStep * (kLarge / 4);
      const float4 low = staged.load(from), high = staged.load(from ^ 1);
      const float dh[kVec] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      float values[kVec];
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        values[j] = dh[j] * Gelu<kTanh, false>::derivative(pre[i][j] + bias[j]);
        total[j] += values[j];
      }
      const int row = row_of_half(half, i);
      if (half == 0) pre[i] = load_row(u, row_of_half(1, i), p.cols, mine.left);
      if (row < mine.left) Vec<T, kVec>::store(dv + int64_t(row) * p.cols, values);
    }
  }
  if (!p.partial_dbias) return;

  // 4. the columns' sums of 8 threads: two in each warp, then the warps'
  const Shared<float> warps = shared_memory<float>(kHalfBytes);
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    total[j] += __shfl_xor_sync(0xffffffffu, total[j], Mine::kChunks);
  }
  if (thread % 32 < Mine::kChunks) {
    const Shared<float4> to = shared_memory<float4>(kHalfBytes);
    const int first = thread / 32 * (kWarpSums / 4) + mine.chunk;
    to.store(first, make_float4(total[0], total[1], total[2], total[3]));
    to.store(first + kUpperFours / 4, make_float4(total[4], total[5], total[6], total[7]));
  }
  __syncthreads();
  const int from = thread / 8 * 4 + thread % 4 + thread / 4 % 2 * kUpperFours;
  const float sum = (warps.load(from) + warps.load(from + kWarpSums)) +
                    (warps.load(from + 2 * kWarpSums) + warps.load(from + 3 * kWarpSums));
  if (at.col + thread < p.cols) {
    p.partial_dbias[int64_t(at.row / kLarge) * p.cols + at.col + thread] = sum;
  }
}

}  // namespace

cudaError_t launch_forward_by_warps(LinearGeluForward p, bool tanh, DType dtype, const Gpu& gpu,
                                    Stream stream) {
  const int64_t tiles = (int64_t(p.rows - 1) / kLarge + 1) * ((p.cols - 1) / kLarge + 1);
  return with_form(dtype, tanh, [&](auto t, auto form) {
    const auto with_tile = [&](auto tile) {
      constexpr int kTile = decltype(tile)::value;
      const dim3 grid = product_grid<kTile>(p.rows, p.cols, p.group_bits);
      const auto kernel = linear_gelu_forward_kernel<decltype(t), decltype(form)::value, kTile>;
      return launch_early(kernel, grid, dim3(kProductThreads), kProductBytes, stream, p);
    };
    // A multiprocessor without a tile would idle. What is written is the same by either.
    return tiles < gpu.multiprocessors ? with_tile(std::integral_constant<int, kLarge / 2>())
                                       : with_tile(std::integral_constant<int, kLarge>());
  });
}

cudaError_t launch_backward_by_warps(LinearGeluBackward p, bool tanh, DType dtype, Stream stream) {
  const dim3 grid = product_grid<kLarge>(p.rows, p.cols, p.group_bits);
  return with_form(dtype, tanh, [&](auto t, auto form) {
    const auto kernel = linear_gelu_backward_kernel<decltype(t), decltype(form)::value>;
    return launch_early(kernel, grid, dim3(kProductThreads), kProductBytes, stream, p);
  });
}

}  // namespace bertfast
