#include "host/earlier.h"

#include <stdexcept>
#include <string>

#include "host/scheduler.h"

namespace bertfast {
namespace host {
namespace earlier {
namespace {

bool launched_early = false;
int waited = 0;

}  // namespace

void await() {
  ++waited;
}

void begin_block(bool early) {
  launched_early = early;
  waited = 0;
}

void end_block(int threads) {
  if (!launched_early || waited == threads) return;
  throw std::runtime_error(block_name() + " was launched early, but only " +
                           std::to_string(waited) + " of its " + std::to_string(threads) +
                           " threads waited once for earlier kernels");
}

}  // namespace earlier
}  // namespace host
}  // namespace bertfast
