// Tensor cores and asynchronous copies: one wrapper an instruction, for compute capability 8.0 on.
//
// Under nvcc each is the instruction itself; on the host csrc/host/matrix.h, which says how
// fragments lie, and csrc/host/async_copy.h stand in for it.
#pragma once

#include <type_traits>

#include "device/cuda.cuh"

#ifdef BERTFAST_HOST
#include "host/async_copy.h"
#include "host/matrix.h"
#endif

namespace bertfast {

#ifdef BERTFAST_HOST

template<class T>
void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                  host::Site site = host::Site::here()) {
  host::matrix::mma(c, a, b0, b1, std::is_same_v<T, __nv_bfloat16>, site);
}

inline void ldmatrix(unsigned (&fragment)[4], Shared<uint4> rows, int i,
                     host::Site site = host::Site::here()) {
  host::matrix::load(fragment, rows.byte_offset, i, false, site);
}

inline void ldmatrix_trans(unsigned (&fragment)[4], Shared<uint4> rows, int i,
                           host::Site site = host::Site::here()) {
  host::matrix::load(fragment, rows.byte_offset, i, true, site);
}

inline void stmatrix(Shared<uint4> rows, int i, const unsigned (&fragment)[4],
                     host::Site site = host::Site::here()) {
  host::matrix::store(fragment, rows.byte_offset, i, site);
}

template<class V>
void cp_async(Shared<V> to, int i, const V* from, bool inside,
              host::Site site = host::Site::here()) {
  const int byte = host::shared_memory::begin_copy(to.byte_offset, i, sizeof(V), site);
  if (inside && reinterpret_cast<uintptr_t>(from) % sizeof(V) != 0) {
    throw std::runtime_error("misaligned source of cp_async at " + host::to_string(site));
  }
  host::async_copy::issue(byte, sizeof(V), inside ? from : nullptr, site);
}

inline void prefetch(const void*) {}

inline void cp_async_commit() {
  host::async_copy::commit();
}

template<int kLeft>
void cp_async_wait() {
  host::async_copy::wait(kLeft);
}

#else

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// c += a b, with 16-bit operands (T says which) and float32 sums.
template<class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                             unsigned b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, __half>, "operands are half or bfloat16");
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Four 8 x 8 matrices. Lane l says where row l % 8 of matrix l / 8 is: element i of `rows`.
__device__ __forceinline__ void ldmatrix(unsigned (&fragment)[4], Shared<uint4> rows, int i) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(rows.ptr + i))
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_trans(unsigned (&fragment)[4], Shared<uint4> rows, int i) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(rows.ptr + i))
               : "memory");
}

// The way back, for compute capability 9.0 on.
__device__ __forceinline__ void stmatrix(Shared<uint4> rows, int i, const unsigned (&fragment)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(rows.ptr + i)),
               "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
               : "memory");
}

// Starts copying one V (4, 8 or 16 bytes) to element i; zeros unless `inside`, and then `from`
// isn't read. 16 bytes pass by the first-level cache, as nobody else reads a tile in time.
template<class V>
__device__ __forceinline__ void cp_async(Shared<V> to, int i, const V* from, bool inside) {
  const int size = inside ? sizeof(V) : 0;
  if constexpr (sizeof(V) == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to.ptr + i)),
                 "l"(__cvta_generic_to_global(from)), "r"(size)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to.ptr + i)),
                 "l"(__cvta_generic_to_global(from)), "n"(sizeof(V)), "r"(size)
                 : "memory");
  }
}

// Brings the line at an address, which must be the kernel's to read, to the second-level cache.
__device__ __forceinline__ void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(from)));
}

// Closes a group of copies.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for this thread's groups but the last kLeft. Others see the copies after a barrier.
template<int kLeft>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

#endif

}  // namespace bertfast
