// scaled_dot_product_attention on the devices. As on a GPU its backward makes the weights again of
// a saved logsumexp, where torch's composed form keeps them: the two round differently.
#pragma once

#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/empty.h>

#include "ops.h"

namespace simulated {
namespace {

using Mask = std::optional<Tensor>;

int64_t choose_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Mask& mask,
                         double dropout, bool, std::optional<double>, bool) {
  const bool known_mask = !mask || mask->dim() == 2 || mask->dim() == 4;
  const bool fused = q.dim() == 4 && q.sizes() == k.sizes() && q.sizes() == v.sizes() &&
                     dropout == 0. && q.numel() && known_mask;
  return static_cast<int64_t>(fused ? at::SDPBackend::overrideable : at::SDPBackend::math);
}

using Attended =
    std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor>;

Attended attention(const Tensor& q, const Tensor& k, const Tensor& v, const Mask& mask,
                   double dropout, bool causal, bool, std::optional<double> scale) {
  auto [out, lse] =
      at::_scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal, mask, scale);
  const Tensor none = at::empty({0}, q.options());
  return {out, lse, none, none, q.size(2), k.size(2), none, none, none};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask,
    std::array<bool, 4>, const Tensor& out, const Tensor& lse, const Tensor&, const Tensor&,
    c10::SymInt, c10::SymInt, double dropout, bool causal, const Tensor&, const Tensor&,
    std::optional<double> scale) {
  auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      dout, q, k, v, out, lse, dropout, causal, mask.defined() ? Mask(mask) : std::nullopt, scale);
  return {dq, dk, dv, Tensor()};
}

}  // namespace
}  // namespace simulated
