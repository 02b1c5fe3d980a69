// Products by a warpgroup, 64 rows at a time: Hopper's tensor cores, sm_90a alone.
//
// Sums lie in each warp as those of mma_m16n8k16: warp w has rows from 16 w, d[n] columns from 8 n.
// So does A where it comes from registers. Else A and B are read from shared memory, from dense
// rows of 64 or 128 bytes, swizzled as Tile<32> and Tile<64> are. With Major::kInner a row there
// has consecutive inner indices of one row of A or column of B; with Major::kOuter it belongs to
// one inner index, and has consecutive rows of A or columns of B.
//
// The order of a group of products:
//   wgmma_fence()      after the last access to registers that take part
//   wgmma<...>(...)    as often as there are products
//   wgmma_commit()     closes the group
//   wgmma_wait<n>()    until only the last n groups are under way. Before that nobody may touch the
//                      sums, or the registers of A, or write what is read in shared memory.
// All 128 threads do each of these. What lies in shared memory must be known to all of them, and
// unless bulk copies brought it, its writers need an async_proxy_fence.
#pragma once

#include "device/mma.cuh"
#include "device/proxy.cuh"

#ifdef BERTFAST_HOST
#include "host/wgmma.h"
#endif

namespace bertfast {

// Whether kernels may multiply by wgmma. On the CPU it is a setting: host/control.h.
#ifdef BERTFAST_HOST
inline bool has_wgmma() {
  return host::wgmma::available;
}
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
__device__ constexpr bool has_wgmma() {
  return true;
}
#else
__device__ constexpr bool has_wgmma() {
  return false;
}
#endif

enum class Major { kInner = 0, kOuter = 1 };

// A matrix in shared memory, from byte `byte` of dense rows of kRowBytes. With Major::kOuter a slab
// has kRowBytes / 2 rows of A or columns of B; slab_bytes: from one to the next, if there are more.
template<int kRowBytes>
__device__ __forceinline__ uint64_t wgmma_matrix(Shared<uint4> rows, int byte, int slab_bytes = 0) {
  static_assert(kRowBytes == 64 || kRowBytes == 128, "the swizzles of Tile<32> and Tile<64>");
#ifdef BERTFAST_HOST
  const unsigned address = unsigned(rows.byte_offset + byte);
#else
  const unsigned address = shared_address(rows.ptr) + unsigned(byte);
#endif
  constexpr uint64_t kSwizzle = kRowBytes == 128 ? 1 : 2;
  constexpr uint64_t kEightRows = 8 * kRowBytes;
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(slab_bytes >> 4) << 16 |
         kEightRows >> 4 << 32 | kSwizzle << 62;
}

// From the matrix of one product to that of the next 16 inner indices, in bytes.
template<int kRowBytes, Major kMajor>
inline constexpr int kWgmmaStep = kMajor == Major::kInner ? 32 : 16 * kRowBytes;

#ifdef BERTFAST_HOST

inline void wgmma_fence(host::Site site = host::Site::here()) {
  host::wgmma::fence(site);
}

template<class T, Major kB>
void wgmma(float (&d)[8][4], const unsigned (&a)[4], uint64_t b, bool accumulate,
           host::Site site = host::Site::here()) {
  host::wgmma::issue({&d[0][0], a, 0, false, b, kB == Major::kOuter, accumulate,
                      std::is_same_v<T, __nv_bfloat16>, site});
}

template<class T, Major kA, Major kB>
void wgmma(float (&d)[8][4], uint64_t a, uint64_t b, bool accumulate,
           host::Site site = host::Site::here()) {
  host::wgmma::issue({&d[0][0], nullptr, a, kA == Major::kOuter, b, kB == Major::kOuter, accumulate,
                      std::is_same_v<T, __nv_bfloat16>, site});
}

inline void wgmma_commit(host::Site site = host::Site::here()) {
  host::wgmma::commit(site);
}

template<int kLeft>
void wgmma_wait(host::Site site = host::Site::here()) {
  host::wgmma::wait(kLeft, site);
}

#else

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// The 32 sums of a thread, as operands 0 to 31.
#define BERTFAST_SUMS                                                                     \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18," \
  " %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#define BERTFAST_FOUR(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define BERTFAST_ALL_SUMS                                                                   \
  BERTFAST_FOUR(0), BERTFAST_FOUR(1), BERTFAST_FOUR(2), BERTFAST_FOUR(3), BERTFAST_FOUR(4), \
      BERTFAST_FOUR(5), BERTFAST_FOUR(6), BERTFAST_FOUR(7)

#define BERTFAST_WGMMA_REGISTERS(type)                                              \
  asm volatile(                                                                     \
      "{\n"                                                                         \
      ".reg .pred p;\n"                                                             \
      "setp.ne.b32 p, %37, 0;\n"                                                    \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " BERTFAST_SUMS \
      "{%32, %33, %34, %35}, %36, p, 1, 1, %38;\n"                                  \
      "}"                                                                           \
      : BERTFAST_ALL_SUMS                                                           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kB)))

#define BERTFAST_WGMMA_SHARED(type)                                                 \
  asm volatile(                                                                     \
      "{\n"                                                                         \
      ".reg .pred p;\n"                                                             \
      "setp.ne.b32 p, %34, 0;\n"                                                    \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " BERTFAST_SUMS \
      "%32, %33, p, 1, 1, %35, %36;\n"                                              \
      "}"                                                                           \
      : BERTFAST_ALL_SUMS                                                           \
      : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kA)), "n"(int(kB)))

// d = a b, or d += a b: 64 x 64 sums in float32, 16 deep. A comes from registers, 16 rows a warp.
template<class T, Major kB>
__device__ __forceinline__ void wgmma(float (&d)[8][4], const unsigned (&a)[4], uint64_t b,
                                      bool accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    BERTFAST_WGMMA_REGISTERS("bf16");
  } else {
    static_assert(std::is_same_v<T, __half>, "operands are half or bfloat16");
    BERTFAST_WGMMA_REGISTERS("f16");
  }
}

// The same with A in shared memory.
template<class T, Major kA, Major kB>
__device__ __forceinline__ void wgmma(float (&d)[8][4], uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    BERTFAST_WGMMA_SHARED("bf16");
  } else {
    static_assert(std::is_same_v<T, __half>, "operands are half or bfloat16");
    BERTFAST_WGMMA_SHARED("f16");
  }
}

#undef BERTFAST_SUMS
#undef BERTFAST_FOUR
#undef BERTFAST_ALL_SUMS
#undef BERTFAST_WGMMA_REGISTERS
#undef BERTFAST_WGMMA_SHARED

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template<int kLeft>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

#endif

}  // namespace bertfast
