#include "host/launch.h"

#include <cstdint>
#include <mutex>
#include <numeric>

#include "host/earlier.h"
#include "host/gpu.h"
#include "host/scheduler.h"
#include "host/shared_memory.h"

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
  }
  return "unrecognized error code";
}

namespace bertfast {
namespace host {

bool dry_launch = false;
uint64_t first_block = 0;
std::atomic<int64_t> launches{0};

cudaError_t check_launch(dim3 grid, dim3 block, int shared_bytes) {
  if (shared_bytes < 0 || shared_bytes > most_shared_memory()) return cudaErrorInvalidValue;
  bool grid_fits = grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 65535u &&
                   grid.z >= 1 && grid.z <= 65535u;
  bool block_fits = block.x >= 1 && block.x <= 1024u && block.y >= 1 && block.y <= 1024u &&
                    block.z >= 1 && block.z <= 64u && block.x * block.y * block.z <= 1024u;
  return grid_fits && block_fits ? cudaSuccess : cudaErrorInvalidConfiguration;
}

void run_grid(dim3 grid, dim3 block, int shared_bytes, bool early, void (*body)(const void*),
              const void* argument) {
  // threadIdx and its like are global, so launches from several OS threads take turns.
  static std::mutex one_launch;
  std::lock_guard<std::mutex> lock(one_launch);
  gridDim = grid;
  blockDim = block;
  restart_schedule();
  const int threads = int(block.x * block.y * block.z);

  // Blocks run one after the other. In random order, block number i of n is (first + i * step) % n,
  // which visits each once if step and n have no common factor.
  uint64_t count = uint64_t(grid.x) * grid.y * grid.z;
  const uint64_t skipped = first_block < count ? first_block : 0;
  count -= skipped;
  uint64_t first = schedule.order == Order::kReverse ? count - 1 : 0;
  uint64_t step = schedule.order == Order::kReverse ? count - 1 : 1;
  if (schedule.order == Order::kRandom) {
    first = next_random() % count;
    do step = next_random() % count + 1;
    while (std::gcd(step, count) != 1);
  }
  uint64_t number = first;
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t place = skipped + number;
    blockIdx = {unsigned(place % grid.x), unsigned(place / grid.x % grid.y),
                unsigned(place / grid.x / grid.y)};
    shared_memory::begin_block(shared_bytes);
    earlier::begin_block(early);
    try {
      run_block(body, argument);
    } catch (...) {
      shared_memory::abandon_block();
      throw;
    }
    shared_memory::end_block();
    earlier::end_block(threads);
    number = (number + step) % count;
  }
}

}  // namespace host
}  // namespace bertfast
