// What csrc/device/cuda.cuh takes of CUDA's runtime, for a plain C++ compiler. Nothing is launched;
// calls are counted, and fail when they are told to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __shared__
#define __align__(bytes)

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchOutOfResources };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
using cudaStream_t = void*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int ptxVersion, maxThreadsPerBlock;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

struct Fake {
  std::mutex mutex;
  std::map<std::pair<const void*, int>, std::vector<int>> limits;  // each that was set
  std::vector<size_t> launched;                                    // shared bytes
  int early = 0;                                                   // of these
  std::map<const void*, cudaFuncAttributes> kernels;               // those of another kind
  int driver = 13000;
  cudaError_t limit_error = cudaSuccess, launch_error = cudaSuccess, last = cudaSuccess;
  static constexpr int kMost = 227 * 1024, kStatic = 1024;
};
inline Fake fake;
inline thread_local int current_device = 0;

inline cudaError_t remembered(cudaError_t error) {
  if (error != cudaSuccess) fake.last = error;
  return error;
}

inline cudaError_t cudaGetLastError() {
  return std::exchange(fake.last, cudaSuccess);
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = Fake::kMost;
  return cudaSuccess;
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = fake.driver;
  return cudaSuccess;
}

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  const auto found = fake.kernels.find(kernel);
  const cudaFuncAttributes usual = {Fake::kStatic, 90, 1024};
  *attributes = found == fake.kernels.end() ? usual : found->second;
  return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  std::lock_guard<std::mutex> lock(fake.mutex);
  if (fake.limit_error == cudaSuccess) fake.limits[{kernel, current_device}].push_back(bytes);
  return remembered(fake.limit_error);
}

inline cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  std::lock_guard<std::mutex> lock(fake.mutex);
  if (fake.launch_error == cudaSuccess) {
    fake.launched.push_back(config->dynamicSmemBytes);
    fake.early += config->numAttrs;
  }
  return remembered(fake.launch_error);
}
