#include "host/control.h"

#include <map>
#include <stdexcept>

#include "host/gpu.h"
#include "host/launch.h"
#include "host/left_out.h"
#include "host/perturb.h"
#include "host/scheduler.h"

namespace bertfast {
namespace host {

void set_schedule(const std::string& name, uint64_t seed) {
  if (name == "depth-first") {
    schedule = {Order::kDepthFirst, seed};
  } else if (name == "reverse") {
    schedule = {Order::kReverse, seed};
  } else if (name == "random") {
    schedule = {Order::kRandom, seed};
  } else {
    throw std::invalid_argument("schedule must be depth-first, reverse or random, got " + name);
  }
}

void set_perturb(bool on, uint64_t seed) {
  perturb::mode = {on, seed};
}

void set_dry_launch(bool on) {
  dry_launch = on;
}

void set_gpu(int capability, int multiprocessors) {
  static const std::map<int, int> kilobytes = {{80, 164}, {86, 100},  {89, 100},
                                               {90, 228}, {100, 228}, {120, 100}};
  const auto found = kilobytes.find(capability);
  if (found == kilobytes.end() || multiprocessors < 1) {
    throw std::invalid_argument("a GPU must be of compute capability 80, 86, 89, 90, 100 or 120, " +
                                std::string("with one multiprocessor or more, got ") +
                                std::to_string(capability) + " and " +
                                std::to_string(multiprocessors));
  }
  gpu = {capability, multiprocessors, found->second * 1024};
}

void set_first_block(uint64_t number) {
  first_block = number;
}

void leave_out(const std::string& file, int line) {
  left_out = {file, line};
}

int64_t launch_count() {
  return launches;
}

std::vector<BankConflicts> bank_conflicts() {
  return banks::records();
}

void reset_records() {
  banks::reset();
  launches = 0;
}

}  // namespace host
}  // namespace bertfast
