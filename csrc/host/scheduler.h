// Runs the threads of one block as fibers, and lets them meet.
//
// A thread runs until it has to wait for others; so threads interleave only where they meet, and
// every run of one schedule is the same. The last thread to arrive at a meeting does its work. Bulk
// copies land when no thread can go on.
#pragma once

#include <cstdint>
#include <string>

#include "host/site.h"
#include "host/vector_types.h"

// Of the running thread; set at every switch, so a block must stay on one OS thread.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
constexpr int warpSize = 32;

namespace bertfast {
namespace host {

enum class Order {
  kDepthFirst,  // the first thread that can go on, as far as it can go
  kReverse,     // the last such thread
  kRandom,      // any, after every meeting
};

struct Schedule {
  Order order = Order::kDepthFirst;
  uint64_t seed = 0;
};
extern Schedule schedule;

// Restarts the schedule's random numbers, so that a launch doesn't depend on the launches before.
void restart_schedule();
uint64_t next_random();

// Calls body(argument) as each of blockDim's threads. Throws what a thread threw first, or an error
// that tells how the threads failed to meet.
void run_block(void (*body)(const void*), const void* argument);

// The running thread's number within its block, and "thread (x, y, z) of block (x, y, z)".
int current_thread();
std::string thread_name(int thread);
std::string block_name();

// __syncthreads and its relatives: waits for every thread of the block. Returns whether any of them
// passed true.
bool block_barrier(const char* name, Site site, bool predicate = false);

// Waits for every lane of the warp, then calls compute(lane_data, lanes) once, where lane_data[i]
// is what lane i passed: its operands, and room for its results. It stays valid, since a lane that
// waits keeps its stack. The last warp of a block may have fewer than 32 lanes.
//
// Only __syncwarp orders the warp's memory accesses. Shuffles, votes and matrix instructions make
// lanes wait too, but "do not imply a memory barrier" (CUDA C++ Programming Guide).
using Collective = void (*)(void* const* lane_data, int lanes);
void warp_collective(const char* name, Site site, void* lane_data, Collective compute,
                     bool orders_memory = false);

// The same for the 128 threads of a warpgroup, which orders nothing either.
constexpr int kWarpgroupThreads = 128;
void warpgroup_collective(const char* name, Site site, void* thread_data, Collective compute);

// Waits until another thread, or a copy that lands, calls wake() with this thread.
void suspend(const char* name, Site site);
void wake(int thread);

}  // namespace host
}  // namespace bertfast
