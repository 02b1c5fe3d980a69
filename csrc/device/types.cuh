// From the element types that a call names to those of a kernel template.
#pragma once

#include "params.h"

namespace bertfast {

// Calls use(X(), T()) with the element types of x and of everything else.
template<class Use>
cudaError_t with_types(DType x_dtype, DType dtype, Use use) {
  if (dtype == DType::kFloat16) return use(__half(), __half());
  if (dtype == DType::kBFloat16) return use(__nv_bfloat16(), __nv_bfloat16());
  if (x_dtype == DType::kFloat16) return use(__half(), float());
  if (x_dtype == DType::kBFloat16) return use(__nv_bfloat16(), float());
  return use(float(), float());
}

// Calls use(T()) with the element type of everything.
template<class Use>
cudaError_t with_type(DType dtype, Use use) {
  if (dtype == DType::kFloat16) return use(__half());
  if (dtype == DType::kBFloat16) return use(__nv_bfloat16());
  return use(float());
}

// The same of kernels by tensor cores, which float32 doesn't reach.
template<class Use>
cudaError_t with_half(DType dtype, Use use) {
  return dtype == DType::kFloat16 ? use(__half()) : use(__nv_bfloat16());
}

}  // namespace bertfast
