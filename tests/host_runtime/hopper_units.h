// Units of Hopper's instructions: small kernels that bytes go into and come out of.
//
// They run on the CPU as cases of this folder's program, and on a GPU in a program of their own,
// which nvcc makes of hopper_*.cu. tests/support/hopper_units.py says what must come out.
#pragma once

#include <vector>

#include "device/cuda.cuh"

namespace bertfast {
namespace hopper_units {

using Numbers = std::vector<int>;  // a unit's arguments

// in: 16-byte aligned.
using Unit = cudaError_t (*)(const Numbers& numbers, const void* in, void* out);

cudaError_t run_wgmma(const Numbers& numbers, const void* in, void* out);
cudaError_t run_copy(const Numbers& numbers, const void* in, void* out);
cudaError_t run_stmatrix(const Numbers& numbers, const void* in, void* out);
cudaError_t run_pipeline(const Numbers& numbers, const void* in, void* out);

}  // namespace hopper_units
}  // namespace bertfast
