// What each thread knows to have happened: the order of accesses to shared memory.
//
// Time goes on with whatever orders something. Each access has the time at which it was made, and a
// thread knows of each agent's accesses up to some time: those come before what the thread does
// next, and any others may come before, after or in the middle of it. Agents are the threads and
// the engines that access shared memory beside them: the bulk copies that arrive at one mbarrier,
// the bulk stores of one thread, the products of one warpgroup.
//
// Barriers of the block and of a warp are enough for most kernels, and are kept as one time each.
// Else there is a table, from the first call of use_table() in a block on.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace bertfast {
namespace host {
namespace clocks {

// Threads have the numbers below.
constexpr int kEngines = 1024;

extern uint64_t now;
extern uint64_t block_start;    // when this block began
extern uint64_t block_ordered;  // when its threads last met
extern bool has_table;

void begin_block();
void use_table();

// A new engine's number. The name is for messages, the hint says what ends its accesses.
int new_engine(const std::string& name, const std::string& hint);
std::string name_of(int agent);
const std::string& hint_of(int engine);

// All threads of the block, or all lanes of one warp, have met.
void order_block();
void order_warp(int warp);

// `thread` knows the accesses of `agent` before this time. All its own.
uint64_t known_until(int thread, int agent);

// What an arrival brings to a barrier and a wait takes away: of each agent the accesses before a
// time.
struct Knowledge {
  std::vector<uint64_t> threads;
  std::vector<uint64_t> engines;
};
void release(Knowledge* into);  // of the running thread
void acquire(int thread, const Knowledge& from);
void merge(Knowledge* into, const Knowledge& from);

// Time goes on: what was done has a smaller time, what comes next none smaller.
uint64_t tick();

// An engine's accesses before a time are over, and this is who knows it.
void learn(Knowledge* who, int engine, uint64_t until);
void learn(int thread, int engine, uint64_t until);

}  // namespace clocks
}  // namespace host
}  // namespace bertfast
