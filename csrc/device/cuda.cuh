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

// The T's that start `byte_offset` into the block's dynamic shared memory.
template<class T>
__device__ __forceinline__ Shared<T> shared_memory(int byte_offset) {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
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

#ifdef __CUDACC__  // the bindings, plain C++, include this header too

// Launches kernel(params). Returns the launch's error, which the caller must look at.
template<class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, int shared_bytes, Stream stream,
                   const Params& params) {
  if (shared_bytes > 48 * 1024) {
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

#endif

}  // namespace bertfast

#endif
