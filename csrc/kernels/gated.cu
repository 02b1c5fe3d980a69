// y = act(u) * v, u and v the halves of x + bias, in either order; with a = act(u), du = dy * v *
// act'(u) and dv = dy * a, which are the halves of dx; dbias = sum of dx over rows. y and each half
// have `cols` columns. device/gelu.cuh and device/silu.cuh have the maths.
//
// Saved for the backward: x and bias, nothing else. device/columns.cuh says how rows are split over
// threads; a thread takes the same kVec columns of both halves, which are read and written where
// they are.
//
// Forward: kRows rows a thread, all loaded before the first is used. Moves 3 values an element of y
// (u, v; y). Backward: 5 (dy, u, v; du, dv). `chains` threads walk down the rows side by side,
// kRows rows at a time. With a bias each sums its columns in registers and writes one float32 row
// of partial sums, and launch_column_sum adds those in a fixed order. No atomics: the same bits
// each run. dx is always written, and with a bias so are the sums, if there is a place for them.
#include <type_traits>

#include "device/columns.cuh"
#include "device/earlier.cuh"
#include "device/gate.cuh"
#include "device/types.cuh"
#include "device/vec.cuh"
#include "params.h"

namespace bertfast {
namespace {

// Rows of a thread that are under way together: 64 bytes of loads, or 96.
constexpr int kForwardRows = 2;
constexpr int kBackwardRows = 2;
// Blocks on a multiprocessor, which leaves 64 registers, or 128 with the biases and sums of two
// halves: enough, but not told so the compiler goes for fewer, in some forms, and spills.
constexpr int kBackwardBlocks = 4;
constexpr int kBiasedBackwardBlocks = 2;

template<class T, Activation kForm, int kVec, int kRows, bool kBias>
__global__ void __launch_bounds__(kColumnThreads) gated_forward_kernel(GatedForward p) {
  await_earlier_kernels();
  using TVec = Vec<T, kVec>;
  const Place place(kVec, p.tiles);
  const int64_t first = place.row * kRows;
  if (place.col >= unsigned(p.cols) || first >= p.rows) return;
  const int last = p.rows - first < kRows ? int(p.rows - first) - 1 : kRows - 1;

  // 1. all loads; beyond the last row it again, since a branch for each row would keep them apart
  const T* x = static_cast<const T*>(p.x) + first * p.x_row_stride + place.col;
  TVec u_bits[kRows], v_bits[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    u_bits[i] = TVec::load(x + p.activated);
    v_bits[i] = TVec::load(x + p.gate);
    if (i < last) x += p.x_row_stride;
  }
  float u_bias[kVec], v_bias[kVec];
  if constexpr (kBias) {
    load_bias<T>(u_bias, static_cast<const T*>(p.bias) + p.activated, place.col);
    load_bias<T>(v_bias, static_cast<const T*>(p.bias) + p.gate, place.col);
  }

  // 2. y, row by row
  T* y = static_cast<T*>(p.y) + first * p.cols + place.col;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    float out[kVec];
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      const float u = kBias ? u_bits[i][k] + u_bias[k] : u_bits[i][k];
      const float v = kBias ? v_bits[i][k] + v_bias[k] : v_bits[i][k];
      out[k] = Gate<kForm, T>::value(u) * v;
    }
    if (i <= last) TVec::store(y, out);
    y += p.cols;
  }
}

template<class T, Activation kForm, int kVec, int kRows, bool kBias>
__global__ void __launch_bounds__(kColumnThreads, kBias ? kBiasedBackwardBlocks : kBackwardBlocks)
    gated_backward_kernel(GatedBackward p) {
  await_earlier_kernels();
  using TVec = Vec<T, kVec>;
  const Place place(kVec, p.tiles);
  if (place.col >= unsigned(p.cols) || place.row >= p.chains) return;
  float u_bias[kVec], v_bias[kVec], du_sum[kVec] = {}, dv_sum[kVec] = {};
  if constexpr (kBias) {
    load_bias<T>(u_bias, static_cast<const T*>(p.bias) + p.activated, place.col);
    load_bias<T>(v_bias, static_cast<const T*>(p.bias) + p.gate, place.col);
  }

  const auto take = [&](int64_t first, auto count) {
    constexpr int kCount = decltype(count)::value;
    // 1. all loads
    const T* dy = static_cast<const T*>(p.dy) + first * p.dy_row_stride + place.col;
    const T* x = static_cast<const T*>(p.x) + first * p.x_row_stride + place.col;
    TVec dy_bits[kCount], u_bits[kCount], v_bits[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      dy_bits[i] = TVec::load(dy);
      u_bits[i] = TVec::load(x + p.activated);
      v_bits[i] = TVec::load(x + p.gate);
      dy += p.dy_row_stride;
      x += p.x_row_stride;
    }

    // 2. both halves of dx, and their shares of the bias's gradient
    T* dx = static_cast<T*>(p.dx) + 2 * first * p.cols + place.col;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      float du[kVec], dv[kVec];
#pragma unroll
      for (int k = 0; k < kVec; ++k) {
        const float u = kBias ? u_bits[i][k] + u_bias[k] : u_bits[i][k];
        const float v = kBias ? v_bits[i][k] + v_bias[k] : v_bits[i][k];
        const float2 act = Gate<kForm, T>::both(u);
        du[k] = dy_bits[i][k] * v * act.y;
        dv[k] = dy_bits[i][k] * act.x;
        if constexpr (kBias) {
          du_sum[k] += du[k];
          dv_sum[k] += dv[k];
        }
      }
      TVec::store_whole(dx + p.activated, du);
      TVec::store_whole(dx + p.gate, dv);
      dx += 2 * int64_t(p.cols);
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
  if constexpr (kBias) {
    if (p.partial_dbias) {
      constexpr int kWide = kVec < 4 ? kVec : 4;
      float* partial = p.partial_dbias + 2 * place.row * p.cols + place.col;
#pragma unroll
      for (int k = 0; k < kVec; k += kWide) {
        Vec<float, kWide>::store_whole(partial + p.activated + k, du_sum + k);
        Vec<float, kWide>::store_whole(partial + p.gate + k, dv_sum + k);
      }
    }
  }
}

template<class Use>
cudaError_t with_activation(Activation activation, Use use) {
  switch (activation) {
    case Activation::kGelu:
      return use(std::integral_constant<Activation, Activation::kGelu>());
    case Activation::kGeluTanh:
      return use(std::integral_constant<Activation, Activation::kGeluTanh>());
    case Activation::kSilu:
      return use(std::integral_constant<Activation, Activation::kSilu>());
  }
  return cudaErrorInvalidValue;
}

// use(T(), the activation, columns of a vector, whether there is a bias), the last three as types.
template<class Use>
cudaError_t with_kernel(DType dtype, Activation activation, bool aligned, bool bias, Use use) {
  return with_type(dtype, [&](auto t) {
    return with_activation(activation, [&](auto form) {
      return with_flag(bias, [&](auto biased) {
        using T = decltype(t);
        return aligned ? use(t, form, std::integral_constant<int, kVecOf<T>>(), biased)
                       : use(t, form, std::integral_constant<int, 1>(), biased);
      });
    });
  });
}

}  // namespace

cudaError_t launch_gated_forward(GatedForward p, Activation activation, DType dtype,
                                 Stream stream) {
  const bool aligned = are_vectors(dtype, {p.cols, p.x_row_stride}) && is_aligned(p.x) &&
                       is_aligned(p.bias) && is_aligned(p.y);
  return with_kernel(
      dtype, activation, aligned, p.bias, [&](auto t, auto form, auto vec, auto biased) {
        constexpr int kVec = decltype(vec)::value;
        Blocks blocks;
        if (!split(p.cols, kVec, (p.rows - 1) / kForwardRows + 1, blocks)) {
          return cudaErrorInvalidConfiguration;
        }
        p.tiles = blocks.tiles;
        const auto kernel = gated_forward_kernel<decltype(t), decltype(form)::value, kVec,
                                                 kForwardRows, decltype(biased)::value>;
        return launch_early(kernel, blocks.grid, blocks.block, 0, stream, p);
      });
}

cudaError_t launch_gated_backward(GatedBackward p, Activation activation, DType dtype,
                                  Stream stream) {
  const bool aligned = are_vectors(dtype, {p.cols, p.dy_row_stride, p.x_row_stride}) &&
                       is_aligned(p.dy) && is_aligned(p.x) && is_aligned(p.bias) &&
                       is_aligned(p.dx);
  return with_kernel(
      dtype, activation, aligned, p.bias, [&](auto t, auto form, auto vec, auto biased) {
        constexpr int kVec = decltype(vec)::value;
        Blocks blocks;
        if (!split(p.cols, kVec, p.chains, blocks)) return cudaErrorInvalidConfiguration;
        p.tiles = blocks.tiles;
        const auto kernel = gated_backward_kernel<decltype(t), decltype(form)::value, kVec,
                                                  kBackwardRows, decltype(biased)::value>;
        return launch_early(kernel, blocks.grid, blocks.block, 0, stream, p);
      });
}

}  // namespace bertfast
