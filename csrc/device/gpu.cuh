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

template<class Params>
bool has_code(void (*)(Params), int) {
  return true;
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

// Whether the module has code of a kernel for the current device: of one that is empty, and may
// have fewer threads, where it is compiled for others. A kernel and device are asked once.
template<class Params>
bool has_code(void (*kernel)(Params), int threads) {
  static std::mutex mutex;
  static std::map<std::pair<void (*)(Params), int>, bool> known;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({kernel, device});
  if (error == cudaSuccess && found != known.end()) return found->second;
  cudaFuncAttributes attributes{};
  if (error == cudaSuccess) {
    error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // no later call is told of it
    return false;
  }
  return known[{kernel, device}] = attributes.maxThreadsPerBlock >= threads;
}

#endif
#endif

}  // namespace bertfast
