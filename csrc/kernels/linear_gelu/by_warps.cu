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
// A block makes 128 x 128 sums (device/product.cuh). Then it takes them through shared memory
// (device/product_out.cuh): in the forward rounded, to u; in the backward as float32, half the rows
// at a time. Sums for dbias are float32, of the unrounded dv, in a fixed order: 16 rows in a
// thread, 8 threads, then the tiles of rows, which column_sum.cu adds.
//
// Moves, beside the operands (read once for each 128 rows or columns, mostly from the second-level
// cache), y and u, or u and dv, once each: 4 bytes a value, and 4 / 128 for dbias.
#include "device/earlier.cuh"
#include "device/gelu.cuh"
#include "device/product_out.cuh"
#include "kernels/linear_gelu/kernels.h"

namespace bertfast {
namespace {

// Rows, and columns, of a block; of a forward with few tiles half that.
constexpr int kLarge = kLinearGeluTile;

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
  using Mine = OutColumns<kTile>;
  const Mine mine(at.col, at.rows, p.cols, thread);
  float bias[kOutVec];
  load_bias<T>(bias, p.bias, mine.col, mine.left > 0);
  __syncthreads();  // nobody reads the stages any more
  put_rounded<T, kTile>(sums, thread);
  __syncthreads();

  // 3. GELU, and write
  const Shared<uint4> rounded = shared_memory<uint4>(0);
  const int place = Rows::place(mine.row, mine.chunk);
  const int64_t offset = int64_t(at.row + mine.row) * p.cols + mine.col;
  const int64_t step = int64_t(Mine::kRowStep) * p.cols;
  T* y = static_cast<T*>(p.y) + offset;
  T* u = static_cast<T*>(p.u) + offset;
#pragma unroll
  for (int i = 0; i < Mine::kCount; ++i) {
    const Vec<T, kOutVec> v{rounded.load(place + i * Mine::kRowStep * Rows::kChunks)};
    float values[kOutVec];
#pragma unroll
    for (int j = 0; j < kOutVec; ++j) values[j] = Gelu<kTanh, false>::value(v[j] + bias[j]);
    if (i * Mine::kRowStep < mine.left) {
      Vec<T, kOutVec>::store(y, values);
      if (p.u) *vector_at<uint4>(u) = v.bits;
    }
    y += step;
    u += step;
  }
}

static_assert(OutHalf::kTile == kLarge && OutHalf::kBytes + OutSums::kBytes <= kProductBytes,
              "sums lie beside half a tile");
static_assert(kProductThreads == kLarge, "a thread prefetches a row");

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
  using Half = OutHalf;
  const Half::Mine mine(at.col, at.rows, p.cols, thread);
  const int64_t offset = int64_t(at.row + mine.row) * p.cols + mine.col;
  const T* const u = static_cast<const T*>(p.u) + offset;
  T* const dv = static_cast<T*>(p.dv) + offset;
  float bias[kOutVec], total[kOutVec] = {};
  load_bias<T>(bias, p.bias, mine.col, mine.left > 0);
  Vec<T, kOutVec> pre[Half::kRows];
#pragma unroll
  for (int i = 0; i < Half::kRows; ++i) {
    pre[i] = Half::load_row(u, Half::row(0, i), p.cols, mine.left);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    __syncthreads();  // nobody reads the stages, or the other half, any more
    Half::put(sums, half, thread);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Half::kRows; ++i) {
      float dh[kOutVec], values[kOutVec];
      Half::get(dh, mine, i);
#pragma unroll
      for (int j = 0; j < kOutVec; ++j) {
        values[j] = dh[j] * Gelu<kTanh, false>::derivative(pre[i][j] + bias[j]);
        total[j] += values[j];
      }
      const int row = Half::row(half, i);
      if (half == 0) pre[i] = Half::load_row(u, Half::row(1, i), p.cols, mine.left);
      if (row < mine.left) Vec<T, kOutVec>::store(dv + int64_t(row) * p.cols, values);
    }
  }
  if (!p.partial_dbias) return;

  // 4. the columns' sums
  OutSums::put(total, mine.chunk, thread, Half::kBytes);
  __syncthreads();
  const float sum = OutSums::get(thread, Half::kBytes);
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
