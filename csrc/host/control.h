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

// Which GPU the CPU stands in for: its compute capability (80, 86, 89, 90, 100 or 120, as nvcc
// writes them), which decides how much shared memory there is and that 90 has wgmma, and the number
// of its multiprocessors. The default is 100 with 2.
void set_gpu(int capability, int multiprocessors);

// Of launches with more blocks than this number, the blocks before it aren't run: for grids too
// large to run whole.
void set_first_block(uint64_t number);

// Leaves out a kernel's waits, arrivals, fences and barriers of one line of a source file, whose
// path ends so; 0: none (left_out.h).
void leave_out(const std::string& file, int line);

// The number of kernels launched, and their bank conflicts, since the last reset.
int64_t launch_count();
std::vector<BankConflicts> bank_conflicts();
void reset_records();

}  // namespace host
}  // namespace bertfast
