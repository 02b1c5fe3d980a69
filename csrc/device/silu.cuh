// SiLU, v times its sigmoid, and its derivative.
//
// With z = min(|v|, limit), w = exp2(-z log2(e)) and r = 1 / (1 + w), so that s = w r is the
// sigmoid at -z and r the one at z:
//   silu(v) = max(v, 0) - z * s        silu'(-z) = s - s r z       silu'(v) = 1 - silu'(-v)
// No exponential is larger than 1, so nothing overflows; and what is subtracted is at most half of
// what it is subtracted from, but where the slope itself crosses zero. At the limit w is 0 and z
// stays finite, so that an infinite v gives the limits: Inf and 0, slopes 1 and 0. A NaN stays one.
#pragma once

#include "device/math.cuh"

namespace bertfast {

inline constexpr float kSiluLimit = 128.f;  // e^-128 is 0 in float32

struct Silu {
  static __device__ __forceinline__ float value(float v) { return both(v).x; }

  // (silu(v), silu'(v))
  static __device__ __forceinline__ float2 both(float v) {
    const float z = min_or_nan(fabsf(v), kSiluLimit);
    const float w = exp2_approx(z * -kLog2E);
    const float r = reciprocal_approx(1.f + w);
    const float s = w * r;
    const float slope = fmaf(-s * r, z, s);  // at -z
    return make_float2(fmaf(-z, s, fmaxf(v, 0.f)), v > 0.f ? 1.f - slope : slope);
  }
};

}  // namespace bertfast
