// Accesses where there is nothing to access. Each kernel has the fault unless `repaired`.
#include <cstdio>

#include "cases.h"
#include "device/vec.cuh"
#include "guarded.h"

namespace bertfast {
namespace host_runtime_test {
namespace {

struct Params {
  const float* in;
  float* out;
  int size;
  bool repaired;
};

constexpr int kThreads = 64;

__global__ void shared_store(Params params) {
  Shared<float> values = shared_memory<float>(0);
  int t = int(threadIdx.x);
  values.store(params.repaired ? t : t + 1, 1.0f);  // shared_store
  __syncthreads();
  params.out[t] = values.load(t > 0 ? t : 1);
}

__global__ void shared_load(Params params) {
  Shared<float> values = shared_memory<float>(0);
  int t = int(threadIdx.x);
  values.store(t, 1.0f);
  __syncthreads();
  params.out[t] = values.load(params.repaired ? t : t - 1);  // shared_load
}

// Inside of the memory, and yet no address that a 16-byte access may have.
__global__ void misaligned_view(Params params) {
  Shared<float4> values = shared_memory<float4>(params.repaired ? 16 : 8);  // misaligned_view
  int t = int(threadIdx.x);
  if (t < 8) values.store(t, make_float4(1.0f, 2.0f, 3.0f, 4.0f));
  __syncthreads();
  params.out[t] = values.load(t % 8).w;
}

// Reads an element of shared memory that nobody has written.
__global__ void shared_unwritten(Params params) {
  Shared<float> values = shared_memory<float>(0);
  int t = int(threadIdx.x);
  if (params.repaired || t != 9) values.store(t, 1.0f);
  __syncthreads();
  params.out[t] = values.load(kThreads - 1 - t);
}

__global__ void global_store(Params params) {
  int t = int(threadIdx.x);
  if (params.repaired && t >= params.size) return;
  params.out[t] = 1.0f;
}

// A sum over a window that reaches one element too far.
__global__ void global_load(Params params) {
  int t = int(threadIdx.x);
  int end = params.repaired ? min(t + 2, params.size) : t + 2;
  float sum = 0.0f;
  for (int i = t; i < end; ++i) sum += params.in[i];
  params.out[t] = sum;
}

// Vectors that begin at an element that no vector may begin at.
__global__ void misaligned_vector_load(Params params) {
  const int t = int(threadIdx.x);
  const Vec<float, 2> pair = Vec<float, 2>::load(params.in + (params.repaired ? 0 : 1));
  params.out[t] = pair[0] + 1.f - pair[0];
}

__global__ void misaligned_vector_store(Params params) {
  const int t = int(threadIdx.x);
  const float ones[2] = {1.f, 1.f};
  if (t < 32) Vec<float, 2>::store(params.out + 2 * t + (params.repaired ? 0 : -1), ones);
}

__global__ void unwritten_output(Params params) {
  int t = int(threadIdx.x);
  if (params.repaired || t != 17) params.out[t] = 1.0f;
}

// `size` elements of input and output.
template<void (*kKernel)(Params), int kSize>
void run(const Arguments& arguments) {
  Guarded<float> in(kSize), out(kSize);
  for (int i = 0; i < kSize; ++i) in.data()[i] = float(i);
  Params params{in.data(), out.data(), kSize, arguments.at(0) == "repaired"};
  require(launch(kKernel, 1, kThreads, kThreads * 4, nullptr, params));
  in.check_zones();
  out.check_zones();
  out.check_written();
  for (int i = 0; i < kSize; ++i) std::printf("%g ", double(out.data()[i]));
}

#define CASE(kernel, size) Case kernel##_case(#kernel, &run<kernel, size>)
CASE(shared_store, 64);
CASE(shared_load, 64);
CASE(misaligned_view, 64);
CASE(shared_unwritten, 64);
CASE(global_store, 63);
CASE(global_load, 64);
CASE(unwritten_output, 64);
CASE(misaligned_vector_load, 64);
CASE(misaligned_vector_store, 64);

}  // namespace
}  // namespace host_runtime_test
}  // namespace bertfast
