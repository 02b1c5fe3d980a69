// Whole launches: a correct kernel under every schedule, bank conflicts, limits and costs.
#include <chrono>
#include <cstdio>

#include "cases.h"
#include "device/earlier.cuh"
#include "guarded.h"
#include "host/control.h"

namespace bertfast {
namespace host_runtime_test {
namespace {

// Sums of rows, each by one block: the order of the additions doesn't depend on the schedule.
struct SumParams {
  const float* in;
  float* out;
  int columns;
};

__global__ void row_sums(SumParams params) {
  Shared<float> sums = shared_memory<float>(0);
  int t = int(threadIdx.x + blockDim.x * threadIdx.y), threads = int(blockDim.x * blockDim.y);
  int row = int(blockIdx.x + gridDim.x * blockIdx.y);
  float sum = 0.0f;
  for (int column = t; column < params.columns; column += threads) {
    sum += params.in[row * params.columns + column];
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (t % 32 == 0) sums.store(t / 32, sum);
  __syncthreads();
  if (t == 0) {
    float total = 0.0f;
    for (int warp = 0; warp < threads / 32; ++warp) total += sums.load(warp);
    params.out[row] = total;
  }
}

Case reduction("reduction", [](const Arguments&) {
  constexpr int kRows = 15, kColumns = 777;
  Guarded<float> in(kRows * kColumns), out(kRows);
  unsigned bits = 1;
  for (int i = 0; i < kRows * kColumns; ++i) {
    bits = bits * 1664525u + 1013904223u;
    in.data()[i] = float(int(bits >> 8)) * 0x1p-24f - 0.5f;
  }
  SumParams params{in.data(), out.data(), kColumns};
  require(launch(row_sums, dim3(5, 3), dim3(32, 8), 8 * 4, nullptr, params));
  in.check_zones();
  out.check_zones();
  out.check_written();
  for (int i = 0; i < kRows; ++i) std::printf("%08x ", __float_as_uint(out.data()[i]));
});

// The blocks' order, as the order in which they were counted.
struct OrderParams {
  int* next;
  int* out;
};

__global__ void count_blocks(OrderParams params) {
  if (threadIdx.x == 0) params.out[blockIdx.x + gridDim.x * blockIdx.y] = (*params.next)++;
}

Case block_order("block_order", [](const Arguments&) {
  int next = 0, out[12];
  require(launch(count_blocks, dim3(4, 3), 32, 0, nullptr, OrderParams{&next, out}));
  for (int number : out) std::printf("%d ", number);
});

// For each thread its place in the order of arrival at a barrier, and of departure.
__global__ void count_threads(OrderParams params) {
  params.out[threadIdx.x] = (*params.next)++;
  __syncthreads();
  params.out[blockDim.x + threadIdx.x] = (*params.next)++;
}

Case thread_order("thread_order", [](const Arguments&) {
  int next = 0, out[2 * 40];
  require(launch(count_threads, 1, 40, 0, nullptr, OrderParams{&next, out}));
  for (int number : out) std::printf("%d ", number);
});

struct BankParams {
  int repeats;
};

constexpr int kBankThreads = 128;
constexpr int kBankBytes = 32 * 33 * 4;

// One line for each way to access; all threads read, so there is no race.
__global__ void bank_conflicts(BankParams params) {
  Shared<float> words = shared_memory<float>(0);
  Shared<float2> pairs = shared_memory<float2>(0);
  Shared<float4> quads = shared_memory<float4>(0);
  Shared<unsigned short> halves = shared_memory<unsigned short>(0);
  int lane = int(threadIdx.x) % 32;
  for (int i = 0; i < params.repeats; ++i) {
    words.load(lane);                      // banks: consecutive
    words.load(lane * 2);                  // banks: stride 2
    words.load(lane * 32);                 // banks: stride 32
    words.load(lane * 33);                 // banks: stride 33
    words.load(7);                         // banks: broadcast
    words.load(lane / 2 * 32);             // banks: 16 words of one bank
    halves.load(lane);                     // banks: halves
    halves.load(lane * 4);                 // banks: halves, stride 4
    pairs.load(lane);                      // banks: pairs
    pairs.load(lane * 2);                  // banks: pairs, stride 2
    pairs.load(lane * 16);                 // banks: pairs, stride 16
    quads.load(lane);                      // banks: quads
    quads.load(lane * 2);                  // banks: quads, stride 2
    if (lane < 16) words.load(lane * 32);  // banks: half a warp
    __syncwarp();
    // Half of the lanes skip the first time, and must not be taken for partners of the other half.
    for (int second = 0; second < 2; ++second) {
      int word = second ? 32 + (lane + 16) % 32 : lane;
      if (second || lane < 16) words.load(word);  // banks: skipped by half a warp
      __syncwarp();
    }
  }
  __syncthreads();
  if (threadIdx.x < 32) words.store(lane * 32, 0.0f);  // banks: store, stride 32
  __syncthreads();
  if (threadIdx.x < 32) words.store(lane * 33, 0.0f);  // banks: store, stride 33
}

void print_bank_conflicts() {
  for (const host::BankConflicts& record : host::bank_conflicts()) {
    std::printf("%s %d %lld\n", record.site.c_str(), record.worst_degree,
                (long long)record.accesses);
  }
}

Case banks("banks", [](const Arguments&) {
  require(launch(bank_conflicts, 2, kBankThreads, kBankBytes, nullptr, BankParams{5}));
  print_bank_conflicts();
});

Case reset_banks("reset_banks", [](const Arguments&) {
  require(launch(bank_conflicts, 2, kBankThreads, kBankBytes, nullptr, BankParams{5}));
  host::reset_records();
  print_bank_conflicts();
  require(launch(bank_conflicts, 1, 32, kBankBytes, nullptr, BankParams{1}));
  print_bank_conflicts();
});

struct Nothing {};

__global__ void nothing(Nothing) {}

// GRID.X Y Z BLOCK.X Y Z SHARED CAPABILITY [DRY]: what the launch says on such a GPU.
Case limits("limits", [](const Arguments& arguments) {
  auto number = [&](size_t i) { return unsigned(std::stoll(arguments.at(i))); };
  dim3 grid(number(0), number(1), number(2)), block(number(3), number(4), number(5));
  host::set_gpu(std::stoi(arguments.at(7)), 2);
  host::set_dry_launch(arguments.size() > 8);
  std::puts(cudaGetErrorString(
      launch(nothing, grid, block, std::stoi(arguments.at(6)), nullptr, Nothing{})));
});

Case dry("dry", [](const Arguments&) {
  int next = 0, out[12];
  host::set_dry_launch(true);
  require(launch(count_blocks, dim3(4, 3), 32, 0, nullptr, OrderParams{&next, out}));
  std::printf("%d ", next);
  host::set_dry_launch(false);
  require(launch(count_blocks, dim3(4, 3), 32, 0, nullptr, OrderParams{&next, out}));
  std::printf("%d", next);
});

// A kernel that is launched early: so many threads of its second block don't wait.
struct EarlyParams {
  unsigned hasty;
};

__global__ void early(EarlyParams p) {
  if (blockIdx.x == 0 || threadIdx.x >= p.hasty) await_earlier_kernels();
}

// HASTY
Case early_launch("early_launch", [](const Arguments& arguments) {
  const EarlyParams p{unsigned(std::stoi(arguments.at(0)))};
  require(launch_early(early, 3, 64, 0, nullptr, p));
  require(launch(early, 3, 64, 0, nullptr, EarlyParams{64}));  // nothing before it is under way
});

struct CostParams {
  int repeats;
};

__global__ void barriers(CostParams params) {
  for (int i = 0; i < params.repeats; ++i) __syncthreads();
}
__global__ void shuffles(CostParams params) {
  float value = float(threadIdx.x);
  for (int i = 0; i < params.repeats; ++i) value += __shfl_xor_sync(0xffffffffu, value, 1);
}
__global__ void accesses(CostParams params) {
  Shared<float> words = shared_memory<float>(0);
  int t = int(threadIdx.x);
  for (int i = 0; i < params.repeats; i += 16) {
    for (int j = 0; j < 16; ++j) words.store(t, float(j));
    __syncwarp();
  }
}

// Nanoseconds per thread and repeat.
double cost_of(void (*kernel)(CostParams), int threads, int repeats) {
  auto run = [&] {
    require(launch(kernel, 1, dim3(unsigned(threads)), threads * 4, nullptr, CostParams{repeats}));
  };
  run();
  auto start = std::chrono::steady_clock::now();
  run();
  std::chrono::duration<double, std::nano> elapsed = std::chrono::steady_clock::now() - start;
  return elapsed.count() / threads / repeats;
}

Case costs("costs", [](const Arguments&) {
  for (int threads : {32, 128, 256, 1024}) {
    std::printf(
        "%4d threads: %.1f ns a switch at barriers, %.1f at shuffles, %.1f a shared store\n",
        threads, cost_of(barriers, threads, 200000 / threads),
        cost_of(shuffles, threads, 200000 / threads),
        cost_of(accesses, threads, 1600000 / threads / 16 * 16));
  }
  host::set_dry_launch(true);
  constexpr int kLaunches = 1000000;
  auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kLaunches; ++i) require(launch(nothing, 1, 32, 0, nullptr, Nothing{}));
  std::chrono::duration<double, std::nano> elapsed = std::chrono::steady_clock::now() - start;
  std::printf("dry launch: %.1f ns\n", elapsed.count() / kLaunches);
});

}  // namespace
}  // namespace host_runtime_test
}  // namespace bertfast
