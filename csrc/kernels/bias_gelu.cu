// y = gelu(v), v = x + bias; dx = dy * gelu'(v), dbias = sum of dx over rows. Rows have `cols`
// columns. device/gelu.cuh has the maths.
//
// Saved for the backward: x and bias, nothing else. device/columns.cuh says how rows are split over
// threads; a thread takes kVec columns.
//
// Forward: kRows rows a thread, all loaded before the first is used. Moves 2 values an element
// (x; y). Backward: 3 (x, dy; dx). `chains` threads walk down the rows side by side, kRows rows at
// a time; each sums its columns in registers and writes one float32 row of partial sums, and
// launch_column_sum adds those in a fixed order. No atomics: the same bits each run. dx is always
// written: a branch around its store would make a loop of 23 instructions an element one of 33.
#include <type_traits>

#include "device/columns.cuh"
#include "device/earlier.cuh"
#include "device/gelu.cuh"
#include "device/types.cuh"
#include "device/vec.cuh"
#include "params.h"

namespace bertfast {
namespace {

// Rows of a thread that are under way together: 64 bytes of loads, of x alone and of x and dy.
constexpr int kForwardRows = 4;
constexpr int kBackwardRows = 2;
// Blocks on a multiprocessor. They leave 48 registers (40 of float32) and 64, which is enough; but
// not told so the compiler goes for fewer, and then loads the forward's later rows only when the
// first is done, and spills in some forms of the backward.
template<class T>
constexpr int kForwardBlocks = sizeof(T) == 4 ? 6 : 5;
constexpr int kBackwardBlocks = 4;

template<class X, class T, int kVec, int kRows, bool kTanh, bool kBias>
__global__ void __launch_bounds__(kColumnThreads, kForwardBlocks<T>)
    bias_gelu_forward_kernel(BiasGeluForward p) {
  await_earlier_kernels();
  using XVec = Vec<X, kVec>;
  const Place place(kVec, p.tiles);
  const int64_t first = place.row * kRows;
  if (place.col >= unsigned(p.cols) || first >= p.rows) return;
  const int last = p.rows - first < kRows ? int(p.rows - first) - 1 : kRows - 1;

  // 1. all loads; beyond the last row it again, since a branch for each row would keep them apart
  const X* x = static_cast<const X*>(p.x) + first * p.x_row_stride + place.col;
  XVec x_bits[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    x_bits[i] = XVec::load(x);
    if (i < last) x += p.x_row_stride;
  }
  float bias[kVec];
  if constexpr (kBias) load_bias<T>(bias, p.bias, place.col);

  // 2. gelu, row by row
  T* y = static_cast<T*>(p.y) + first * p.cols + place.col;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    float out[kVec];
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      out[k] = Gelu<kTanh, sizeof(T) == 4>::value(kBias ? x_bits[i][k] + bias[k] : x_bits[i][k]);
    }
    if (i <= last) Vec<T, kVec>::store(y, out);
    y += p.cols;
  }
}

template<class X, class T, int kVec, int kRows, bool kTanh>
__global__ void __launch_bounds__(kColumnThreads, kBackwardBlocks)
    bias_gelu_backward_kernel(BiasGeluBackward p) {
  await_earlier_kernels();
  using XVec = Vec<X, kVec>;
  using TVec = Vec<T, kVec>;
  const Place place(kVec, p.tiles);
  if (place.col >= unsigned(p.cols) || place.row >= p.chains) return;
  float bias[kVec], dbias[kVec] = {};
  load_bias<T>(bias, p.bias, place.col);

  const auto take = [&](int64_t first, auto count) {
    constexpr int kCount = decltype(count)::value;
    // 1. all loads
    const T* dy = static_cast<const T*>(p.dy) + first * p.dy_row_stride + place.col;
    const X* x = static_cast<const X*>(p.x) + first * p.x_row_stride + place.col;
    TVec dy_bits[kCount];
    XVec x_bits[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      dy_bits[i] = TVec::load(dy);
      x_bits[i] = XVec::load(x);
      dy += p.dy_row_stride;
      x += p.x_row_stride;
    }

    // 2. dx, and its share of the bias's gradient
    X* dx = static_cast<X*>(p.dx) + first * p.cols + place.col;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float out[kVec];
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        const float v = x_bits[i][k] + bias[k];
        out[k] = dy_bits[i][k] * Gelu<kTanh, sizeof(T) == 4>::derivative(v);
        dbias[k] += out[k];
      }
      XVec::store(dx, out);
      dx += p.cols;
    }
  };
  const int64_t stride = int64_t(p.chains) * kRows;
  int64_t first = place.row * kRows;
#pragma unroll 1
  for (; first + kRows <= p.rows; first += stride) {
    take(first, std::integral_constant<int, kRows>());
  }
#pragma unroll 1
  for (const int64_t end = min(first + kRows, int64_t(p.rows)); first < end; ++first) {
    take(first, std::integral_constant<int, 1>());  // the rows at the end
  }

  // 3. one row of partial sums
  if (p.partial_dbias) {
    constexpr int kWide = kVec < 4 ? kVec : 4;
    float* partial = p.partial_dbias + place.row * p.cols + place.col;
#pragma unroll
    for (int k = 0; k < kVec; k += kWide) Vec<float, kWide>::store(partial + k, dbias + k);
  }
}

// use(X(), T(), columns of a vector, the form): kVec columns where 16-byte accesses are possible,
// else 1.
template<class Use>
cudaError_t with_kernel(DType x_dtype, DType dtype, bool tanh, bool aligned, Use use) {
  return with_types(x_dtype, dtype, [&](auto x, auto t) {
    return with_flag(tanh, [&](auto form) {
      using T = decltype(t);
      return aligned ? use(x, t, std::integral_constant<int, kVecOf<T>>(), form)
                     : use(x, t, std::integral_constant<int, 1>(), form);
    });
  });
}

}  // namespace

cudaError_t launch_bias_gelu_forward(BiasGeluForward p, bool tanh, DType x_dtype, DType dtype,
                                     Stream stream) {
  const bool aligned = are_vectors(dtype, {p.cols, p.x_row_stride}) && is_aligned(p.x) &&
                       is_aligned(p.bias) && is_aligned(p.y);
  return with_kernel(x_dtype, dtype, tanh, aligned, [&](auto x, auto t, auto vec, auto form) {
    constexpr int kVec = decltype(vec)::value;
    constexpr bool kTanh = decltype(form)::value;
    Blocks blocks;
    if (!split(p.cols, kVec, (p.rows - 1) / kForwardRows + 1, blocks)) {
      return cudaErrorInvalidConfiguration;
    }
    p.tiles = blocks.tiles;
    return with_flag(p.bias, [&](auto biased) {
      using X = decltype(x);
      using T = decltype(t);
      constexpr bool kBias = decltype(biased)::value;
      if constexpr (!kBias && !std::is_same_v<X, T>) {
        return cudaErrorInvalidValue;  // it is the bias that makes y wider than x
      } else {
        const auto kernel = bias_gelu_forward_kernel<X, T, kVec, kForwardRows, kTanh, kBias>;
        return launch_early(kernel, blocks.grid, blocks.block, 0, stream, p);
      }
    });
  });
}

cudaError_t launch_bias_gelu_backward(BiasGeluBackward p, bool tanh, DType x_dtype, DType dtype,
                                      Stream stream) {
  const bool aligned = are_vectors(dtype, {p.cols, p.dy_row_stride, p.x_row_stride}) &&
                       is_aligned(p.dy) && is_aligned(p.x) && is_aligned(p.bias) &&
                       is_aligned(p.dx);
  return with_kernel(x_dtype, dtype, tanh, aligned, [&](auto x, auto t, auto vec, auto form) {
    constexpr int kVec = decltype(vec)::value;
    constexpr bool kTanh = decltype(form)::value;
    Blocks blocks;
    if (!split(p.cols, kVec, p.chains, blocks)) return cudaErrorInvalidConfiguration;
    p.tiles = blocks.tiles;
    const auto kernel =
        bias_gelu_backward_kernel<decltype(x), decltype(t), kVec, kBackwardRows, kTanh>;
    return launch_early(kernel, blocks.grid, blocks.block, 0, stream, p);
  });
}

}  // namespace bertfast
