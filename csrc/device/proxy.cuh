// The fence between two ways to shared memory: ordinary accesses, cp.async among them, and what
// bulk copies and wgmma read and write. For compute capability 9.0 on.
#pragma once

#include "device/cuda.cuh"

#ifdef BERTFAST_HOST
#include "host/proxy.h"
#endif

namespace bertfast {

#ifdef BERTFAST_HOST

inline void async_proxy_fence(host::Site site = host::Site::here()) {
  host::proxy::fence(site);
}

#else

// Ordinary accesses of this thread so far come before those that copies and wgmma make once whoever
// starts them knows of this fence, by a barrier that comes after it.
__device__ __forceinline__ void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#endif

}  // namespace bertfast
