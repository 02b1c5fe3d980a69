// One plain struct per op, and the functions that launch its kernels.
//
// bindings.cpp fills the structs from integers; nothing here knows Python or torch. A pointer that
// is null means "absent" for an input and "not wanted" for an output.
#pragma once

#include <cstdint>

#include "device/cuda.cuh"

namespace bertfast {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

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

// out[i][column] = sum over the partials' rows; partial is (sums, n_partials, cols).
struct ColumnSum {
  const float* partial;
  void* out[3];
  int sums;
  int n_partials;
  int cols;
};

cudaError_t launch_layer_norm_forward(const LayerNormForward&, DType x_dtype, DType dtype, Stream);
cudaError_t launch_layer_norm_backward(const LayerNormBackward&, DType x_dtype, DType dtype,
                                       Stream);
cudaError_t launch_bias_gelu_forward(BiasGeluForward, bool tanh, DType x_dtype, DType dtype,
                                     Stream);
cudaError_t launch_bias_gelu_backward(BiasGeluBackward, bool tanh, DType x_dtype, DType dtype,
                                      Stream);
cudaError_t launch_column_sum(const ColumnSum&, DType dtype, Stream);

// How many rows a block of layer_norm's backward works on at a time.
int layer_norm_rows_per_block(int cols, DType dtype);

}  // namespace bertfast
