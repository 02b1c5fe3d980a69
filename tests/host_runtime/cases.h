// The test program's sub-commands. Each file of kernels registers its own.
#pragma once

#include <string>
#include <vector>

#include "device/cuda.cuh"

namespace bertfast {
namespace host_runtime_test {

using Arguments = std::vector<std::string>;

struct Case {
  Case(const char* name, void (*run)(const Arguments&));
};

// Throws unless the launch was accepted.
void require(cudaError_t error);

}  // namespace host_runtime_test
}  // namespace bertfast
