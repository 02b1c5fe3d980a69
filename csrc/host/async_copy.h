// cp.async: copies into shared memory that are under way until their thread waits for them.
//
// The source is read when a copy is issued, but its bytes land only in the wait. Until then any
// other access to them is an error: on a GPU it would see the old bytes, the new ones or some of
// each. A copy counts as a write twice, when it is issued and when it lands, so the race check sees
// a reader that wasn't done before the issue as well as one that doesn't wait for a barrier.
#pragma once

#include "host/site.h"

namespace bertfast {
namespace host {
namespace async_copy {

void begin_block(int shared_bytes);
// Throws if a copy is still under way: a thread must wait for what it has issued.
void end_block();
void abandon_block();

// The running thread copies `size` bytes, or zeros if `from` is null, to byte `byte`.
void issue(int byte, int size, const void* from, Site site);
void commit();
// All groups of the running thread but the last `left` have landed.
void wait(int left);

// Throws if a copy to these bytes is under way.
void check_landed(int byte, int size, const char* access, Site site);

}  // namespace async_copy
}  // namespace host
}  // namespace bertfast
