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

// What a block may have of shared memory, in KB: 227 (the default, of sm_90 and sm_100), 163
// (sm_80) or 99 (sm_86, sm_89 and sm_120).
void set_shared_memory(int kilobytes);

// Whether kernels that can multiply by mma.sync or by wgmma take the latter.
void set_wgmma(bool on);

// Of launches with more blocks than this number, the blocks before it aren't run: for grids too
// large to run whole.
void set_first_block(uint64_t number);

// The number of kernels launched, and their bank conflicts, since the last reset.
int64_t launch_count();
std::vector<BankConflicts> bank_conflicts();
void reset_records();

}  // namespace host
}  // namespace bertfast
