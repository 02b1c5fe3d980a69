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
#include "host/fiber.h"
#include "host/race_check.h"

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

struct Thread {
  std::unique_ptr<Fiber> fiber;
  uint3 index;
  bool returned;
  const char* waits_at;  // the call it waits in, or null
  Site site;
};

struct Warp {
  int lanes;
  int arrived;
  int returned;
  const char* name;  // of the collective that its lanes are arriving at
  Collective compute;
  void* lane_data[warpSize];
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
Warp warps[kMaxThreads / warpSize];
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

int pick() {
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

void resume(Fiber& from, int thread) {
  ready.remove(thread);
  current = thread;
  threadIdx = threads[size_t(thread)].index;
  Fiber::switch_stacks(from, *threads[size_t(thread)].fiber);
}

// Goes on with whichever thread is next, and returns when it is this one's turn again.
void give_way(Thread& me) {
  int next = pick();
  if (next < 0) fail("deadlock in " + block_name() + ":" + who_waits_where());
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

void wait(Thread& me, const char* name, Site site) {
  me.waits_at = name;
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

// No thread may return while others wait for it.
void check_nobody_waits_for(int thread) {
  int warp = thread / warpSize;
  if (at_barrier == 0 && warps[warp].arrived == 0) return;
  for (int i = 0; i < thread_count; ++i) {
    const Thread& other = threads[size_t(i)];
    if (!other.waits_at) continue;
    bool for_block = std::strncmp(other.waits_at, "__syncthreads", 13) == 0;
    if (!for_block && i / warpSize != warp) continue;
    fail(thread_name(thread) + " returned, but " + (for_block ? "every thread" : "every lane") +
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
    ++returned_count;
    if (first_error) {
      // Everybody else unwinds, wherever they are.
      for (int i = 0; i < thread_count; ++i) {
        if (!threads[size_t(i)].returned) ready.add(i);
      }
    }
    int next = pick();
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
    Warp& warp = warps[first / warpSize];
    warp.lanes = thread_count - first < warpSize ? thread_count - first : warpSize;
    warp.arrived = 0;
    warp.returned = 0;
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
    wait(me, name, site);
    return any_at_last_one;
  }
  at_barrier = 0;
  any_at_last_one = any_at_barrier;
  any_at_barrier = false;
  race_check::order_block();
  banks::close_block();
  release(0, thread_count);
  go_on(me);
  return any_at_last_one;
}

void warp_collective(const char* name, Site site, void* lane_data, Collective compute,
                     bool orders_memory) {
  int number = current / warpSize;
  int first = number * warpSize;
  Warp& warp = warps[number];
  Thread& me = threads[size_t(current)];
  if (warp.returned > 0) {
    fail(call_name(name, site) + " reached by " + thread_name(current) + " after " +
         thread_name(first_returned(first, first + warp.lanes)) + " of the same warp has returned");
  }
  if (warp.arrived == 0) {
    warp.name = name;
    warp.compute = compute;
  } else if (warp.compute != compute || (warp.name != name && std::strcmp(warp.name, name) != 0)) {
    fail(call_name(name, site) + " reached by " + thread_name(current) +
         " while other lanes of its warp wait elsewhere:" + who_waits_where());
  }
  warp.lane_data[current - first] = lane_data;
  if (++warp.arrived < warp.lanes) {
    wait(me, name, site);
    return;
  }
  warp.arrived = 0;
  if (compute) compute(warp.lane_data, warp.lanes);
  if (orders_memory) race_check::order_warp(number);
  banks::close_warp(number);
  release(first, first + warp.lanes);
  go_on(me);
}

}  // namespace host
}  // namespace bertfast
