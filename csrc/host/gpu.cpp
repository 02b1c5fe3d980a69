#include "host/gpu.h"

namespace bertfast {
namespace host {

Gpu gpu = {100, 2, 228 * 1024};

int most_shared_memory() {
  return gpu.shared_memory - 1024;  // a block costs a kilobyte more than it asks for
}

}  // namespace host
}  // namespace bertfast
