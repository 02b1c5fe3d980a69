// Polynomials of the exact GELU. Written by bertfast/ops/bias_gelu/fit.py, which says
// what they are; a test holds them to those of Triton.
#pragma once

#include "device/cuda.cuh"

namespace bertfast {

inline constexpr float kGeluLimit = 16.0f;  // of their argument

// Degree 6; largest error 0.055 float16 ulp.
__device__ __forceinline__ float gelu_forward_16(float z) {
  float value = 2.039573e-05f;
  value = fmaf(value, z, -0.0005942269f);
  value = fmaf(value, z, 0.007203249f);
  value = fmaf(value, z, -0.05142395f);
  value = fmaf(value, z, -0.4607787f);
  value = fmaf(value, z, -1.15047f);
  value = fmaf(value, z, -1.0000398f);
  return value;
}

// Degree 8; largest error 1.6 u of max(result, 0.1).
__device__ __forceinline__ float gelu_forward_32(float z) {
  float value = -1.9449765e-06f;
  value = fmaf(value, z, 2.872136e-05f);
  value = fmaf(value, z, -0.00013565739f);
  value = fmaf(value, z, -0.000258289f);
  value = fmaf(value, z, 0.007220022f);
  value = fmaf(value, z, -0.05260185f);
  value = fmaf(value, z, -0.45917514f);
  value = fmaf(value, z, -1.1511086f);
  value = fmaf(value, z, -1.0f);
  return value;
}

// Degree 8; largest error 0.046 float16 ulp of max(result, 0.001).
__device__ __forceinline__ float gelu_backward_16(float z) {
  float value = 1.7513656e-05f;
  value = fmaf(value, z, -0.00034536008f);
  value = fmaf(value, z, 0.0029691178f);
  value = fmaf(value, z, -0.014924773f);
  value = fmaf(value, z, 0.050286543f);
  value = fmaf(value, z, -0.12513919f);
  value = fmaf(value, z, 0.24725196f);
  value = fmaf(value, z, -0.7974707f);
  value = fmaf(value, z, 0.4999893f);
  return value;
}

// Degree 12; largest error 1.6 u of max(result, 0.2).
__device__ __forceinline__ float gelu_backward_32(float z) {
  float value = 5.6012983e-08f;
  value = fmaf(value, z, -1.5449931e-06f);
  value = fmaf(value, z, 1.9303223e-05f);
  value = fmaf(value, z, -0.00014642839f);
  value = fmaf(value, z, 0.00076766615f);
  value = fmaf(value, z, -0.0030273695f);
  value = fmaf(value, z, 0.009616821f);
  value = fmaf(value, z, -0.02602626f);
  value = fmaf(value, z, 0.062235653f);
  value = fmaf(value, z, -0.13290736f);
  value = fmaf(value, z, 0.2499895f);
  value = fmaf(value, z, -0.797884f);
  value = fmaf(value, z, 0.5f);
  return value;
}

}  // namespace bertfast
