// GELU and its derivative, exact (by the normal distribution function) or by tanh.
//
// With z = min(|v|, limit):
//   exact   gelu(v) = max(v, 0) - z * exp2(p(z))      gelu'(-z) = exp2(-z^2 log2(e) / 2) * m(z)
//   tanh    gelu(v) = max(v, 0) - z * s,  s = w / (1 + w),  w = exp2(-2 log2(e) u(z))
//                                                     gelu'(-z) = s - s / (1 + w) * z * 2 u'(z)
// with the polynomials p and m of gelu_coefficients.cuh and u(z) = sqrt(2 / pi) * (z + 0.044715
// z^3). Where both are wanted of one v, the exact slope is made of the value's exponential,
// gelu'(-z) = exp2(p(z)) - z * phi(z): less than a second polynomial. For v > 0 gelu'(v) = 1 -
// gelu'(-v). At the limit exp2 gives 0 and z stays finite, so that
// an infinite v gives the limits: Inf and 0, slopes 1 and 0. A NaN stays one.
#pragma once

#include "device/gelu_coefficients.cuh"
#include "device/math.cuh"

namespace bertfast {

inline constexpr float kBellPeak = 0.3989422804014327f;  // 1 / sqrt(2 pi)
inline constexpr float kTanh1 = 0.7978845608028654f;     // sqrt(2 / pi)
inline constexpr float kTanh3 = kTanh1 * 0.044715f;

// kTanh: the tanh form. kWide: to float32's precision, not only to that of a 16-bit result.
template<bool kTanh, bool kWide>
struct Gelu {
  static __device__ __forceinline__ float value(float v) {
    const float z = min_or_nan(fabsf(v), kGeluLimit);
    float share;
    if constexpr (kTanh) {
      const float w = below(z);
      share = w * reciprocal_approx(1.f + w);
    } else {
      share = upper_tail(z);
    }
    return fmaf(-z, share, fmaxf(v, 0.f));
  }

  static __device__ __forceinline__ float derivative(float v) {
    const float z = min_or_nan(fabsf(v), kGeluLimit);
    float slope;  // at -z
    if constexpr (kTanh) {
      const float w = below(z);
      const float above = reciprocal_approx(1.f + w);
      slope = slope_of_tanh(z, w * above, above);
    } else {
      slope = bell(z) * (kWide ? gelu_backward_32(z) : gelu_backward_16(z));
    }
    return v > 0.f ? 1.f - slope : slope;
  }

  // (gelu(v), gelu'(v))
  static __device__ __forceinline__ float2 both(float v) {
    const float z = min_or_nan(fabsf(v), kGeluLimit);
    float share, slope;
    if constexpr (kTanh) {
      const float w = below(z);
      const float above = reciprocal_approx(1.f + w);
      share = w * above;
      slope = slope_of_tanh(z, share, above);
    } else {
      share = upper_tail(z);
      slope = fmaf(z * -kBellPeak, bell(z), share);
    }
    return make_float2(fmaf(-z, share, fmaxf(v, 0.f)), v > 0.f ? 1.f - slope : slope);
  }

 private:
  static __device__ __forceinline__ float upper_tail(float z) {
    return exp2_approx(kWide ? gelu_forward_32(z) : gelu_forward_16(z));
  }

  static __device__ __forceinline__ float bell(float z) {
    return exp2_approx(z * z * (-0.5f * kLog2E));
  }

  static __device__ __forceinline__ float slope_of_tanh(float z, float share, float above) {
    return fmaf(-share * above, z * fmaf(z * z, 6.f * kTanh3, 2.f * kTanh1), share);
  }

  // w, between 0 and 1.
  static __device__ __forceinline__ float below(float z) {
    return exp2_approx(z * fmaf(z * z, -2.f * kLog2E * kTanh3, -2.f * kLog2E * kTanh1));
  }
};

}  // namespace bertfast
