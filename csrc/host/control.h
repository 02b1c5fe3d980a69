// What tests and tools set and read, from outside of any launch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "host/bank_conflicts.h"

namespace bertfast {
namespace host {

// "depth-first" (the default), "reverse" or "random". The seed matters to "random" alone.
void set_schedule(const std::string& name, uint64_t seed);

// Whether approximate functions are off by their documented error: see perturb.h.
void set_perturb(bool on, uint64_t seed);

// Whether launches only check their arguments, which leaves the cost of a call.
void set_dry_launch(bool on);

// The number of kernels launched, and their bank conflicts, since the last reset.
int64_t launch_count();
std::vector<BankConflicts> bank_conflicts();
void reset_records();

}  // namespace host
}  // namespace bertfast
