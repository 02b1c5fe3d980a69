// Products by a warpgroup, 64 rows by 32, 64, 96 or 128 columns at a time: Hopper's tensor cores,
// sm_90a alone.
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
#include "host/gpu.h"
#include "host/wgmma.h"
#else
#include "device/wgmma_ptx.cuh"
#endif

namespace bertfast {

// Whether kernels may multiply by wgmma. On the CPU that is a setting: host/control.h.
#ifdef BERTFAST_HOST
inline bool has_wgmma() {
  return host::gpu.capability == 90;
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

// The matrix that begins `bytes` further on: one addition, as an address never carries.
__device__ __forceinline__ uint64_t wgmma_further(uint64_t matrix, int bytes) {
  const int low = anew(int(uint32_t(matrix) + (uint32_t(bytes) >> 4)));
  return matrix >> 32 << 32 | uint32_t(low);
}

// From the matrix of one product to that of the next 16 inner indices, in bytes.
template<int kRowBytes, Major kMajor>
inline constexpr int kWgmmaStep = kMajor == Major::kInner ? 32 : 16 * kRowBytes;

#ifdef BERTFAST_HOST

inline void wgmma_fence(host::Site site = host::Site::here()) {
  host::wgmma::fence(site);
}

template<class T, Major kB, int kEights>
void wgmma(float (&d)[kEights][4], const unsigned (&a)[4], uint64_t b, bool accumulate,
           host::Site site = host::Site::here()) {
  host::wgmma::issue({8 * kEights, &d[0][0], a, 0, false, b, kB == Major::kOuter, accumulate,
                      std::is_same_v<T, __nv_bfloat16>, site});
}

template<class T, Major kA, Major kB, int kEights>
void wgmma(float (&d)[kEights][4], uint64_t a, uint64_t b, bool accumulate,
           host::Site site = host::Site::here()) {
  host::wgmma::issue({8 * kEights, &d[0][0], nullptr, a, kA == Major::kOuter, b,
                      kB == Major::kOuter, accumulate, std::is_same_v<T, __nv_bfloat16>, site});
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

// d = a b, or d += a b: 64 x 8 kEights sums in float32, 16 deep. A comes from registers, 16 rows a
// warp.
template<class T, Major kB, int kEights>
__device__ __forceinline__ void wgmma(float (&d)[kEights][4], const unsigned (&a)[4], uint64_t b,
                                      bool accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    BERTFAST_WGMMA_REGISTERS("bf16")
  } else {
    static_assert(std::is_same_v<T, __half>, "operands are half or bfloat16");
    BERTFAST_WGMMA_REGISTERS("f16")
  }
}

// The same with A in shared memory.
template<class T, Major kA, Major kB, int kEights>
__device__ __forceinline__ void wgmma(float (&d)[kEights][4], uint64_t a, uint64_t b,
                                      bool accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    BERTFAST_WGMMA_SHARED("bf16")
  } else {
    static_assert(std::is_same_v<T, __half>, "operands are half or bfloat16");
    BERTFAST_WGMMA_SHARED("f16")
  }
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template<int kLeft>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

#endif

}  // namespace bertfast
