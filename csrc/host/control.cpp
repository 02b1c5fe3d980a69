#include "host/control.h"

#include <stdexcept>

#include "host/launch.h"
#include "host/perturb.h"
#include "host/scheduler.h"
#include "host/shared_memory.h"
#include "host/wgmma.h"

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

void set_shared_memory(int kilobytes) {
  if (kilobytes != 99 && kilobytes != 163 && kilobytes != 227) {
    throw std::invalid_argument("shared memory must be 99, 163 or 227 KB, got " +
                                std::to_string(kilobytes));
  }
  shared_memory::most_bytes = kilobytes * 1024;
}

void set_wgmma(bool on) {
  wgmma::available = on;
}

void set_first_block(uint64_t number) {
  first_block = number;
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
