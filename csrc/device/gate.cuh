// The activations of a gated op: value and slope, to the precision of a result of type T.
#pragma once

#include <type_traits>

#include "device/gelu.cuh"
#include "device/silu.cuh"
#include "params.h"

namespace bertfast {

template<Activation kForm, class T>
using Gate = std::conditional_t<kForm == Activation::kSilu, Silu,
                                Gelu<kForm == Activation::kGeluTanh, sizeof(T) == 4>>;

// Both activations that are v times a sigmoid, of 2 (k1 v + k3 v^3), as one code whose numbers are
// told at run time, with the bits of the two that are compiled for one: GELU by tanh, and SiLU,
// which has k1 = 1 / 2 and k3 = 0.
struct SigmoidGate {
  float limit;  // of |v|
  float log1, log3;
  float slope1, slope3;

  static SigmoidGate of(Activation form) {
    const bool silu = form == Activation::kSilu;
    const float k1 = silu ? 0.5f : kTanh1, k3 = silu ? 0.f : kTanh3;
    const float limit = silu ? kSiluLimit : kGeluLimit;
    return {limit, -2.f * kLog2E * k1, -2.f * kLog2E * k3, 2.f * k1, 6.f * k3};
  }

  __device__ __forceinline__ float value(float v) const {
    const float z = min_or_nan(fabsf(v), limit);
    const float w = below(z);
    return fmaf(-z, w * reciprocal_approx(1.f + w), fmaxf(v, 0.f));
  }

  // (act(v), act'(v))
  __device__ __forceinline__ float2 both(float v) const {
    const float z = min_or_nan(fabsf(v), limit);
    const float w = below(z);
    const float above = reciprocal_approx(1.f + w);
    const float share = w * above;
    const float slope = fmaf(-share * above, z * fmaf(z * z, slope3, slope1), share);  // at -z
    return make_float2(fmaf(-z, share, fmaxf(v, 0.f)), v > 0.f ? 1.f - slope : slope);
  }

 private:
  __device__ __forceinline__ float below(float z) const {
    return exp2_approx(z * fmaf(z * z, log3, log1));
  }
};

}  // namespace bertfast
