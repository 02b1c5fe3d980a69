// A product and the gated activation of its halves, in one kernel, whose warps multiply by
// mma.sync.
//
//   forward   u = x weight^T, rounded;  y = act(g) * v, g and v the halves of u + bias
//   backward  dh = dy weight;  du = [dh * v * act'(g), dh * act(g)], dbias = its columns' sums
//
// Saved for the backward: u, without its bias. y is that of the rounded u, and has the bits that
// gated.cu gives for it. The backward's weight is that of the product that takes y.
//
// Shapes: x (rows, inner), weight (2 cols, inner), bias (2 cols), y (rows, cols), u and du (rows,
// 2 cols); dy (rows, inner), and in the backward weight is (inner, cols). Widths are multiples of
// 8; x, dy and weight have rows that may be further apart, by a multiple of 8.
//
// It is linear_gelu/by_warps.cu with two halves. A tile of the forward's 128 x 128 sums has the
// same 64 columns of both, side by side: half the rows of its right operand come from each. So a
// thread finds gate and value of its columns in one row of shared memory. A tile of the backward
// has 128 x 128 values of dh, of which each gives two of du.
//
// Which activation is a branch at run time, around what is left to do with the sums: the exact
// GELU, or one of the two that have a sigmoid, told by its numbers. Templates would have the main
// loop compiled three times as well.
//
// Moves, beside the operands (read once for each 128 rows, and 64 or 128 columns, mostly from the
// second-level cache), y and u, or u and du: 6 bytes a value of y, or 8, and 8 / 128 for dbias.
#include "device/earlier.cuh"
#include "device/gate.cuh"
#include "device/gpu.cuh"
#include "device/product_out.cuh"
#include "device/types.cuh"

namespace bertfast {
namespace {

constexpr int kLarge = OutHalf::kTile;  // rows, and sums beside each other, of a block
constexpr int kAhead = 2;               // rows of u that a thread of the backward loads ahead
static_assert(OutHalf::kBytes + 2 * OutSums::kBytes <= kProductBytes,
              "sums lie beside half a tile");
static_assert(kProductThreads == kLarge, "a thread prefetches a row");

template<class Call>
struct WithSigmoid : Call {
  SigmoidGate sigmoid;
};

template<class Call, class Use>
__device__ __forceinline__ void with_activation(const WithSigmoid<Call>& p, Use use) {
  if (p.activation == Activation::kGelu) {
    use(Gelu<false, false>());
  } else {
    use(p.sigmoid);
  }
}

template<class T, int kTile>
__global__ void __launch_bounds__(kProductThreads, kProductBlocks)
    linear_gated_forward_kernel(WithSigmoid<LinearGatedForward> p) {
  await_earlier_kernels();
  const int thread = int(threadIdx.x);
  const ProductTile<kTile> at(p.rows, p.group_bits);
  if (at.rows <= 0) return;
  const int first_col = at.col / 2;  // of each half

  // 1. sums
  ProductSums<kTile> sums = {};
  {
    const T* const x = static_cast<const T*>(p.x) + int64_t(at.row) * p.x_row_stride;
    const T* const weight =
        static_cast<const T*>(p.weight) + int64_t(first_col) * p.weight_row_stride;
    const AlongRows<T, kTile> left(x, p.x_row_stride, at.rows, p.inner, thread);
    const AlongRowsOfTwo<T, kTile> right(weight, p.weight_row_stride, p.cols, p.cols - first_col,
                                         p.inner, thread);
    add_product<T, kTile>(sums, left, right, p.inner, thread);
  }

  // 2. rounded, through shared memory
  using Rows = Tile<kTile>;
  using Mine = OutColumns<kTile, kTile / 2>;
  const Mine mine(first_col, at.rows, p.cols, thread);
  float gate_bias[kOutVec], value_bias[kOutVec];
  load_bias<T>(gate_bias, p.bias, mine.col, mine.left > 0);
  load_bias<T>(value_bias, p.bias, mine.col + p.cols, mine.left > 0);
  __syncthreads();  // nobody reads the stages any more
  put_rounded<T, kTile>(sums, thread);
  __syncthreads();

  // 3. activation, times the value, and write
  with_activation(p, [&](auto act) {
    const Shared<uint4> rounded = shared_memory<uint4>(0);
    const int place = Rows::place(mine.row, mine.chunk);
    const int64_t row = at.row + mine.row;
    T* y = static_cast<T*>(p.y) + row * p.cols + mine.col;
    T* u = static_cast<T*>(p.u) + 2 * row * p.cols + mine.col;
#pragma unroll
    for (int i = 0; i < Mine::kCount; ++i) {
      const int from = place + i * Mine::kRowStep * Rows::kChunks;
      const Vec<T, kOutVec> g{rounded.load(from)}, v{rounded.load(from ^ Mine::kChunks)};
      float values[kOutVec];
#pragma unroll
      for (int j = 0; j < kOutVec; ++j) {
        values[j] = act.value(g[j] + gate_bias[j]) * (v[j] + value_bias[j]);
      }
      if (i * Mine::kRowStep < mine.left) {
        Vec<T, kOutVec>::store_whole(y, values);
        if (p.u) {
          *vector_at<uint4>(u) = g.bits;
          *vector_at<uint4>(u + p.cols) = v.bits;
        }
      }
      y += int64_t(Mine::kRowStep) * p.cols;
      u += 2 * int64_t(Mine::kRowStep) * p.cols;
    }
  });
}

template<class T>
__global__ void __launch_bounds__(kProductThreads, kProductBlocks)
    linear_gated_backward_kernel(WithSigmoid<LinearGatedBackward> p) {
  await_earlier_kernels();
  const int thread = int(threadIdx.x);
  const ProductTile<kLarge> at(p.rows, p.group_bits);
  if (at.rows <= 0) return;
  const int64_t wide = 2 * int64_t(p.cols);

  // 1. u on its way, as far as a cache; registers have no room for it yet
  if (thread < at.rows) {
    const T* const row = static_cast<const T*>(p.u) + (at.row + thread) * wide + at.col;
    prefetch(row);
    prefetch(row + p.cols);
    if (at.col + kLarge / 2 < p.cols) {
      prefetch(row + kLarge / 2);
      prefetch(row + p.cols + kLarge / 2);
    }
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

  // 3. half the rows at a time: through shared memory, times the derivatives, and written
  using Half = OutHalf;
  const Half::Mine mine(at.col, at.rows, p.cols, thread);
  float gate_total[kOutVec] = {}, value_total[kOutVec] = {};
  with_activation(p, [&](auto act) {
    const int64_t offset = (at.row + mine.row) * wide + mine.col;
    const T* u = static_cast<const T*>(p.u) + offset;
    T* du = static_cast<T*>(p.dv) + offset;
    float gate_bias[kOutVec], value_bias[kOutVec];
    load_bias<T>(gate_bias, p.bias, mine.col, mine.left > 0);
    load_bias<T>(value_bias, p.bias, mine.col + p.cols, mine.left > 0);
    Vec<T, kOutVec> g[kAhead], v[kAhead];
    // Between the stores before and after it: by `load` the compiler would load all rows at once.
    const auto load = [&](int number) {
      const bool inside = Half::row(number) < mine.left;
      g[number % kAhead] = inside ? Vec<T, kOutVec>::load_again(u) : Vec<T, kOutVec>{};
      v[number % kAhead] = inside ? Vec<T, kOutVec>::load_again(u + p.cols) : Vec<T, kOutVec>{};
      u += (Half::row(number + 1) - Half::row(number)) * wide;
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(i);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      __syncthreads();  // nobody reads the stages, or the other half, any more
      Half::put(sums, half, thread);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < Half::kRows; ++i) {
        const int number = half * Half::kRows + i, slot = number % kAhead;
        float dh[kOutVec], of_gate[kOutVec], of_value[kOutVec];
        Half::get(dh, mine, i);
#pragma unroll
        for (int j = 0; j < kOutVec; ++j) {
          const float2 both = act.both(g[slot][j] + gate_bias[j]);
          of_gate[j] = dh[j] * (v[slot][j] + value_bias[j]) * both.y;
          of_value[j] = dh[j] * both.x;
        }
        if (number + kAhead < 2 * Half::kRows) load(number + kAhead);
        if (Half::row(number) < mine.left) {
          Vec<T, kOutVec>::store_whole(du, of_gate);
          Vec<T, kOutVec>::store_whole(du + p.cols, of_value);
          // Here, or the compiler would put the sums off and hold all rows in registers for them.
#pragma unroll
          for (int j = 0; j < kOutVec; ++j) {
            gate_total[j] += of_gate[j];
            value_total[j] += of_value[j];
          }
        }
        du += (Half::row(number + 1) - Half::row(number)) * wide;
      }
    }
  });
  if (!p.partial_dbias) return;

  // 4. the columns' sums
  constexpr int kGates = Half::kBytes, kValues = kGates + OutSums::kBytes;
  OutSums::put(gate_total, mine.chunk, thread, kGates);
  OutSums::put(value_total, mine.chunk, thread, kValues);
  __syncthreads();
  const float of_gate = OutSums::get(thread, kGates), of_value = OutSums::get(thread, kValues);
  if (at.col + thread < p.cols) {
    float* const partial = p.partial_dbias + at.row / kLarge * wide + at.col + thread;
    partial[0] = of_gate;
    partial[p.cols] = of_value;
  }
}

}  // namespace

cudaError_t launch_linear_gated_forward(const LinearGatedForward& call, DType dtype,
                                        Stream stream) {
  Gpu gpu;
  const cudaError_t error = current_gpu(&gpu);
  if (error != cudaSuccess) return error;
  WithSigmoid<LinearGatedForward> p{call, SigmoidGate::of(call.activation)};
  const int wide = 2 * p.cols;
  const int64_t tiles = (int64_t(p.rows - 1) / kLarge + 1) * ((wide - 1) / kLarge + 1);
  return with_half(dtype, [&](auto t) {
    const auto with_tile = [&](auto tile) {
      constexpr int kTile = decltype(tile)::value;
      const dim3 grid = product_grid<kTile>(p.rows, wide, p.group_bits);
      const auto kernel = linear_gated_forward_kernel<decltype(t), kTile>;
      return launch_early(kernel, grid, dim3(kProductThreads), kProductBytes, stream, p);
    };
    // A multiprocessor without a tile would idle. What is written is the same by either.
    return tiles < gpu.multiprocessors ? with_tile(std::integral_constant<int, kLarge / 2>())
                                       : with_tile(std::integral_constant<int, kLarge>());
  });
}

cudaError_t launch_linear_gated_backward(const LinearGatedBackward& call, DType dtype,
                                         Stream stream) {
  WithSigmoid<LinearGatedBackward> p{call, SigmoidGate::of(call.activation)};
  const dim3 grid = product_grid<kLarge>(p.rows, p.cols, p.group_bits);
  return with_half(dtype, [&](auto t) {
    const auto kernel = linear_gated_backward_kernel<decltype(t)>;
    return launch_early(kernel, grid, dim3(kProductThreads), kProductBytes, stream, p);
  });
}

}  // namespace bertfast
