// The launches of attention's kernels, one for each. launch.cu chooses between them.
#pragma once

#include "device/gpu.cuh"
#include "params.h"

namespace bertfast {

// By mma.sync, in tiles of 64 rows, on every GPU and for every call.
cudaError_t launch_forward_tiles(const AttentionForward&, DType, Stream);
cudaError_t launch_dq_tiles(const AttentionBackward&, DType, Stream);
cudaError_t launch_dkv_tiles(const AttentionBackward&, DType, Stream);

// The same with a window and a bias by distance, of calls that have one of them. The backward is
// also that of rotary positions.
cudaError_t launch_forward_by_position(const AttentionForward&, DType, Stream);
cudaError_t launch_dq_by_position(const AttentionBackward&, DType, Stream);
cudaError_t launch_dkv_by_position(const AttentionBackward&, DType, Stream);

// By mma.sync, 128 queries, or keys, a block, for calls that it takes.
bool forward_double_takes(const AttentionForward&, DType, const Gpu&);
cudaError_t launch_forward_double(const AttentionForward&, DType, Stream);
bool dq_double_takes(const AttentionBackward&, const Gpu&);
cudaError_t launch_dq_double(const AttentionBackward&, DType, Stream);
bool dkv_double_takes(const AttentionBackward&, const Gpu&);
cudaError_t launch_dkv_double(const AttentionBackward&, DType, Stream);

// For Hopper, by bulk copies and wgmma, in pairs of tiles: of the calls that fit.
bool fits_bulk_backward(const AttentionBackward&);
cudaError_t launch_dq_bulk(const AttentionBackward&, DType, Stream);
cudaError_t launch_dkv_bulk(const AttentionBackward&, DType, Stream);

// By bulk copies and wgmma, of 128 queries a block, where it takes the call: on Hopper, sequences
// of more than 128 tokens whose heads bulk copies can find.
bool forward_bulk_takes(const AttentionForward&, const Gpu&);
cudaError_t launch_forward_bulk(const AttentionForward&, DType, Stream);

}  // namespace bertfast
