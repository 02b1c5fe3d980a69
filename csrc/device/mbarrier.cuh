// Barriers in shared memory, for compute capability 9.0 on: threads and copies arrive, threads
// wait.
//
// A barrier is in one of its phases 0, 1, 2, ... A phase ends when as many threads have arrived as
// mbarrier_init said and all bytes have come that they said to expect. mbarrier_wait(parity) waits
// for the end of the phase of that parity which is under way, and returns at once where the phase
// under way is of the other parity: of a new barrier, parity 1 has ended. So whoever waits must be
// less than two phases behind.
//
// An arrival makes what its thread did known to all who wait for the phase; a bulk copy's bytes are
// known to nobody else.
#pragma once

#include "device/mma.cuh"

#ifdef BERTFAST_HOST
#include "host/mbarrier.h"
#endif

namespace bertfast {

using Mbarriers = Shared<uint64_t>;  // in shared memory, one after the other

#ifdef BERTFAST_HOST

inline void mbarrier_init(Mbarriers barriers, int i, int arrivals,
                          host::Site site = host::Site::here()) {
  host::mbarrier::init(barriers.byte_offset + 8 * i, arrivals, site);
}

inline void mbarrier_init_fence(host::Site site = host::Site::here()) {
  host::mbarrier::init_fence(site);
}

inline void mbarrier_arrive(Mbarriers barriers, int i, host::Site site = host::Site::here()) {
  host::mbarrier::arrive(barriers.byte_offset + 8 * i, 0, site);
}

inline void mbarrier_arrive_expecting(Mbarriers barriers, int i, int bytes,
                                      host::Site site = host::Site::here()) {
  host::mbarrier::arrive(barriers.byte_offset + 8 * i, bytes, site);
}

inline void mbarrier_wait(Mbarriers barriers, int i, int parity,
                          host::Site site = host::Site::here()) {
  host::mbarrier::wait(barriers.byte_offset + 8 * i, parity, site);
}

#else

// One thread makes a barrier that `arrivals` threads will arrive at.
__device__ __forceinline__ void mbarrier_init(Mbarriers barriers, int i, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barriers.ptr + i)),
               "r"(arrivals)
               : "memory");
}

// Lets copies know of the barriers that this thread has made. Other threads know of them after a
// __syncthreads.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(Mbarriers barriers, int i) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barriers.ptr + i))
               : "memory");
}

// Arrives, and adds to the bytes that have to come in this phase.
__device__ __forceinline__ void mbarrier_arrive_expecting(Mbarriers barriers, int i, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barriers.ptr + i)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void mbarrier_wait(Mbarriers barriers, int i, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra again_%=;\n"
      "}" ::"r"(shared_address(barriers.ptr + i)),
      "r"(parity)
      : "memory");
}

#endif

}  // namespace bertfast
