// __half and __nv_bfloat16: storage and conversions, bit for bit as CUDA's.
//
// Conversions from float round to nearest even; every NaN becomes 0x7fff. Arithmetic is left out on
// purpose: kernels compute in float.
#pragma once

#include <cstdint>
#include <cstring>

#include "host/vector_types.h"

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline unsigned short __half_as_ushort(__half value) {
  return value.bits;
}
inline __half __ushort_as_half(unsigned short bits) {
  return {bits};
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) {
  return value.bits;
}
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  return {bits};
}

inline __half __float2half_rn(float value) {
  unsigned bits = __float_as_uint(value);
  unsigned sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {0x7fff};
  // From 2^16 up. Below, down to halfway from the largest half, the rounding carries to infinity.
  if (bits >= 0x47800000u) return {uint16_t(sign | 0x7c00u)};
  if (bits < 0x38800000u) {
    // Below 2^-14 the result is subnormal, a multiple of 2^-24. That is the last place of floats in
    // [0.5, 1), so this sum rounds there, and leaves the multiple in its low bits.
    unsigned sum = __float_as_uint(__uint_as_float(bits) + 0.5f);
    return {uint16_t(sign | (sum - __float_as_uint(0.5f)))};
  }
  // Adding half a unit of the new last place, less one if that place is even, and cutting off. A
  // carry runs into the exponent, which is what it should do.
  bits += 0xfffu + ((bits >> 13) & 1u);
  // The exponent's bias goes from 127 to 15.
  return {uint16_t(sign | ((bits >> 13) - ((127u - 15u) << 10)))};
}

inline float __half2float(__half value) {
  unsigned sign = (value.bits & 0x8000u) << 16;
  unsigned magnitude = value.bits & 0x7fffu;
  if (magnitude > 0x7c00u) return __uint_as_float(0x7fffffffu);
  if (magnitude == 0x7c00u) return __uint_as_float(sign | 0x7f800000u);
  if (magnitude < 0x0400u) {
    // Subnormal: a multiple of 2^-24.
    float exact = float(magnitude) * 0x1p-24f;
    return __uint_as_float(sign | __float_as_uint(exact));
  }
  return __uint_as_float(sign | ((magnitude << 13) + ((127u - 15u) << 23)));
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return {uint16_t(bits >> 16)};
}

inline float __bfloat162float(__nv_bfloat16 value) {
  return __uint_as_float(unsigned(value.bits) << 16);
}

inline __half __float2half(float value) {
  return __float2half_rn(value);
}
inline __nv_bfloat16 __float2bfloat16(float value) {
  return __float2bfloat16_rn(value);
}

// Pairs, which the GPU converts in one instruction. The first argument lands in the low half.
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline float2 __half22float2(__half2 pair) {
  return {__half2float(pair.x), __half2float(pair.y)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 pair) {
  return {__bfloat162float(pair.x), __bfloat162float(pair.y)};
}
