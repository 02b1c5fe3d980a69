// Running a grid, with the limits of the hardware.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "host/vector_types.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
};
const char* cudaGetErrorString(cudaError_t error);

namespace bertfast {

// There is one stream, and every launch has finished when it returns.
using Stream = void*;

namespace host {

extern bool dry_launch;
extern uint64_t first_block;           // blocks before it aren't run
extern std::atomic<int64_t> launches;  // since the last reset, dry ones too

cudaError_t check_launch(dim3 grid, dim3 block, int shared_bytes);
void run_grid(dim3 grid, dim3 block, int shared_bytes, bool early, void (*body)(const void*),
              const void* argument);

// A kernel and its parameters, as one argument.
template<class Params>
struct Call {
  void (*kernel)(Params);
  const Params& params;
  static void run(const void* self) {
    const Call& call = *static_cast<const Call*>(self);
    call.kernel(call.params);
  }
};

}  // namespace host

inline int anew(int value) {
  return value;
}
inline float anew(float value) {
  return value;
}

template<class Params>
cudaError_t launch(bool early, void (*kernel)(Params), dim3 grid, dim3 block, int shared_bytes,
                   Stream stream, const Params& params) {
  static_assert(std::is_trivially_copyable<Params>::value && sizeof(Params) <= 4096,
                "a kernel's parameters are copied as bytes, into 4 KB of constant memory");
  (void)stream;
  cudaError_t error = host::check_launch(grid, block, shared_bytes);
  if (error != cudaSuccess) return error;
  ++host::launches;
  if (host::dry_launch) return error;
  host::Call<Params> call{kernel, params};
  host::run_grid(grid, block, shared_bytes, early, &host::Call<Params>::run, &call);
  return cudaSuccess;
}

// Runs kernel(params) to its end. Returns CUDA's error for arguments that CUDA refuses; throws what
// the kernel did wrong.
template<class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, int shared_bytes, Stream stream,
                   const Params& params) {
  return launch(false, kernel, grid, block, shared_bytes, stream, params);
}

// The same of a kernel whose threads begin by await_earlier_kernels().
template<class Params>
cudaError_t launch_early(void (*kernel)(Params), dim3 grid, dim3 block, int shared_bytes,
                         Stream stream, const Params& params) {
  return launch(true, kernel, grid, block, shared_bytes, stream, params);
}

}  // namespace bertfast
