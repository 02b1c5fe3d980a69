// Faults of synchronisation. Each kernel has the fault unless kRepaired.
#include <cstdio>
#include <stdexcept>
#include <thread>

#include "cases.h"

namespace bertfast {
namespace host_runtime_test {
namespace {

struct Params {
  int* out;
};

constexpr unsigned kAllLanes = 0xffffffffu;

// Reads what another thread writes, without waiting for it.
template<bool kRepaired>
__global__ void read_after_write(Params params) {
  Shared<int> values = shared_memory<int>(0);
  int t = int(threadIdx.x), last = int(blockDim.x) - 1;
  values.store(t, t * t);  // read_after_write: store
  if constexpr (kRepaired) __syncthreads();
  params.out[t] = values.load(last - t);  // read_after_write: load
}

// Overwrites what another thread may not have read yet.
template<bool kRepaired>
__global__ void write_after_read(Params params) {
  Shared<int> values = shared_memory<int>(0);
  int t = int(threadIdx.x), last = int(blockDim.x) - 1;
  values.store(t, t * t);
  __syncthreads();
  int other = values.load(last - t);  // write_after_read: load
  if constexpr (kRepaired) __syncthreads();
  values.store(t, 2 * other);  // write_after_read: store
  params.out[t] = values.load(t);
}

// All threads count in one word. The fibers happen to get it right; a GPU would not.
template<bool kRepaired>
__global__ void read_modify_write(Params params) {
  Shared<int> values = shared_memory<int>(0);
  int t = int(threadIdx.x);
  if constexpr (kRepaired) {
    values.store(t, 1);
    __syncthreads();
    if (t > 0) return;
    int sum = 0;
    for (int i = 0; i < int(blockDim.x); ++i) sum += values.load(i);
    params.out[0] = sum;
  } else {
    if (t == 0) values.store(0, 0);
    __syncthreads();
    int count = values.load(0);  // read_modify_write: load
    values.store(0, count + 1);  // read_modify_write: store
    __syncthreads();
    params.out[0] = values.load(0);
  }
}

// Warp 1 reads first and warp 0 reads later; then a __syncwarp of warp 0 orders its own lanes only.
template<bool kRepaired>
__global__ void earlier_reader(Params params) {
  Shared<int> values = shared_memory<int>(0);
  int t = int(threadIdx.x);
  if (t == 0) values.store(0, 5);
  __syncthreads();
  params.out[t] = values.load(0);  // earlier_reader: load
  __syncwarp();
  if constexpr (kRepaired) __syncthreads();
  if (t == 3) values.store(0, 6);  // earlier_reader: store
}

// Lanes of a warp exchange through shared memory. Meeting in a shuffle doesn't order that.
template<bool kRepaired>
__global__ void shuffle_is_no_barrier(Params params) {
  Shared<int> values = shared_memory<int>(0);
  int t = int(threadIdx.x);
  values.store(t, t);  // shuffle_is_no_barrier: store
  int sum = __shfl_xor_sync(kAllLanes, t, 1);
  if constexpr (kRepaired) __syncwarp();
  params.out[t] = sum + values.load(t ^ 1);  // shuffle_is_no_barrier: load
}

// Neighbours write the halves of one word, which is right; then one writes the whole word.
template<bool kRepaired>
__global__ void part_of_a_word(Params params) {
  Shared<unsigned short> parts = shared_memory<unsigned short>(0);
  Shared<int> words = shared_memory<int>(0);
  int t = int(threadIdx.x);
  parts.store(t, (unsigned short)t);  // part_of_a_word: store
  if constexpr (kRepaired) __syncthreads();
  if (t % 2 == 0) params.out[t / 2] = words.load(t / 2);  // part_of_a_word: load
}

template<bool kRepaired>
__global__ void barrier_after_return(Params params) {
  Shared<int> values = shared_memory<int>(0);
  int t = int(threadIdx.x);
  if constexpr (kRepaired) {
    if (t < 40) values.store(t, t);
    __syncthreads();
    if (t < 40) params.out[t] = values.load(39 - t);
  } else {
    if (t >= 40) return;
    values.store(t, t);
    __syncthreads();  // barrier_after_return
    params.out[t] = values.load(39 - t);
  }
}

template<bool kRepaired>
__global__ void shuffle_after_return(Params params) {
  int t = int(threadIdx.x);
  if constexpr (!kRepaired) {
    if (t % 32 == 5) return;
  }
  int other = __shfl_down_sync(kAllLanes, t, 1);  // shuffle_after_return
  params.out[t] = other;
}

// Half of a warp waits for the other half, which waits for the block.
template<bool kRepaired>
__global__ void deadlock(Params params) {
  int t = int(threadIdx.x), other = 0;
  if (kRepaired || t % 32 < 16) {
    other = __shfl_xor_sync(kAllLanes, t, 1);  // deadlock: shuffle
    __syncthreads();
  } else {
    __syncthreads();  // deadlock: barrier
    other = __shfl_xor_sync(kAllLanes, t, 1);
  }
  params.out[t] = other;
}

template<bool kRepaired>
__global__ void different_calls(Params params) {
  int t = int(threadIdx.x);
  if (kRepaired || t < 7) {
    params.out[t] = __shfl_sync(kAllLanes, t, 3);  // different_calls: shuffle
  } else {
    params.out[t] = int(__ballot_sync(kAllLanes, t & 1));  // different_calls: ballot
  }
}

// A barrier that also answers, and one that doesn't. Repaired, each answer is its own barrier's.
template<bool kRepaired>
__global__ void different_barriers(Params params) {
  int t = int(threadIdx.x);
  if (kRepaired || t < 32) {
    int one = __syncthreads_or(t == 5);  // different_barriers: with an answer
    int none = __syncthreads_or(t > 64);
    int last = __syncthreads_or(t == 63);
    params.out[t] = one + 10 * none + 100 * last;
  } else {
    __syncthreads();  // different_barriers: without
  }
}

template<bool kRepaired>
__global__ void partial_mask(Params params) {
  int t = int(threadIdx.x);
  unsigned mask = kRepaired ? kAllLanes : 0xffffu;
  params.out[t] = __shfl_sync(mask, t, 3);  // partial_mask
}

// The last warp has 16 lanes; lane 16 + i doesn't exist.
template<bool kRepaired>
__global__ void missing_lane(Params params) {
  int t = int(threadIdx.x);
  params.out[t] = __shfl_xor_sync(kAllLanes, t, kRepaired ? 8 : 16);  // missing_lane
}

// Right: all threads reach a barrier, though not the same line.
__global__ void barriers_in_branches(Params params) {
  Shared<int> values = shared_memory<int>(0);
  int t = int(threadIdx.x), last = int(blockDim.x) - 1;
  if (t % 2) {
    values.store(t, t);
    __syncthreads();
  } else {
    values.store(t, 2 * t);
    __syncthreads();
  }
  params.out[t] = values.load(last - t);
}

void launch_and_print(void (*kernel)(Params), int threads) {
  std::vector<int> out(size_t(threads), -1);
  require(launch(kernel, 1, dim3(unsigned(threads)), threads * 4, nullptr, Params{out.data()}));
  for (int value : out) std::printf("%d ", value);
}

using Kernel = void (*)(Params);

template<Kernel kFaulty, Kernel kRepaired, int kThreads>
void run(const Arguments& arguments) {
  launch_and_print(arguments.at(0) == "repaired" ? kRepaired : kFaulty, kThreads);
}

#define CASE(kernel, threads) \
  Case kernel##_case(#kernel, &run<kernel<false>, kernel<true>, threads>)
CASE(read_after_write, 64);
CASE(write_after_read, 64);
CASE(read_modify_write, 64);
CASE(earlier_reader, 64);
CASE(shuffle_is_no_barrier, 64);
CASE(part_of_a_word, 64);
CASE(barrier_after_return, 64);
CASE(shuffle_after_return, 64);
CASE(deadlock, 64);
CASE(different_calls, 32);
CASE(different_barriers, 64);
CASE(partial_mask, 32);
CASE(missing_lane, 48);
Case barriers_in_branches_case("barriers_in_branches", [](const Arguments&) {
  launch_and_print(barriers_in_branches, 64);
});

// A fault leaves nothing behind: the next launch is as good as the first.
Case after_a_fault("after_a_fault", [](const Arguments&) {
  for (Kernel fault : {read_after_write<false>, barrier_after_return<false>, deadlock<false>}) {
    try {
      launch_and_print(fault, 64);
    } catch (const std::runtime_error&) {
      launch_and_print(deadlock<true>, 64);
    }
  }
});

// How many threads of a failed block came past the barrier, and how many cleaned up.
int went_past = 0, cleaned_up = 0;

struct CountsEnds {
  ~CountsEnds() { ++cleaned_up; }
};

__global__ void ends(Params params) {
  CountsEnds counts;
  if (threadIdx.x == 20) return;
  __syncthreads();
  ++went_past;
  params.out[threadIdx.x] = 0;
}

Case unwinding("unwinding", [](const Arguments&) {
  try {
    launch_and_print(ends, 64);
  } catch (const std::runtime_error&) {
    std::printf("%d %d", went_past, cleaned_up);
  }
});

// Launches from several OS threads take turns.
Case os_threads("os_threads", [](const Arguments&) {
  std::vector<int> out[2];
  std::vector<std::thread> threads;
  for (std::vector<int>& mine : out) {
    mine.assign(64, -1);
    threads.emplace_back([&mine] {
      for (int i = 0; i < 200; ++i) {
        require(launch(write_after_read<true>, 1, 64, 256, nullptr, Params{mine.data()}));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int value : out[0]) std::printf("%d ", value);
  for (int value : out[1]) std::printf("%d ", value);
});

}  // namespace
}  // namespace host_runtime_test
}  // namespace bertfast
