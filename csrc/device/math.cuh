// Single instructions that CUDA C++ has no function for, or only a slower one, and pairs of 16-bit
// values.
//
// For the host build csrc/host/math.h defines the same names, off by the errors given here where
// the perturb mode is on.
#pragma once

#include <type_traits>

#include "device/cuda.cuh"

namespace bertfast {

inline constexpr float kLog2E = 1.4426950408889634f;

}  // namespace bertfast

#ifndef BERTFAST_HOST

namespace bertfast {

// 2^x with a relative error of up to 2^-22; what would be subnormal is 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The binary logarithm; for x from 1 on off by at most 2^-22 times itself or one.
__device__ __forceinline__ float log2_approx(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 1 / x to 1 ulp, for x of ordinary size.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The smaller one; NaN if either is, where fminf gives the other.
__device__ __forceinline__ float min_or_nan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

}  // namespace bertfast

#endif

namespace bertfast {

// Two floats rounded to T, the first in the low half.
template<class T>
__device__ __forceinline__ unsigned pack(float low, float high) {
  unsigned bits;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    bits = reinterpret_cast<const unsigned&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    bits = reinterpret_cast<const unsigned&>(pair);
  }
  return bits;
}

}  // namespace bertfast
