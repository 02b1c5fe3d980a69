#include "host/scheduler.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "host/bank_conflicts.h"
#include "host/bulk_copy.h"
#include "host/clocks.h"
#include "host/fiber.h"
#include "host/mbarrier.h"
#include "host/named_barrier.h"
#include "host/registers.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace bertfast {
namespace host {

Schedule schedule;

namespace {

constexpr int kMaxThreads = 1024;

// Unwinds a thread that waits for others when one of them has failed.
struct Aborted {};

// Whom a thread waits for: all threads of its block, warpgroup or warp, or an event.
enum class Waiting { kBlock, kWarpgroup, kWarp, kEvent };

struct Thread {
  std::unique_ptr<Fiber> fiber;
  uint3 index;
  bool returned;
  const char* waits_at;  // the call it waits in, or null
  Waiting waits_for;
  Site site;
};

// A warp or a warpgroup.
struct Group {
  const char* words[2];  // what it and one of its threads are called
  Waiting kind;
  int first;
  int size;
  int arrived;
  int returned;
  const char* name;  // of the collective that its threads are arriving at
  Collective compute;
  void* data[kWarpgroupThreads];
};

// The threads that can go on, less the one that runs.
class ReadySet {
 public:
  void clear() { bits_.fill(0); }
  void add(int thread) { bits_[size_t(thread / 64)] |= uint64_t(1) << (thread % 64); }
  void remove(int thread) { bits_[size_t(thread / 64)] &= ~(uint64_t(1) << (thread % 64)); }

  // The first member at or after `from`, or -1.
  int first(int from = 0) const {
    for (size_t word = size_t(from / 64); word < bits_.size(); ++word) {
      uint64_t bits = bits_[word];
      if (word == size_t(from / 64)) bits &= ~uint64_t(0) << (from % 64);
      if (bits) return int(word) * 64 + __builtin_ctzll(bits);
    }
    return -1;
  }
  int last() const {
    for (size_t word = bits_.size(); word-- > 0;) {
      if (bits_[word]) return int(word) * 64 + 63 - __builtin_clzll(bits_[word]);
    }
    return -1;
  }

 private:
  std::array<uint64_t, kMaxThreads / 64> bits_{};
};

// One block at a time, and one running thread: everything about them is in these.
std::vector<Thread> threads;  // the fibers stay, for the next block
Group warps[kMaxThreads / warpSize];
Group warpgroups[kMaxThreads / kWarpgroupThreads];
ReadySet ready;
Fiber launcher;
int thread_count;
int current;
int at_barrier;
const char* barrier_name;  // of the call that threads are arriving at
bool any_at_barrier;       // of what those passed who have arrived
bool any_at_last_one;  // the same of the barrier before: its result, until everybody has left it
int returned_count;
std::exception_ptr first_error;
void (*body)(const void*);
const void* body_argument;
uint64_t random_state;

[[noreturn]] void fail(const std::string& message) {
  throw std::runtime_error(message);
}

std::string call_name(const char* name, Site site) {
  return std::string(name) + " (" + to_string(site) + ")";
}

int first_returned(int begin, int end) {
  while (begin < end && !threads[size_t(begin)].returned) ++begin;
  return begin;
}

// One line for each call in which threads wait: "threads 0-15, 20 wait at ...".
std::string who_waits_where() {
  std::vector<std::pair<std::string, std::string>> calls;  // and the threads that wait there
  for (int begin = 0, end; begin < thread_count; begin = end) {
    auto call_of = [](int i) {
      const Thread& thread = threads[size_t(i)];
      return thread.waits_at ? call_name(thread.waits_at, thread.site) : std::string();
    };
    std::string call = call_of(begin);
    for (end = begin + 1; end < thread_count && call_of(end) == call;) ++end;
    if (call.empty()) continue;
    std::string range = std::to_string(begin);
    if (end - begin > 1) range += "-" + std::to_string(end - 1);
    auto known = std::find_if(calls.begin(), calls.end(),
                              [&](const auto& other) { return other.first == call; });
    if (known == calls.end()) {
      calls.emplace_back(call, range);
    } else {
      known->second += ", " + range;
    }
  }
  std::string text;
  for (const auto& [call, ranges] : calls) text += "\n  threads " + ranges + " wait at " + call;
  return text;
}

int pick_ready() {
  switch (schedule.order) {
    case Order::kDepthFirst:
      return ready.first();
    case Order::kReverse:
      return ready.last();
    case Order::kRandom: {
      int found = ready.first(int(next_random() % uint64_t(thread_count)));
      return found >= 0 ? found : ready.first();
    }
  }
  return -1;
}

// The next thread, once copies have landed if need be, or -1.
int pick() {
  int next = pick_ready();
  while (next < 0 && !first_error && bulk_copy::land_one()) next = pick_ready();
  return next;
}

std::string deadlock() {
  return "deadlock in " + block_name() + ":" + who_waits_where() + mbarrier::open_phases() +
         named_barrier::open() + registers::asked_for();
}

void resume(Fiber& from, int thread) {
  ready.remove(thread);
  current = thread;
  threadIdx = threads[size_t(thread)].index;
  Fiber::switch_stacks(from, *threads[size_t(thread)].fiber);
}

// Goes on with whichever thread is next, and returns when it is this one's turn again.
void give_way(Thread& me) {
  int next = pick();
  if (next < 0) fail(deadlock());
  if (next == current) {
    ready.remove(next);
    return;
  }
  resume(*me.fiber, next);
  if (first_error) throw Aborted();
}

// This thread has done a meeting's work and released the others.
void go_on(Thread& me) {
  if (schedule.order != Order::kRandom) return;
  ready.add(current);
  give_way(me);
}

void wait(Thread& me, Waiting waits_for, const char* name, Site site) {
  me.waits_at = name;
  me.waits_for = waits_for;
  me.site = site;
  give_way(me);
}

void release(int begin, int end) {
  for (int i = begin; i < end; ++i) {
    if (i == current) continue;
    threads[size_t(i)].waits_at = nullptr;
    ready.add(i);
  }
}

// Whether `other` waits for a meeting that the thread must take part in.
bool waits_for(const Thread& other, int number, int thread) {
  if (!other.waits_at) return false;
  switch (other.waits_for) {
    case Waiting::kBlock:
      return true;
    case Waiting::kWarpgroup:
      return number / kWarpgroupThreads == thread / kWarpgroupThreads;
    case Waiting::kWarp:
      return number / warpSize == thread / warpSize;
    case Waiting::kEvent:
      break;
  }
  return false;
}

// The running thread arrives at a meeting of its warp or warpgroup. True in the last to arrive,
// after the meeting's work; in the others when that one has released them.
bool meet(Group& group, const char* name, Site site, void* data, Collective compute) {
  const auto others = [&] { return std::string(group.words[1]) + "s of its " + group.words[0]; };
  if (group.returned > 0) {
    fail(call_name(name, site) + " reached by " + thread_name(current) + " after " +
         thread_name(first_returned(group.first, group.first + group.size)) + " of the same " +
         group.words[0] + " has returned");
  }
  if (group.arrived == 0) {
    group.name = name;
    group.compute = compute;
  } else if (group.compute != compute ||
             (group.name != name && std::strcmp(group.name, name) != 0)) {
    fail(call_name(name, site) + " reached by " + thread_name(current) + " while other " +
         others() + " wait elsewhere:" + who_waits_where());
  }
  group.data[current - group.first] = data;
  if (++group.arrived < group.size) {
    wait(threads[size_t(current)], group.kind, name, site);
    return false;
  }
  group.arrived = 0;
  if (compute) compute(group.data, group.size);
  return true;
}

void release_others(const Group& group) {
  release(group.first, group.first + group.size);
  go_on(threads[size_t(current)]);
}

// No thread may return while others wait for it.
void check_nobody_waits_for(int thread) {
  if (at_barrier == 0 && warps[thread / warpSize].arrived == 0 &&
      warpgroups[thread / kWarpgroupThreads].arrived == 0) {
    return;
  }
  for (int i = 0; i < thread_count; ++i) {
    const Thread& other = threads[size_t(i)];
    if (!waits_for(other, i, thread)) continue;
    const char* const who = other.waits_for == Waiting::kBlock ? "every thread"
                            : other.waits_for == Waiting::kWarpgroup
                                ? "every thread of its warpgroup"
                                : "every lane";
    fail(thread_name(thread) + " returned, but " + who +
         " must reach the call where others wait:" + who_waits_where());
  }
}

void run_body() {
  if (first_error) return;
  try {
    body(body_argument);
    check_nobody_waits_for(current);
  } catch (const Aborted&) {
  } catch (...) {
    if (!first_error) first_error = std::current_exception();
  }
}

// A fiber's whole life: the same thread of one block after another.
void live() {
  for (;;) {
    run_body();
    Thread& me = threads[size_t(current)];
    me.returned = true;
    me.waits_at = nullptr;
    ++warps[current / warpSize].returned;
    ++warpgroups[current / kWarpgroupThreads].returned;
    ++returned_count;
    const bool was_last = returned_count == thread_count;
    int next = first_error || was_last ? -1 : pick();
    if (next < 0 && !was_last) {
      if (!first_error) first_error = std::make_exception_ptr(std::runtime_error(deadlock()));
      // Everybody else unwinds, wherever they are.
      for (int i = 0; i < thread_count; ++i) {
        if (!threads[size_t(i)].returned) ready.add(i);
      }
      next = pick();
    }
    if (next >= 0) {
      resume(*me.fiber, next);
    } else {
      Fiber::switch_stacks(*me.fiber, launcher);
    }
  }
}

}  // namespace

void restart_schedule() {
  random_state = schedule.seed;
}

// SplitMix64.
uint64_t next_random() {
  uint64_t bits = random_state += 0x9e3779b97f4a7c15u;
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
  return bits ^ (bits >> 31);
}

int current_thread() {
  return current;
}

std::string block_name() {
  return "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
         std::to_string(blockIdx.z) + ")";
}

std::string thread_name(int thread) {
  const uint3& index = threads[size_t(thread)].index;
  return "thread (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ") of " + block_name();
}

void run_block(void (*new_body)(const void*), const void* argument) {
  body = new_body;
  body_argument = argument;
  thread_count = int(blockDim.x * blockDim.y * blockDim.z);
  at_barrier = 0;
  any_at_barrier = false;
  returned_count = 0;
  first_error = nullptr;
  while (int(threads.size()) < thread_count) {
    threads.emplace_back();
    threads.back().fiber.reset(new Fiber(live, int(threads.size())));
  }
  ready.clear();
  uint3 index{0, 0, 0};
  for (int i = 0; i < thread_count; ++i) {
    Thread& thread = threads[size_t(i)];
    thread.index = index;
    thread.returned = false;
    thread.waits_at = nullptr;
    ready.add(i);
    if (++index.x == blockDim.x) {
      index.x = 0;
      if (++index.y == blockDim.y) index = {0, 0, index.z + 1};
    }
  }
  for (int first = 0; first < thread_count; first += warpSize) {
    const int lanes = std::min(thread_count - first, warpSize);
    warps[first / warpSize] = {{"warp", "lane"}, Waiting::kWarp, first, lanes, 0, 0,
                               nullptr,          nullptr,        {}};
  }
  for (int first = 0; first < thread_count; first += kWarpgroupThreads) {
    const int size = std::min(thread_count - first, kWarpgroupThreads);
    warpgroups[first / kWarpgroupThreads] = {
        {"warpgroup", "thread"}, Waiting::kWarpgroup, first, size, 0, 0, nullptr, nullptr, {}};
  }

  resume(launcher, pick());

  if (first_error) {
    std::exception_ptr error = first_error;
    first_error = nullptr;
    std::rethrow_exception(error);
  }
}

bool block_barrier(const char* name, Site site, bool predicate) {
  if (returned_count > 0) {
    fail(call_name(name, site) + " reached by " + thread_name(current) + " after " +
         thread_name(first_returned(0, thread_count)) + " has returned");
  }
  if (at_barrier > 0 && std::strcmp(name, barrier_name) != 0) {
    fail(call_name(name, site) + " reached by " + thread_name(current) +
         " while other threads of its block wait elsewhere:" + who_waits_where());
  }
  barrier_name = name;
  any_at_barrier |= predicate;
  Thread& me = threads[size_t(current)];
  if (++at_barrier < thread_count) {
    wait(me, Waiting::kBlock, name, site);
    return any_at_last_one;
  }
  at_barrier = 0;
  any_at_last_one = any_at_barrier;
  any_at_barrier = false;
  clocks::order_block();
  banks::close_block();
  release(0, thread_count);
  go_on(me);
  return any_at_last_one;
}

void warp_collective(const char* name, Site site, void* lane_data, Collective compute,
                     bool orders_memory) {
  const int number = current / warpSize;
  if (!meet(warps[number], name, site, lane_data, compute)) return;
  if (orders_memory) clocks::order_warp(number);
  banks::close_warp(number);
  release_others(warps[number]);
}

void warpgroup_collective(const char* name, Site site, void* thread_data, Collective compute) {
  Group& group = warpgroups[current / kWarpgroupThreads];
  if (group.size < kWarpgroupThreads) {
    fail(call_name(name, site) + " needs 128 threads, the warpgroup has " +
         std::to_string(group.size));
  }
  if (meet(group, name, site, thread_data, compute)) release_others(group);
}

void suspend(const char* name, Site site) {
  wait(threads[size_t(current)], Waiting::kEvent, name, site);
}

void wake(int thread) {
  threads[size_t(thread)].waits_at = nullptr;
  ready.add(thread);
}

}  // namespace host
}  // namespace bertfast
