#include "host/named_barrier.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "host/clocks.h"
#include "host/left_out.h"
#include "host/scheduler.h"

namespace bertfast {
namespace host {
namespace named_barrier {
namespace {

constexpr int kBarriers = 16;  // 0 is __syncthreads's

struct Barrier {
  int threads = 0;
  Site site{};  // of who came first
  std::vector<int> here;
  std::vector<int> waiting;
  clocks::Knowledge gathering;
};

Barrier barriers[kBarriers];

[[noreturn]] void fail(int number, const std::string& message, Site site) {
  throw std::runtime_error("named barrier " + std::to_string(number) + " at " + to_string(site) +
                           ", in " + thread_name(current_thread()) + ": " + message);
}

// The running thread has come; true if it was the last.
bool come(int number, int threads, Site site) {
  if (number < 1 || number >= kBarriers) fail(number, "they have the numbers 1 to 15", site);
  if (threads < warpSize || threads % warpSize != 0) {
    fail(number, std::to_string(threads) + " threads are no whole warps", site);
  }
  Barrier& barrier = barriers[number];
  if (barrier.here.empty()) {
    barrier.threads = threads;
    barrier.site = site;
  }
  if (barrier.threads != threads) {
    fail(number,
         "it is for " + std::to_string(threads) + " threads here, and for " +
             std::to_string(barrier.threads) + " at " + to_string(barrier.site),
         site);
  }
  const int me = current_thread();
  if (std::count(barrier.here.begin(), barrier.here.end(), me) > 0) {
    fail(number, "this thread comes a second time before all others have come", site);
  }
  barrier.here.push_back(me);
  clocks::release(&barrier.gathering);
  if (int(barrier.here.size()) < threads) return false;
  for (int thread : barrier.waiting) {
    clocks::acquire(thread, barrier.gathering);
    wake(thread);
  }
  return true;
}

std::string words(int number) {
  const Barrier& barrier = barriers[number];
  return "named barrier " + std::to_string(number) + " (" + to_string(barrier.site) +
         "): " + std::to_string(barrier.here.size()) + " of " + std::to_string(barrier.threads) +
         " threads have come";
}

}  // namespace

void begin_block() {
  for (Barrier& barrier : barriers) barrier = Barrier();
}

void end_block() {
  for (int number = 1; number < kBarriers; ++number) {
    if (barriers[number].here.empty()) continue;
    throw std::runtime_error(block_name() + " ended with an open " + words(number));
  }
}

void sync(int number, int threads, Site site) {
  if (is_left_out(site)) return;
  if (come(number, threads, site)) {
    clocks::acquire(current_thread(), barriers[number].gathering);
    barriers[number] = Barrier();
  } else {
    barriers[number].waiting.push_back(current_thread());
    suspend("named_barrier_sync", site);
  }
}

void arrive(int number, int threads, Site site) {
  if (is_left_out(site)) return;
  if (come(number, threads, site)) barriers[number] = Barrier();
}

std::string open() {
  std::string text;
  for (int number = 1; number < kBarriers; ++number) {
    if (!barriers[number].here.empty()) text += "\n  " + words(number);
  }
  return text;
}

}  // namespace named_barrier
}  // namespace host
}  // namespace bertfast
