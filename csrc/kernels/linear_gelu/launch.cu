// Which kernel a call of linear_gelu runs.
#include <algorithm>

#include "kernels/linear_gelu/kernels.h"

namespace bertfast {
namespace {

// With fewer tiles than this most multiprocessors would have none, and nothing would overlap: by
// small tiles of warps all have work. A number and not the GPU's multiprocessors, which are more
// (but where it is shared out, by MIG): sums may differ in bits between the kernels.
constexpr int64_t kFewestTiles = 64;

bool is_for_ping_pong(const Gpu& gpu, int rows, int cols) {
  constexpr int kTile = kLinearGeluTile;
  const int64_t tiles = (int64_t(rows - 1) / kTile + 1) * ((cols - 1) / kTile + 1);
  return gpu.capability == 90 && tiles >= std::min<int64_t>(kFewestTiles, gpu.multiprocessors);
}

}  // namespace

int linear_gelu_tile_rows() {
  return kLinearGeluTile;
}

cudaError_t launch_linear_gelu_forward(const LinearGeluForward& p, bool tanh, DType dtype,
                                       Stream stream) {
  Gpu gpu;
  cudaError_t error = current_gpu(&gpu);
  bool done = false;
  if (error == cudaSuccess && is_for_ping_pong(gpu, p.rows, p.cols)) {
    error = launch_forward_ping_pong(p, tanh, dtype, gpu, stream, &done);
  }
  if (error != cudaSuccess || done) return error;
  return launch_forward_by_warps(p, tanh, dtype, gpu, stream);
}

cudaError_t launch_linear_gelu_backward(const LinearGeluBackward& p, bool tanh, DType dtype,
                                        Stream stream) {
  Gpu gpu;
  cudaError_t error = current_gpu(&gpu);
  bool done = false;
  if (error == cudaSuccess && is_for_ping_pong(gpu, p.rows, p.cols)) {
    error = launch_backward_ping_pong(p, tanh, dtype, gpu, stream, &done);
  }
  if (error != cudaSuccess || done) return error;
  return launch_backward_by_warps(p, tanh, dtype, stream);
}

}  // namespace bertfast
