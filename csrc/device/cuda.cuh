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

// Prepares a kernel for launches on the current device, once. It may have all the shared memory
// that a block may ask for: a lower limit set later would hold for launches that a graph captured
// before. early: whether it can be launched early, as its code was compiled for 9.0 or later and so
// waits, and the driver can capture such launches, which those before CUDA 12.3 can't.
inline cudaError_t prepare(const void* kernel, bool* early) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, bool> prepared;
  int device = 0, most = 0, driver = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = prepared.find({kernel, device});
  if (found != prepared.end()) {
    *early = found->second;
    return cudaSuccess;
  }
  cudaFuncAttributes own{};
  error = cudaFuncGetAttributes(&own, kernel);
  if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) {
    most -= int(own.sharedSizeBytes);  // what the kernel has besides
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  if (error != cudaSuccess) return error;
  *early = own.ptxVersion >= 90 && driver >= 12030;
  prepared[{kernel, device}] = *early;
  return cudaSuccess;
}

template<class Params>
cudaError_t launch(bool early, void (*kernel)(Params), dim3 grid, dim3 block, int shared_bytes,
                   Stream stream, const Params& params) {
  const void* const handle = reinterpret_cast<const void*>(kernel);
  bool can_be_early = false;
  cudaError_t error = prepare(handle, &can_be_early);
  if (error == cudaSuccess) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = size_t(shared_bytes);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = early && can_be_early ? 1 : 0;
    void* arguments[] = {const_cast<Params*>(&params)};
    error = cudaLaunchKernelExC(&config, handle, arguments);
  }
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// Launches kernel(params). Returns the launch's error, which the caller must look at; no later call
// is told of it again.
template<class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, int shared_bytes, Stream stream,
                   const Params& params) {
  return launch(false, kernel, grid, block, shared_bytes, stream, params);
}

// The same of a kernel whose threads begin by await_earlier_kernels() (device/earlier.cuh): where
// the GPU can, it comes up while the one before it in the stream ends.
template<class Params>
cudaError_t launch_early(void (*kernel)(Params), dim3 grid, dim3 block, int shared_bytes,
                         Stream stream, const Params& params) {
  return launch(true, kernel, grid, block, shared_bytes, stream, params);
}

#endif

}  // namespace bertfast

#endif
