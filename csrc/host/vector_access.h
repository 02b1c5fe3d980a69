// Accesses to global memory by whole vectors, which a GPU makes at multiples of their size alone.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "host/scheduler.h"

namespace bertfast {

// See device/cuda.cuh. The last parameter, never written in a kernel, is the line of the access.
template<class V, class T>
V* vector_at(T* element, host::Site site = host::Site::here()) {
  if (reinterpret_cast<uintptr_t>(element) % sizeof(V) != 0) {
    throw std::runtime_error("misaligned access to global memory at " + host::to_string(site) +
                             " by " + host::thread_name(host::current_thread()) + ": " +
                             std::to_string(sizeof(V)) + " bytes must begin at a multiple of that");
  }
  return reinterpret_cast<V*>(element);
}

}  // namespace bertfast
