// Which kernels a call of attention runs.
#include "kernels/attention/kernels.h"

namespace bertfast {

cudaError_t launch_attention_forward(const AttentionForward& p, DType dtype, Stream stream) {
  return launch_forward_tiles(p, dtype, stream);
}

// dq's kernel leaves statistics for the other one.
cudaError_t launch_attention_backward(const AttentionBackward& p, DType dtype, Stream stream) {
  const cudaError_t error = launch_dq_tiles(p, dtype, stream);
  return error != cudaSuccess ? error : launch_dkv_tiles(p, dtype, stream);
}

}  // namespace bertfast
