// setmaxnreg: registers that a warpgroup gives up, and that another waits for.
#pragma once

#include <string>

#include "host/site.h"

namespace bertfast {
namespace host {
namespace registers {

void begin_block();

// The running thread's warpgroup goes on with `wanted` registers a thread, in a kernel that was
// launched with `at_launch`.
void set(int at_launch, int wanted, Site site);

// Who waits for how many, a line each, for a deadlock's message.
std::string asked_for();

}  // namespace registers
}  // namespace host
}  // namespace bertfast
