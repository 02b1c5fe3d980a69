// Which kernels a call of attention runs.
#include "device/gpu.cuh"
#include "kernels/attention/kernels.h"

namespace bertfast {

cudaError_t launch_attention_forward(const AttentionForward& p, DType dtype, Stream stream) {
  Gpu gpu;
  const cudaError_t error = current_gpu(&gpu);
  if (error != cudaSuccess) return error;
  if (p.batch.scores.by_position) return launch_forward_by_position(p, dtype, stream);
  if (forward_bulk_takes(p, gpu)) return launch_forward_bulk(p, dtype, stream);
  if (forward_double_takes(p, dtype, gpu)) return launch_forward_double(p, dtype, stream);
  return launch_forward_tiles(p, dtype, stream);
}

// dq's kernel leaves statistics for the other one.
cudaError_t launch_attention_backward(const AttentionBackward& p, DType dtype, Stream stream) {
  const AttentionScores& scores = p.batch.scores;
  Gpu gpu;
  cudaError_t error = current_gpu(&gpu);
  if (error != cudaSuccess) return error;
  if (scores.by_position) {
    error = launch_dq_by_position(p, dtype, stream);
    return error == cudaSuccess ? launch_dkv_by_position(p, dtype, stream) : error;
  }
  const bool bulk = gpu.capability == 90 && fits_bulk_backward(p);
  error = bulk                      ? launch_dq_bulk(p, dtype, stream)
          : dq_double_takes(p, gpu) ? launch_dq_double(p, dtype, stream)
          : scores.half             ? launch_dq_by_position(p, dtype, stream)
                                    : launch_dq_tiles(p, dtype, stream);
  if (error != cudaSuccess) return error;
  return bulk                       ? launch_dkv_bulk(p, dtype, stream)
         : dkv_double_takes(p, gpu) ? launch_dkv_double(p, dtype, stream)
         : scores.half              ? launch_dkv_by_position(p, dtype, stream)
                                    : launch_dkv_tiles(p, dtype, stream);
}

}  // namespace bertfast
