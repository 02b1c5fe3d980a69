// The two ways to shared memory: that of ordinary accesses, and that of the engines (bulk copies
// and wgmma). What goes by the one is seen by the other only after a fence.
//
// A thread's fence is asked for between its access and whatever makes the access known to the
// thread that starts an engine. The memory model would let the latter fence instead; nobody writes
// it so.
#pragma once

#include <cstdint>

#include "host/site.h"

namespace bertfast {
namespace host {
namespace proxy {

void begin_block();

// fence.proxy.async by the running thread.
void fence(Site site);

// Whether `thread` has fenced after an access at time `access`, and before `until`.
bool fenced(int thread, uint64_t access, uint64_t until);

}  // namespace proxy
}  // namespace host
}  // namespace bertfast
