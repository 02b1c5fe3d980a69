// Kernels that come up while the one before them in their stream ends: from compute capability 9.0
// on, where launch_early (device/cuda.cuh) launched them.
//
// Their blocks are set up and wait on the multiprocessors that are free, which hides most of a
// launch. It is free: nothing is read or written before the wait, so nothing else changes.
#pragma once

#include "device/cuda.cuh"

#ifdef BERTFAST_HOST
#include "host/earlier.h"
#endif

namespace bertfast {

#ifdef BERTFAST_HOST

inline void await_earlier_kernels() {
  host::earlier::await();
}

#else

// The first step of each thread of such a kernel: waits until the kernels before it have ended and
// what they wrote can be read. Then lets the next one come up, once all blocks have got here.
__device__ __forceinline__ void await_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#endif

}  // namespace bertfast
