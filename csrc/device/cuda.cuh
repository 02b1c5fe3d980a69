// What a kernel source includes first: CUDA itself, or its stand-in for a CPU.
//
// Kernels are written against this header alone. Under nvcc it is a thin layer over the toolkit;
// for the host build csrc/host/cuda.h defines the same names (see there for how blocks and threads
// run).
#pragma once

#include <cstdint>

#ifdef BERTFAST_HOST

#include "host/cuda.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <map>
#include <mutex>
#include <set>
#include <utility>

namespace bertfast {

using Stream = cudaStream_t;

// A view of the block's dynamic shared memory. All accesses go through it: on the host it records
// who touched what between two barriers, here it is a pointer.
template<class T>
struct Shared {
  T* ptr;
  __device__ T load(int i) const { return ptr[i]; }
  __device__ void store(int i, T value) const { ptr[i] = value; }
};

// The T's that start `byte_offset` into the block's dynamic shared memory, which begins where the
// longest pattern of a swizzle does: the hardware tells rows by their address.
template<class T>
__device__ __forceinline__ Shared<T> shared_memory(int byte_offset) {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return {reinterpret_cast<T*>(dynamic_shared_memory + byte_offset)};
}

// The same value, of which the compiler doesn't know that it is the same in each turn of a loop: so
// what follows from it is computed in the loop, and keeps no registers over the whole of it.
__device__ __forceinline__ int anew(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
__device__ __forceinline__ float anew(float value) {
  asm volatile("" : "+f"(value));
  return value;
}

// The vector V that begins at an element, as one access. It must begin at a multiple of its size.
template<class V, class T>
__device__ __forceinline__ V* vector_at(T* element) {
  return reinterpret_cast<V*>(element);
}

#ifdef __CUDACC__  // the bindings, plain C++, include this header too

// Lets a kernel have all the shared memory that a block of the current device may ask for. Once for
// a kernel and device: a lower limit set later would hold for launches that a graph captured
// before.
inline cudaError_t allow_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return cudaSuccess;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  cudaFuncAttributes own;
  error = cudaFuncGetAttributes(&own, kernel);
  if (error != cudaSuccess) return error;
  most -= int(own.sharedSizeBytes);  // what the kernel has besides
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess) allowed.insert({kernel, device});
  return error;
}

// Launches kernel(params). Returns the launch's error, which the caller must look at; no later call
// is told of it again.
template<class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, int shared_bytes, Stream stream,
                   const Params& params) {
  const void* const handle = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) error = allow_shared_memory(handle);
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = size_t(shared_bytes);
    config.stream = stream;
    void* arguments[] = {const_cast<Params*>(&params)};
    error = cudaLaunchKernelExC(&config, handle, arguments);
  }
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

#endif

}  // namespace bertfast

#endif
