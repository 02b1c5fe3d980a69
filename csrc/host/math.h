// CUDA's maths functions as kernels call them, unqualified.
//
// Exact ones (fmaf, sqrtf, fabsf, ...) are the C library's. The approximate ones are defined in
// namespace bertfast, where a kernel finds them before the C library's of the same name, and may be
// off by CUDA's documented error when perturb is on. The bounds are from the CUDA C++ Programming
// Guide, "Mathematical Functions", in ulp of the correctly rounded result.
#pragma once

#include <math.h>

#include <cmath>

#include "host/perturb.h"

inline unsigned __umulhi(unsigned a, unsigned b) {
  return unsigned((uint64_t(a) * b) >> 32);
}

// The low 32 bits of high:low, shifted right.
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) >> (shift & 31u));
}
// Four of the eight bytes of y:x, each chosen by four bits of the selector.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= unsigned(bytes >> (selector >> (4 * i) & 7u) * 8 & 0xffu) << (8 * i);
  }
  return result;
}
// The number of the lowest bit that is set, from 1 on; 0 if none is.
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}
inline int __clz(int bits) {
  return bits ? __builtin_clz(unsigned(bits)) : 32;
}

// Rounded by itself: the compiler may not make one multiply-add of it and a sum.
inline float __fmul_rn(float x, float y) {
  return x * y;
}

template<class T>
T __ldg(const T* address) {
  return *address;
}

// Of two floats, one of which is NaN, CUDA's min and max give the other, as fminf and fmaxf do.
inline int min(int a, int b) {
  return a < b ? a : b;
}
inline unsigned min(unsigned a, unsigned b) {
  return a < b ? a : b;
}
inline long min(long a, long b) {
  return a < b ? a : b;
}
inline unsigned long min(unsigned long a, unsigned long b) {
  return a < b ? a : b;
}
inline long long min(long long a, long long b) {
  return a < b ? a : b;
}
inline float min(float a, float b) {
  return fminf(a, b);
}
inline int max(int a, int b) {
  return a > b ? a : b;
}
inline unsigned max(unsigned a, unsigned b) {
  return a > b ? a : b;
}
inline long max(long a, long b) {
  return a > b ? a : b;
}
inline unsigned long max(unsigned long a, unsigned long b) {
  return a > b ? a : b;
}
inline long long max(long long a, long long b) {
  return a > b ? a : b;
}
inline float max(float a, float b) {
  return fmaxf(a, b);
}

namespace bertfast {

// Doubles, rounded once, where the C library's float function isn't right to the last bit.
inline float rsqrtf(float x) {
  return host::perturb::ulps(float(1.0 / std::sqrt(double(x))), 2, x);  // 2 ulp
}
inline float erff(float x) {
  return host::perturb::ulps(float(std::erf(double(x))), 2, x);  // 2 ulp
}
inline float tanhf(float x) {
  return host::perturb::ulps(float(std::tanh(double(x))), 2, x);  // 2 ulp
}
inline float exp2f(float x) {
  return host::perturb::ulps(::exp2f(x), 2, x);  // 2 ulp
}
inline float expf(float x) {
  return host::perturb::ulps(::expf(x), 2, x);  // 2 ulp
}
inline float logf(float x) {
  return host::perturb::ulps(::logf(x), 1, x);  // 1 ulp
}
inline float log2f(float x) {
  return host::perturb::ulps(::log2f(x), 1, x);  // 1 ulp
}

inline float __expf(float x) {
  // 2 + floor(|1.173 x|) ulp. Beyond |x| = 128 the result is 0 or infinite, and moves no further.
  return host::perturb::ulps(::expf(x), 2 + int(fminf(fabsf(1.173f * x), 151.0f)), x);
}
inline float __fdividef(float x, float y) {
  // 2 ulp for 2^-126 <= |y| <= 2^126; for larger finite y the result is 0, or NaN if x is infinite.
  if (fabsf(y) > 0x1p126f && !std::isinf(y)) return std::isinf(x) ? NAN : 0.0f * x;
  return host::perturb::ulps(x / y, 2, y);
}

// The names of device/math.cuh; the PTX manual states the errors.
inline float exp2_approx(float x) {
  float result = ::exp2f(x);
  if (result < 0x1p-126f) return 0.0f;
  return host::perturb::ulps(result, 4, x);  // 2^-22 of the result is less than 4 ulp
}
inline float log2_approx(float x) {
  return host::perturb::ulps(::log2f(x), 4, x);
}
inline float reciprocal_approx(float x) {
  return host::perturb::ulps(1.0f / x, 1, x);
}
inline float min_or_nan(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? NAN : fminf(a, b);
}

}  // namespace bertfast

// These two have no namesake in the C library.
using bertfast::__fdividef;
using bertfast::rsqrtf;
