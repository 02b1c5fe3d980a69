// Two "cuda" devices for torch's CPU build: their memory is the host's, their kernels are the
// CPU's.
//
//   memory.h      allocations that show what is unwritten, and what is written beside
//   order.h       streams, events, and who has to wait for whom
//   device.h      the devices as torch knows them
//   host_view.h   a call's tensors as the CPU's
//   ops.h         torch's ops on the devices
//   attention.h   its attention
//   here          all that is registered with torch, and what Python asks and sets
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include "attention.h"
#include "ops.h"

namespace at::native {
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &simulated::choose_attention)
}  // namespace at::native

TORCH_LIBRARY(simulated_gpu, m) {
  m.def("host_view(Tensor x) -> Tensor");
}
TORCH_LIBRARY_IMPL(simulated_gpu, CUDA, m) {
  m.impl("host_view", TORCH_FN(simulated::host_view));
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&simulated::on_host>());
}
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(simulated::empty));
  m.impl("empty_strided", TORCH_FN(simulated::empty_strided));
  m.impl("_efficientzerotensor", TORCH_FN(simulated::efficient_zero));
  m.impl("resize_", TORCH_FN(simulated::resize_));
  m.impl("copy_", TORCH_FN(simulated::copy_));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(simulated::set_storage));
  m.impl("set_.source_Storage", TORCH_FN(simulated::set_whole_storage));
  m.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
  m.impl("record_stream", TORCH_FN(simulated::record_stream));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("view_as_real", TORCH_FN(at::native::view_as_real));
  m.impl("view_as_complex", TORCH_FN(at::native::view_as_complex));
  m.impl("_scaled_dot_product_fused_attention_overrideable", TORCH_FN(simulated::attention));
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward",
         TORCH_FN(simulated::attention_backward));
  // Those have a composite kernel too, which would come first.
  for (const char* name : {"native_layer_norm", "native_dropout", "native_dropout_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&simulated::on_host>());
  }
}

extern "C" {

using namespace simulated;

// The device that an address lies on; -1: none.
int simulated_device_of(const void* address) {
  std::lock_guard lock(Blocks::known().mutex);
  const Block* block = Blocks::known().find(address);
  return block ? block->device : -1;
}

long simulated_waits() {
  return waits;
}
const char* simulated_last_wait() {
  return last_wait.c_str();
}
void simulated_set_capturing(bool on) {
  capturing = on;
}

// Overruns of what is allocated now, and all faults since the last call.
const char* simulated_take_faults() {
  static std::string taken;
  Blocks& blocks = Blocks::known();
  std::lock_guard lock(blocks.mutex);
  for (auto& [address, block] : blocks.all) {
    look_for_overrun(*block);
    if (block->overrun()) {
      std::memset(block->base, kForbidden, kZone);
      std::memset(block->begin() + block->bytes, kForbidden, kZone);
    }
  }
  taken = std::move(blocks.faults);
  blocks.faults.clear();
  return taken.c_str();
}

int simulated_new_stream(int device) {
  return new_stream(device);
}
int simulated_current_stream(int device) {
  return current_stream(device);
}
void simulated_set_stream(int device, int stream) {
  current_streams[device] = stream;
}
void* simulated_record(int stream) {
  return new Clock(record(stream));
}
void simulated_wait(int stream, void* event) {
  wait(stream, *static_cast<Clock*>(event));
}
void simulated_host_waits(void* event) {
  host_waits(*static_cast<Clock*>(event));
}
void simulated_host_waits_for_all(int device) {
  host_waits_for_all(device);
}
void simulated_drop_event(void* event) {
  delete static_cast<Clock*>(event);
}
}
