// The wrappers of device/mma.cuh. Matrices come as raw bytes on stdin, results go to stdout.
#include "device/mma.cuh"

#include <cstdio>

#include "cases.h"
#include "guarded.h"
#include "host/control.h"

namespace bertfast {
namespace host_runtime_test {
namespace {

// What each lane has in its registers: of A, B and C of one product.
struct MmaParams {
  const unsigned* a;  // (32, 4)
  const unsigned* b;  // (32, 2)
  float* c;           // (32, 4), replaced by the result
};

template<class T>
__global__ void mma(MmaParams params) {
  const int lane = int(threadIdx.x);
  unsigned a[4];
  float c[4];
  for (int i = 0; i < 4; ++i) a[i] = params.a[4 * lane + i];
  for (int i = 0; i < 4; ++i) c[i] = params.c[4 * lane + i];
  mma_m16n8k16<T>(c, a, params.b[2 * lane], params.b[2 * lane + 1]);
  for (int i = 0; i < 4; ++i) params.c[4 * lane + i] = c[i];
}

// PERTURB SEED, and on stdin the lanes' registers of A, B and C, product after product.
template<class T>
void run_mma(const Arguments& arguments) {
  host::set_perturb(arguments.at(0) == "1", std::stoull(arguments.at(1)));
  Guarded<unsigned> a(128), b(64);
  Guarded<float> c(128);
  while (std::fread(a.data(), 4, 128, stdin) == 128 && std::fread(b.data(), 4, 64, stdin) == 64 &&
         std::fread(c.data(), 4, 128, stdin) == 128) {
    require(launch(mma<T>, 1, 32, 0, nullptr, MmaParams{a.data(), b.data(), c.data()}));
    std::fwrite(c.data(), 4, 128, stdout);
  }
}

Case mma_half("mma_half", &run_mma<__half>);
Case mma_bfloat16("mma_bfloat16", &run_mma<__nv_bfloat16>);

// Rows of 16 bytes, in shared memory in the order of `place`, and what ldmatrix makes of them.
struct LoadParams {
  const uint4* rows;  // 32
  const int* place;   // of the row that lane l points at
  unsigned* out;      // (32, 4)
  bool transposed;
};

__global__ void load_matrices(LoadParams params) {
  const int lane = int(threadIdx.x);
  const Shared<uint4> rows = shared_memory<uint4>(16);
  rows.store(params.place[lane], params.rows[lane]);
  __syncwarp();
  unsigned fragment[4];
  if (params.transposed) {
    ldmatrix_trans(fragment, rows, params.place[lane]);
  } else {
    ldmatrix(fragment, rows, params.place[lane]);
  }
  for (int i = 0; i < 4; ++i) params.out[4 * lane + i] = fragment[i];
}

// TRANSPOSED PLACE..., and the rows on stdin.
Case load_case("ldmatrix", [](const Arguments& arguments) {
  Guarded<uint4> rows(32);
  Guarded<int> place(32);
  Guarded<unsigned> out(128);
  if (std::fread(rows.data(), 16, 32, stdin) != 32) throw std::runtime_error("32 rows, please");
  for (int i = 0; i < 32; ++i) place.data()[i] = std::stoi(arguments.at(size_t(1 + i)));
  const LoadParams params{rows.data(), place.data(), out.data(), arguments.at(0) == "1"};
  require(launch(load_matrices, 1, 32, 16 + 64 * 16, nullptr, params));
  out.check_written();
  std::fwrite(out.data(), 4, 128, stdout);
});

// The faults: each kernel has its own unless `repaired`.
struct Params {
  const float4* in;
  float* out;
  bool repaired;
};

// A row is read that another lane has just written.
__global__ void matrix_without_syncwarp(Params params) {
  const int lane = int(threadIdx.x);
  const Shared<uint4> rows = shared_memory<uint4>(0);
  rows.store(lane, make_uint4(1, 2, 3, 4));  // matrix_without_syncwarp: store
  if (params.repaired) __syncwarp();
  unsigned fragment[4];
  ldmatrix(fragment, rows, lane);  // matrix_without_syncwarp: load
  params.out[lane] = float(fragment[0]);
}

// A row is overwritten that other lanes have just read.
__global__ void store_without_syncwarp(Params params) {
  const int lane = int(threadIdx.x);
  const Shared<uint4> rows = shared_memory<uint4>(0);
  rows.store(lane, make_uint4(1, 2, 3, 4));
  __syncwarp();
  unsigned fragment[4];
  ldmatrix(fragment, rows, lane);  // store_without_syncwarp: load
  params.out[lane] = float(fragment[0]);
  if (params.repaired) __syncwarp();
  stmatrix(rows, lane ^ 1, fragment);  // store_without_syncwarp: store
}

__global__ void half_a_warp(Params params) {
  unsigned fragment[4] = {};
  float c[4] = {};
  if (params.repaired || threadIdx.x < 16) mma_m16n8k16<__half>(c, fragment, 0, 0);
  params.out[threadIdx.x] = c[0];
}

constexpr int kThreads = 64;

// Reads its own copy before waiting for it.
__global__ void copy_without_wait(Params params) {
  const int t = int(threadIdx.x);
  const Shared<float4> values = shared_memory<float4>(0);
  cp_async(values, t, params.in + t, true);  // copy_without_wait: copy
  cp_async_commit();
  if (params.repaired) cp_async_wait<0>();
  const float4 value = values.load(t);  // copy_without_wait: load
  cp_async_wait<0>();
  params.out[t] = value.y;
}

// The wait leaves one group, and it is the one that is read.
__global__ void wait_for_the_wrong_group(Params params) {
  const int t = int(threadIdx.x);
  const Shared<float4> values = shared_memory<float4>(0);
  cp_async(values, kThreads + t, params.in, true);
  cp_async_commit();
  cp_async(values, t, params.in + t, true);  // wait_for_the_wrong_group: copy
  cp_async_commit();
  if (params.repaired) {
    cp_async_wait<0>();
  } else {
    cp_async_wait<1>();
  }
  const float4 value = values.load(t);  // wait_for_the_wrong_group: load
  cp_async_wait<0>();
  params.out[t] = value.y;
}

// A copy that no commit has put into a group.
__global__ void copy_without_commit(Params params) {
  const int t = int(threadIdx.x);
  const Shared<float4> values = shared_memory<float4>(0);
  cp_async(values, t, params.in + t, true);  // copy_without_commit: copy
  if (params.repaired) cp_async_commit();
  cp_async_wait<0>();
  params.out[t] = values.load(t).y;  // copy_without_commit: load
  cp_async_commit();
  cp_async_wait<0>();
}

// A thread has waited, but only for its own copies.
__global__ void copy_without_barrier(Params params) {
  const int t = int(threadIdx.x);
  const Shared<float4> values = shared_memory<float4>(0);
  cp_async(values, t, params.in + t, true);  // copy_without_barrier: copy
  cp_async_commit();
  cp_async_wait<0>();
  if (params.repaired) __syncthreads();
  params.out[t] = values.load(t ^ 1).y;  // copy_without_barrier: load
}

// The next copy begins while others may still read what it overwrites.
__global__ void copy_over_a_reader(Params params) {
  const int t = int(threadIdx.x);
  const Shared<float4> values = shared_memory<float4>(0);
  values.store(t, params.in[t]);
  __syncthreads();
  params.out[t] = values.load(t ^ 1).y;  // copy_over_a_reader: load
  if (params.repaired) __syncthreads();
  cp_async(values, t, params.in, true);  // copy_over_a_reader: copy
  cp_async_commit();
  cp_async_wait<0>();
}

__global__ void return_before_a_copy_lands(Params params) {
  const int t = int(threadIdx.x);
  cp_async(shared_memory<float4>(0), t, params.in + t, true);  // return_before_a_copy_lands: copy
  cp_async_commit();
  if (params.repaired) cp_async_wait<0>();
  params.out[t] = 1.f;
}

template<void (*kKernel)(Params), int kThreadsOfCase>
void run(const Arguments& arguments) {
  Guarded<float4> in(kThreads);
  Guarded<float> out(kThreadsOfCase);
  for (int i = 0; i < kThreads; ++i) in.data()[i] = make_float4(-1.f, float(i), -1.f, -1.f);
  const Params params{in.data(), out.data(), arguments.at(0) == "repaired"};
  require(launch(kKernel, 1, kThreadsOfCase, 2 * kThreads * 16, nullptr, params));
  in.check_zones();
  out.check_zones();
  out.check_written();
  for (int i = 0; i < kThreadsOfCase; ++i) std::printf("%g ", double(out.data()[i]));
}

#define CASE(kernel, threads) Case kernel##_case(#kernel, &run<kernel, threads>)
CASE(matrix_without_syncwarp, 32);
CASE(store_without_syncwarp, 32);
CASE(half_a_warp, 32);
CASE(copy_without_wait, kThreads);
CASE(wait_for_the_wrong_group, kThreads);
CASE(copy_without_commit, kThreads);
CASE(copy_without_barrier, kThreads);
CASE(copy_over_a_reader, kThreads);
CASE(return_before_a_copy_lands, kThreads);

// Copies of 4, 8 and 16 bytes; odd threads copy nothing, and their source isn't there to be read.
struct SizesParams {
  const float4* in;
  float4* out;
};

__global__ void copy_sizes(SizesParams params) {
  const int t = int(threadIdx.x);
  const Shared<float4> quads = shared_memory<float4>(0);
  const Shared<float2> pairs = shared_memory<float2>(kThreads * 16);
  const Shared<float> singles = shared_memory<float>(kThreads * 24);
  const bool inside = t % 2 == 0;
  const float4* from = inside ? params.in + t : nullptr;
  cp_async(quads, t, from, inside);
  cp_async(pairs, t, reinterpret_cast<const float2*>(from), inside);
  cp_async(singles, t, reinterpret_cast<const float*>(from), inside);
  cp_async_commit();
  cp_async_wait<0>();
  const float4 quad = quads.load(t);
  const float2 pair = pairs.load(t);
  params.out[t] = make_float4(quad.w, pair.x, pair.y, singles.load(t));
}

Case sizes_case("copy_sizes", [](const Arguments&) {
  Guarded<float4> in(kThreads), out(kThreads);
  for (int i = 0; i < kThreads; ++i) {
    in.data()[i] = make_float4(float(4 * i), float(4 * i + 1), float(4 * i + 2), float(4 * i + 3));
  }
  require(
      launch(copy_sizes, 1, kThreads, kThreads * 28, nullptr, SizesParams{in.data(), out.data()}));
  for (int i = 0; i < kThreads; ++i) {
    const float4 value = out.data()[i];
    std::printf("%g %g %g %g ", double(value.x), double(value.y), double(value.z), double(value.w));
  }
});

}  // namespace
}  // namespace host_runtime_test
}  // namespace bertfast
