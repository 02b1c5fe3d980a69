// The wait for earlier kernels. Here they have ended, but a kernel that was launched early and has
// a thread that doesn't wait is found.
#pragma once

namespace bertfast {
namespace host {
namespace earlier {

void await();

// early: whether the block belongs to a kernel that was launched early.
void begin_block(bool early);
// Throws if not all of its threads have waited.
void end_block(int threads);

}  // namespace earlier
}  // namespace host
}  // namespace bertfast
