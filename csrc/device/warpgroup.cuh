// Warps with roles of their own, for compute capability 9.0 on: who does what only one thread must,
// barriers of a part of the block, and registers handed from one warpgroup to another.
#pragma once

#include "device/cuda.cuh"

#ifdef BERTFAST_HOST
#include "host/named_barrier.h"
#include "host/registers.h"
#endif

namespace bertfast {

constexpr int kWarpgroup = 128;  // threads

// A value that is the same in all lanes of a warp, which the compiler then knows: what follows from
// it is computed once for the warp, and needs no registers of its lanes. All lanes call it.
__device__ __forceinline__ int warp_uniform(int value) {
  return __shfl_sync(0xffffffffu, value, 0);
}

#ifdef BERTFAST_HOST

inline bool elect_one(host::Site site = host::Site::here()) {
  return host::elect_one(site);
}

inline void named_barrier_sync(int barrier, int threads, host::Site site = host::Site::here()) {
  host::named_barrier::sync(barrier, threads, site);
}

inline void named_barrier_arrive(int barrier, int threads, host::Site site = host::Site::here()) {
  host::named_barrier::arrive(barrier, threads, site);
}

template<int kAtLaunch, int kWanted>
void set_registers(host::Site site = host::Site::here()) {
  host::registers::set(kAtLaunch, kWanted, site);
}

#else

// True in one lane of a warp, the same each time. All lanes call it. The compiler knows that the
// branch is taken by one lane, and so leaves out the code for lanes that part.
__device__ __forceinline__ bool elect_one() {
  int elected;
  asm volatile(
      "{\n"
      ".reg .pred one;\n"
      "elect.sync _|one, 0xffffffff;\n"
      "selp.s32 %0, 1, 0, one;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
}

// Waits until `threads` threads, in whole warps, have come to this barrier (1 to 15).
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Counts among them, and goes on.
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// A warpgroup that was launched with kAtLaunch registers a thread goes on with kWanted, all its
// threads together. More are there once others have given up so many.
template<int kAtLaunch, int kWanted>
__device__ __forceinline__ void set_registers() {
  static_assert(kWanted % 8 == 0 && kWanted >= 24 && kWanted <= 256, "multiples of 8 up to 256");
  if constexpr (kWanted > kAtLaunch) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kWanted));
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kWanted));
  }
}

#endif

}  // namespace bertfast
