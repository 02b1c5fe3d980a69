// The GPU that the CPU stands in for, as far as launches and kernels ask what it is.
#pragma once

namespace bertfast {
namespace host {

struct Gpu {
  int capability;       // 90 for 9.0
  int multiprocessors;  // few, as a grid's blocks run one after the other
  int shared_memory;    // bytes, of a multiprocessor
};

// Compute capability 10.0, whose blocks may have most shared memory, unless it is set otherwise:
// control.h.
extern Gpu gpu;

// Bytes of it that a block may ask for.
int most_shared_memory();

}  // namespace host
}  // namespace bertfast
