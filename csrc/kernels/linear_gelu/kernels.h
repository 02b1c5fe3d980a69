// The launches of linear_gelu's kernels, one for each. launch.cu chooses between them.
#pragma once

#include <type_traits>

#include "device/gpu.cuh"
#include "device/types.cuh"
#include "params.h"

namespace bertfast {

// Rows, and columns, of a block's tile: and rows of a partial sum for dbias.
constexpr int kLinearGeluTile = 128;

// By mma.sync, on every GPU and for every call.
cudaError_t launch_forward_by_warps(LinearGeluForward, bool tanh, DType, const Gpu&, Stream);
cudaError_t launch_backward_by_warps(LinearGeluBackward, bool tanh, DType, Stream);

// By wgmma, on compute capability 9.0. None is launched where `done` becomes false: bulk copies
// can't describe an operand, or the module was built without code for sm_90a.
cudaError_t launch_forward_ping_pong(const LinearGeluForward&, bool tanh, DType, const Gpu&, Stream,
                                     bool* done);
cudaError_t launch_backward_ping_pong(const LinearGeluBackward&, bool tanh, DType, const Gpu&,
                                      Stream, bool* done);

// Calls use(T(), kTanh), the latter as a type.
template<class Use>
cudaError_t with_form(DType dtype, bool tanh, Use use) {
  return with_half(
      dtype, [&](auto t) { return tanh ? use(t, std::true_type()) : use(t, std::false_type()); });
}

}  // namespace bertfast
