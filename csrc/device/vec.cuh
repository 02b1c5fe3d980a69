// Vectors of elements: one wide memory access, then floats.
#pragma once

#include <type_traits>

#include "device/cuda.cuh"

namespace bertfast {

template<int kBytes>
struct Raw;
template<>
struct Raw<2> {
  using type = unsigned short;
};
template<>
struct Raw<4> {
  using type = unsigned int;
};
template<>
struct Raw<8> {
  using type = uint2;
};
template<>
struct Raw<16> {
  using type = uint4;
};

__device__ __forceinline__ float to_float(float value) {
  return value;
}
__device__ __forceinline__ float to_float(__half value) {
  return __half2float(value);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

template<class T>
__device__ __forceinline__ T from_float(float value);
template<>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template<>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template<>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Two at a time: the hardware rounds and packs a pair in one instruction.
__device__ __forceinline__ void store_pair(float* to, float a, float b) {
  to[0] = a;
  to[1] = b;
}
__device__ __forceinline__ void store_pair(__half* to, float a, float b) {
  *reinterpret_cast<__half2*>(to) = __floats2half2_rn(a, b);
}
__device__ __forceinline__ void store_pair(__nv_bfloat16* to, float a, float b) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(a, b);
}

// kCount elements of type T, kCount * sizeof(T) bytes aligned, moved by one instruction.
template<class T, int kCount>
struct Vec {
  using Bits = typename Raw<kCount * sizeof(T)>::type;
  Bits bits;

  // Through the read-only path: no store of the kernel may touch what it loads, so the compiler is
  // free to issue all loads before the first store.
  static __device__ __forceinline__ Vec load(const T* from) {
    return {__ldg(vector_at<const Bits>(from))};
  }

  // Not kept in registers from one store of the kernel to the next.
  static __device__ __forceinline__ Vec load_again(const T* from) {
    return {*vector_at<const Bits>(from)};
  }

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (std::is_same_v<T, __nv_bfloat16> && kCount > 1) {
      // A bfloat16 is the upper half of its float: one shift or one mask.
      const unsigned word = reinterpret_cast<const unsigned*>(&bits)[i / 2];
      return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
    } else {
      return to_float(reinterpret_cast<const T*>(&bits)[i]);
    }
  }

  // Makes the compiler convert the elements anew after this point, instead of keeping them as
  // floats in registers from before.
  __device__ __forceinline__ void forget() {
#ifndef BERTFAST_HOST
    if constexpr (sizeof(Bits) == 16) {
      asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
    } else if constexpr (sizeof(Bits) == 8) {
      asm volatile("" : "+r"(bits.x), "+r"(bits.y));
    } else if constexpr (sizeof(Bits) == 4) {
      asm volatile("" : "+r"(bits));
    } else {
      asm volatile("" : "+h"(bits));
    }
#endif
  }

  static __device__ __forceinline__ void store(T* to, const float* values) {
    *vector_at<Bits>(to) = rounded(values);
  }

  // Where a kernel stores to two places by turns, the compiler, which can't tell them apart, would
  // split `store` into words.
  static __device__ __forceinline__ void store_whole(T* to, const float* values) {
#ifdef BERTFAST_HOST
    store(to, values);
#else
    __stwb(vector_at<Bits>(to), rounded(values));
#endif
  }

 private:
  static __device__ __forceinline__ Bits rounded(const float* values) {
    Vec vec;
    T* element = reinterpret_cast<T*>(&vec.bits);
    if constexpr (kCount == 1) {
      element[0] = from_float<T>(values[0]);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i += 2) store_pair(element + i, values[i], values[i + 1]);
    }
    return vec.bits;
  }
};

// float32 vectors of 8 would be 32 bytes: kernels take 16 bytes of the wider of their types.
template<class T>
inline constexpr int kVecOf = 16 / sizeof(T);

inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

}  // namespace bertfast
