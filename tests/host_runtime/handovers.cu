// Ordinary accesses ordered by something else than a barrier of all: an mbarrier, a named barrier.
// Each kernel has the fault unless kRepaired.
#include <cstdio>

#include "cases.h"
#include "device/mbarrier.cuh"
#include "device/warpgroup.cuh"

namespace bertfast {
namespace host_runtime_test {
namespace {

struct Params {
  int* out;
};

constexpr int kThreads = 64, kBarrier = 256, kSharedBytes = 256 + 16;

__device__ Mbarriers make_barriers(int arrivals) {
  const Mbarriers barriers = shared_memory<uint64_t>(kBarrier);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) mbarrier_init(barriers, i, arrivals);
  }
  __syncthreads();
  return barriers;
}

// The first warp hands 32 values to the second. Parity 1 has ended before anything was written.
template<bool kRepaired>
__global__ void through_an_mbarrier(Params params) {
  const Mbarriers barriers = make_barriers(32);
  const Shared<int> values = shared_memory<int>(0);
  const int t = int(threadIdx.x);
  if (t < 32) {
    values.store(t, t * t);  // through_an_mbarrier: store
    mbarrier_arrive(barriers, 0);
  } else {
    mbarrier_wait(barriers, 0, kRepaired ? 0 : 1);
    params.out[t - 32] = values.load(63 - t);  // through_an_mbarrier: load
  }
}

// And the second warp hands the place back, which the first fills again.
template<bool kRepaired>
__global__ void back_again(Params params) {
  const Mbarriers barriers = make_barriers(32);
  const Shared<int> values = shared_memory<int>(0);
  const int t = int(threadIdx.x);
  if (t < 32) {
    values.store(t, t * t);
    mbarrier_arrive(barriers, 0);
    if (kRepaired) mbarrier_wait(barriers, 1, 0);
    values.store(t, -t);  // back_again: store
  } else {
    mbarrier_wait(barriers, 0, 0);
    params.out[t - 32] = values.load(63 - t);  // back_again: load
    mbarrier_arrive(barriers, 1);
  }
}

// One lane waits, and tells its warp.
template<bool kRepaired>
__global__ void by_one_lane(Params params) {
  const Mbarriers barriers = make_barriers(32);
  const Shared<int> values = shared_memory<int>(0);
  const int t = int(threadIdx.x);
  if (t < 32) {
    values.store(t, t * t);  // by_one_lane: store
    mbarrier_arrive(barriers, 0);
  } else {
    if (t == 32) mbarrier_wait(barriers, 0, 0);
    if (kRepaired) {
      __syncwarp();
    } else {
      __shfl_sync(0xffffffffu, t, 0);
    }
    params.out[t - 32] = values.load(63 - t);  // by_one_lane: load
  }
}

// Who arrives only knows nothing of the others.
template<bool kRepaired>
__global__ void through_a_named_barrier(Params params) {
  const Shared<int> values = shared_memory<int>(0);
  const int t = int(threadIdx.x);
  const bool gives = t < 32;
  if (gives) values.store(t, t * t);  // through_a_named_barrier: store
  if (gives == kRepaired) {
    named_barrier_arrive(3, 64);
  } else {
    named_barrier_sync(3, 64);
  }
  if (!gives) params.out[t - 32] = values.load(63 - t);  // through_a_named_barrier: load
}

// Readers of both warps, one of them ordered before the store: the other one counts all the same.
template<bool kRepaired>
__global__ void one_reader_of_two(Params params) {
  const Mbarriers barriers = make_barriers(kRepaired ? 2 : 1);
  const Shared<int> values = shared_memory<int>(0);
  const int t = int(threadIdx.x);
  if (t == 5) values.store(0, 7);
  __syncthreads();
  if (t == 40) {
    mbarrier_wait(barriers, 0, 0);
    values.store(0, 8);  // one_reader_of_two: store
  } else if (t == 33 || t == 3) {
    params.out[t == 3] = values.load(0);  // one_reader_of_two: load
    if (kRepaired || t == 33) mbarrier_arrive(barriers, 0);
  }
}

using Kernel = void (*)(Params);

template<Kernel kFaulty, Kernel kRepaired, int kOut>
void run(const Arguments& arguments) {
  std::vector<int> out(kOut, -1);
  const Kernel kernel = arguments.at(0) == "repaired" ? kRepaired : kFaulty;
  require(launch(kernel, 1, kThreads, kSharedBytes, nullptr, Params{out.data()}));
  for (int value : out) std::printf("%d ", value);
}

#define CASE(kernel, out) Case kernel##_case(#kernel, &run<kernel<false>, kernel<true>, out>)
CASE(through_an_mbarrier, 32);
CASE(back_again, 32);
CASE(by_one_lane, 32);
CASE(through_a_named_barrier, 32);
CASE(one_reader_of_two, 2);

}  // namespace
}  // namespace host_runtime_test
}  // namespace bertfast
