// One plain struct per op, and the functions that launch its kernels.
//
// csrc/bindings fills the structs from torch tensors; nothing here knows Python or torch. A pointer
// that is null means "absent" for an input and "not wanted" for an output.
#pragma once

#include <cstdint>

#include "device/cuda.cuh"

namespace bertfast {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

enum class Activation : int { kGelu = 0, kGeluTanh = 1, kSilu = 2 };

// Rows of x and residual are dense, x_row_stride and residual_row_stride elements apart; y and z
// are contiguous. x has x_dtype; residual, x_bias, weight, bias, y and z have dtype.
struct LayerNormForward {
  const void* x;
  const void* residual;
  const void* x_bias;
  const void* weight;
  const void* bias;
  const int64_t* seed;       // one element; null: no dropout
  const int64_t* row_index;  // the rows' numbers in the dropout mask; null: 0, 1, 2, ...
  void* y;
  void* z;
  float* mean;
  float* rstd;
  int rows;
  int x_row_stride;
  int residual_row_stride;
  int cols;
  float inv_cols;  // 1 / cols
  float eps;
  float keep_scale;
  uint32_t threshold;
  uint32_t site;
};

// For kernels that write y a second time. A struct of its own, as the others' code would be longer
// with a longer one.
struct LayerNormForwardCopying : LayerNormForward {
  void* copy;  // contiguous, in x_dtype, which is narrower than dtype
};

// For kernels of every further form: bias may be null, and so may weight, where nothing is
// normalised.
struct LayerNormForwardFurther : LayerNormForwardCopying {
  bool rms;  // RMSNorm: a row's mean is taken as 0
};

// dx has x_dtype, all else but the float32 statistics and partial sums has dtype.
struct LayerNormBackward {
  const void* dy;
  const void* z;
  const float* mean;
  const float* rstd;
  const void* weight;
  const int64_t* seed;
  const int64_t* row_index;
  void* dz;
  void* dx;
  float* partial_dweight;  // (blocks, cols) each
  float* partial_dbias;
  float* partial_dx_bias;
  int rows;
  int dy_row_stride;
  int z_row_stride;
  int cols;
  float inv_cols;
  int blocks;
  float keep_scale;
  uint32_t threshold;
  uint32_t site;
};

// For kernels of every further form: mean may be null, of RMSNorm, and so may partial_dbias. Where
// nothing was normalised z, mean, rstd and weight are null.
struct LayerNormBackwardFurther : LayerNormBackward {
  const void* dsum;  // the gradient of z itself, null where z was not returned
  int dsum_row_stride;
};

// x has x_dtype, with rows x_row_stride elements apart; bias and y have dtype, y is contiguous.
struct BiasGeluForward {
  const void* x;
  const void* bias;
  void* y;
  int rows;
  int x_row_stride;
  int cols;
  int tiles;  // blocks beside each other in a row; set by the launch
};

// x and dx have x_dtype, dy and bias have dtype; dx is contiguous and may not be null.
struct BiasGeluBackward {
  const void* dy;
  const void* x;
  const void* bias;
  void* dx;
  float* partial_dbias;  // (chains, cols)
  int rows;
  int dy_row_stride;
  int x_row_stride;
  int cols;
  int chains;  // threads that walk down the rows side by side
  int tiles;
};

// All have one dtype. A row of x, of bias and of the gradients has two halves of `cols` columns,
// which begin at `activated` and `gate`: 0 and cols, or the other way round. y is contiguous.
struct GatedForward {
  const void* x;  // rows x_row_stride elements apart
  const void* bias;
  void* y;
  int rows;
  int x_row_stride;
  int cols;
  int activated;
  int gate;
  int tiles;  // blocks beside each other in a row; set by the launch
};

// dx is contiguous and may not be null.
struct GatedBackward {
  const void* dy;
  const void* x;
  const void* bias;
  void* dx;
  float* partial_dbias;  // (chains, 2 * cols); null where bias is
  int rows;
  int dy_row_stride;
  int x_row_stride;
  int cols;
  int activated;
  int gate;
  int chains;  // threads that walk down the rows side by side
  int tiles;
};

// Widths (inner and cols) and strides are multiples of 8, and all but partial_dbias begins at a
// multiple of 16 bytes. x and weight have their rows strides apart; bias, y and u are dense.
struct LinearGeluForward {
  const void* x;       // (rows, inner)
  const void* weight;  // (cols, inner)
  const void* bias;
  void* y;  // (rows, cols)
  void* u;
  int rows;  // at most 2^30
  int inner;
  int cols;
  int x_row_stride;
  int weight_row_stride;
  int group_bits;  // of the order of tiles; set by the launch
};

// The same; dv is dense.
struct LinearGeluBackward {
  const void* dy;      // (rows, inner)
  const void* weight;  // (inner, cols)
  const void* u;       // (rows, cols)
  const void* bias;
  void* dv;
  float* partial_dbias;  // (tiles of linear_gelu_tile_rows(), dv's columns)
  int rows;
  int inner;
  int cols;
  int dy_row_stride;
  int weight_row_stride;
  int group_bits;
};

// The same with a gated activation. u, du (in dv's place), bias and the forward's weight have 2 *
// cols columns, or rows, those first that are activated; y has cols, as the backward's weight.
struct LinearGatedForward : LinearGeluForward {
  Activation activation;
};

struct LinearGatedBackward : LinearGeluBackward {
  Activation activation;
};

// out[i][column] = sum over the partials' rows; partial is (sums, n_partials, cols).
struct ColumnSum {
  const float* partial;
  void* out[3];
  int sums;
  int n_partials;
  int cols;
};

// Rows of a head: element d of token n of head h of sequence b is data[b * batch + n * token +
// h * head + d]. Packed tensors count tokens from the first of the first sequence, and batch is 0.
// data is 16-byte aligned, and the strides are multiples of 8.
template<class Void>
struct HeadRows {
  Void* data;
  int64_t batch;
  int64_t head;
  int token;
};

// What makes scores of q and k, but for the scale: bertfast/ops/attention/scores.py. Rotary
// positions are in q and k already; the backward's kernels rotate the gradients back.
struct AttentionScores {
  const void* bias;  // (heads, 2 * reach + 1), dense, in bias_dtype; null: none
  int reach;
  int left;  // a query sees the keys from `left` before it to `right` behind it
  int right;
  DType bias_dtype;
  bool by_position;  // whether there is a bias, or a window
  int half;          // columns of half a head; 0: no rotary positions
  const float* cos;  // (positions, half), dense, in whole vectors of 16 bytes
  const float* sin;
};

// Where attention's sequences lie, which keys count and how: of forward and backward alike.
struct AttentionBatch {
  const uint8_t* key_mask;    // (batch, length), rows mask_batch apart, 0: masked; null: all count
  const int32_t* cu_seqlens;  // first token of each sequence, and the end; null: padded
  const int32_t* tiles;  // the plan's list of (sequence, first position, sequences); null: none
  const int64_t* seed;   // one element; null: no dropout
  int64_t mask_batch;
  int64_t lse_batch;  // strides of the statistics' sequences and heads
  int64_t lse_head;
  int batch;  // sequences
  int heads;
  int head_dim;
  int length;     // of a padded sequence; of the longest packed one
  int plan_size;  // entries of tiles
  int tile;       // rows of a tile: 32 or 64, and 64 without a plan
  int n_tiles;    // of a head's sequence, or of a head where there is a plan; the launcher fills it
  float scale;
  float keep_scale;
  uint32_t threshold;  // at most 65535; where nothing is kept keep_scale is 0
  uint32_t site;
  AttentionScores scores;  // at the end: in front of the numbers it costs some kernels registers
};

// Queries and keys by their positions. Here strides may be anything.
struct AttentionRotation {
  AttentionBatch batch;  // its heads are groups of them, as the launch has it
  HeadRows<const void> q;
  HeadRows<const void> k;
  HeadRows<void> rotated_q;
  HeadRows<void> rotated_k;
  const float* cos;  // (positions, half), dense, in whole vectors of 16 bytes
  const float* sin;
  int half;   // of a head's columns
  int heads;  // set by the launch
};

struct AttentionForward {
  AttentionBatch batch;
  HeadRows<const void> q;
  HeadRows<const void> k;
  HeadRows<const void> v;
  HeadRows<void> out;
  float* lse;  // null: not wanted
};

struct AttentionBackward {
  AttentionBatch batch;
  HeadRows<const void> dout;
  HeadRows<const void> q;
  HeadRows<const void> k;
  HeadRows<const void> v;
  HeadRows<const void> out;
  const float* lse;
  // For each row (lse, delta / keep_scale), strides as lse's: from the first kernel to the
  // second.
  float2* statistics;
  HeadRows<void> dq;
  HeadRows<void> dk;
  HeadRows<void> dv;
};

// Of each head the sums over all distances, from -length / 2 on, that a share of the sequences has:
// the length is diagonals + 1 blocks of 64, and there are two lines of it for each share, to be
// added. What isn't written is zero before.
struct AttentionBiasGradient {
  AttentionBatch batch;  // without tiles
  HeadRows<const void> dout;
  HeadRows<const void> q;
  HeadRows<const void> k;
  HeadRows<const void> v;
  const float2* statistics;  // as the kernel for dq has left them
  float* partial;            // (shares, 2, heads, length)
  int diagonals;             // of blocks of 64 x 64 scores; the one in the middle has distance 0
  int shares;
  int each;  // sequences of a share
};

// What is null or false is not done; a call that needs no further form runs a kernel without it.
cudaError_t launch_layer_norm_forward(const LayerNormForwardFurther&, DType x_dtype, DType dtype,
                                      Stream);
cudaError_t launch_layer_norm_backward(const LayerNormBackwardFurther&, DType x_dtype, DType dtype,
                                       Stream);
cudaError_t launch_bias_gelu_forward(BiasGeluForward, bool tanh, DType x_dtype, DType dtype,
                                     Stream);
cudaError_t launch_bias_gelu_backward(BiasGeluBackward, bool tanh, DType x_dtype, DType dtype,
                                      Stream);
cudaError_t launch_gated_forward(GatedForward, Activation, DType, Stream);
cudaError_t launch_gated_backward(GatedBackward, Activation, DType, Stream);
cudaError_t launch_linear_gelu_forward(const LinearGeluForward&, bool tanh, DType, Stream);
cudaError_t launch_linear_gelu_backward(const LinearGeluBackward&, bool tanh, DType, Stream);
cudaError_t launch_linear_gated_forward(const LinearGatedForward&, DType, Stream);
cudaError_t launch_linear_gated_backward(const LinearGatedBackward&, DType, Stream);
cudaError_t launch_column_sum(const ColumnSum&, DType dtype, Stream);
cudaError_t launch_attention_rotate(const AttentionRotation&, DType, Stream);
cudaError_t launch_attention_forward(const AttentionForward&, DType, Stream);
cudaError_t launch_attention_backward(const AttentionBackward&, DType, Stream);
cudaError_t launch_attention_backward_bias(const AttentionBiasGradient&, DType, Stream);

// Whether the current device can load the kernels: tried with one of them.
cudaError_t load_a_kernel();

// A block of layer_norm's backward.
struct RowBlock {
  int rows;                // at a time
  int per_multiprocessor;  // blocks that there are registers for
};
RowBlock layer_norm_backward_block(int cols, DType dtype);

// The rows that a partial sum of linear_gelu's backward, and of linear_gated's, is of.
int linear_gelu_tile_rows();

}  // namespace bertfast
