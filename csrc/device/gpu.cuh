// What a launch has to know of the current device to choose a kernel.
#pragma once

#include "device/cuda.cuh"

#ifdef BERTFAST_HOST
#include "host/gpu.h"
#endif

namespace bertfast {

#ifdef BERTFAST_HOST

using host::Gpu;

inline cudaError_t current_gpu(Gpu* gpu) {
  *gpu = host::gpu;
  return cudaSuccess;
}

#else

struct Gpu {
  int capability;  // 90 for 9.0
  int multiprocessors;
  int shared_memory;  // bytes, of a multiprocessor
};

#ifdef __CUDACC__

// A device is asked once.
inline cudaError_t current_gpu(Gpu* gpu) {
  static std::mutex mutex;
  static std::map<int, Gpu> known;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) {
    *gpu = found->second;
    return cudaSuccess;
  }
  int major = 0, minor = 0;
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&minor, cudaDevAttrComputeCapabilityMinor);
  ask(&gpu->multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(&gpu->shared_memory, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  gpu->capability = 10 * major + minor;
  if (error == cudaSuccess) known[device] = *gpu;
  return error;
}

#endif
#endif

}  // namespace bertfast
