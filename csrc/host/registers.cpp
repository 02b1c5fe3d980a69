#include "host/registers.h"

#include <stdexcept>

#include "host/scheduler.h"

namespace bertfast {
namespace host {
namespace registers {
namespace {

constexpr int kRegisters = 64 * 1024;  // of a multiprocessor
constexpr int kWarpgroups = 8;

// Registers a thread.
struct Request {
  int at_launch;
  int wanted;
  Site site;
};

int at_launch;  // 0: nobody has said so yet
int held[kWarpgroups];
int wanted[kWarpgroups];  // 0: it waits for none
int spare;                // given up by warpgroups, for each thread of one

[[noreturn]] void fail(const std::string& message, Site site) {
  throw std::runtime_error("set_registers at " + to_string(site) + " by " +
                           thread_name(current_thread()) + ": " + message);
}

void first_request(const Request& request) {
  const int threads = int(blockDim.x * blockDim.y * blockDim.z);
  if (request.at_launch * threads > kRegisters) {
    fail(std::to_string(threads) + " threads can't be launched with " +
             std::to_string(request.at_launch) + " registers each",
         request.site);
  }
  at_launch = request.at_launch;
  for (int& of : held) of = at_launch;
}

// Gives what can be given. What one gives up may be enough for one that was looked at before.
void grant() {
  for (int group = 0; group < kWarpgroups;) {
    const int more = wanted[group] - held[group];
    if (wanted[group] == 0 || more > spare) {
      ++group;
      continue;
    }
    spare -= more;
    held[group] = wanted[group];
    wanted[group] = 0;
    for (int i = 0; i < kWarpgroupThreads; ++i) {
      const int thread = group * kWarpgroupThreads + i;
      if (thread != current_thread()) wake(thread);
    }
    group = 0;
  }
}

void compute(void* const* data, int) {
  const Request& request = *static_cast<const Request*>(data[0]);
  if (at_launch == 0) first_request(request);
  if (request.at_launch != at_launch) {
    fail("launched with " + std::to_string(request.at_launch) + " registers, elsewhere with " +
             std::to_string(at_launch),
         request.site);
  }
  const int group = current_thread() / kWarpgroupThreads;
  if ((request.wanted > at_launch) != (request.wanted > held[group])) {
    fail("from " + std::to_string(held[group]) + " registers to " + std::to_string(request.wanted) +
             " is the other way",
         request.site);
  }
  wanted[group] = request.wanted;
}

}  // namespace

void begin_block() {
  at_launch = spare = 0;
  for (int& of : wanted) of = 0;
}

void set(int at_launch, int wanted_now, Site site) {
  Request request{at_launch, wanted_now, site};
  warpgroup_collective("set_registers", site, &request, &compute);
  const int group = current_thread() / kWarpgroupThreads;
  grant();
  while (wanted[group] != 0) suspend("set_registers", site);
}

std::string asked_for() {
  std::string text;
  for (int group = 0; group < kWarpgroups; ++group) {
    if (wanted[group] == 0) continue;
    text += "\n  warpgroup " + std::to_string(group) + " waits for " +
            std::to_string(wanted[group] - held[group]) +
            " more registers a thread; others have given up " + std::to_string(spare);
  }
  return text;
}

}  // namespace registers
}  // namespace host
}  // namespace bertfast
