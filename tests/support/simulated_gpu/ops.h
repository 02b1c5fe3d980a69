// Torch's ops on the devices: the CPU's, on the same memory.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/TensorFactories.h>

#include <unordered_set>

#include "device.h"
#include "host_view.h"

namespace simulated {
namespace {

// 1. Any op.

const std::unordered_set<std::string> kWaiting = {"aten::_local_scalar_dense",
                                                  "aten::nonzero",
                                                  "aten::nonzero.out",
                                                  "aten::masked_select",
                                                  "aten::equal",
                                                  "aten::masked_select.out",
                                                  "aten::_unique2",
                                                  "aten::unique_dim",
                                                  "aten::unique_consecutive",
                                                  "aten::bincount",
                                                  "aten::multinomial"};

// Their tensors may lie on several devices.
const std::unordered_set<std::string> kMixed = {"aten::index.Tensor", "aten::index.Tensor_out",
                                                "aten::index_put_", "aten::_index_put_impl_"};

template<class Function>
IValue map_tensors(const IValue& value, Function&& function) {
  if (value.isTensor()) return function(value.toTensor());
  if (value.isTensorList()) {
    List<Tensor> out;
    for (const Tensor& t : value.toTensorVector()) out.push_back(function(t));
    return out;
  }
  if (value.isOptionalTensorList()) {
    List<std::optional<Tensor>> out;
    for (const std::optional<Tensor>& t : value.toOptionalTensorVector()) {
      out.push_back(t ? std::optional<Tensor>(function(*t)) : std::nullopt);
    }
    return out;
  }
  return value;
}

// The device of a call's tensors. Raises as CUDA does where they lie on several: only numbers may
// come from the CPU.
std::optional<Device> common_device(const torch::jit::Stack& stack, size_t begin,
                                    const std::string& name) {
  std::optional<Device> device;
  bool from_cpu = false;
  for (size_t i = begin; i < stack.size(); ++i) {
    map_tensors(stack[i], [&](const Tensor& t) {
      if (t.defined() && t.is_cuda()) {
        TORCH_CHECK(!device || *device == t.device(),
                    "Expected all tensors to be on the same "
                    "device, but found at least two devices, ",
                    *device, " and ", t.device(), "! (", name, ")");
        device = t.device();
      } else if (t.defined() && t.dim() > 0) {
        from_cpu = true;
      }
      return t;
    });
  }
  TORCH_CHECK(!device || !from_cpu,
              "Expected all tensors to be on the same device, but found at "
              "least two devices, cuda and cpu! (",
              name, ")");
  return device;
}

// A value that index_put_ fills in by masked_fill_.
bool is_number(const Tensor& t) {
  return t.numel() == 1 && t.device().is_cpu();
}

bool is_mask(const Tensor& t) {
  return t.defined() && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte);
}

void on_host(const OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  std::string name = schema.name();
  if (!schema.overload_name().empty()) name += "." + schema.overload_name();
  const size_t begin = stack->size() - schema.arguments().size();
  HostView view;
  // index.Tensor finds a mask's places by an op of its own, nonzero.
  const bool filled_by_mask =
      name == "aten::_index_put_impl_" && !is_number((*stack)[begin + 2].toTensor());
  const bool mixed = kMixed.count(name);
  if (!mixed) view.device = common_device(*stack, begin, name);
  const DeviceIndex device = view.device ? view.device->index() : current_device;
  if (kWaiting.count(name)) waited(device, name);
  if (name == "aten::repeat_interleave.Tensor" && (*stack)[begin + 1].isNone()) {
    waited(device, name);
  }
  for (size_t i = begin; i < stack->size(); ++i) {
    IValue& value = (*stack)[i];
    if (value.isDevice() && value.toDevice().is_cuda()) {
      if (!view.device) view.device = with_index(value.toDevice());
      value = Device(at::kCPU);
      continue;
    }
    const auto* alias = schema.arguments()[i - begin].alias_info();
    const bool write = alias && alias->isWrite();
    const bool by_mask = filled_by_mask && value.isOptionalTensorList();
    value = map_tensors(value, [&](const Tensor& t) {
      if (t.defined() && t.is_cuda()) {
        if (by_mask && is_mask(t)) waited(t.device().index(), name + " by a mask");
        if (t.has_storage()) touch(t.storage().data(), write ? Use::kWrite : Use::kRead);
      }
      return view.to_host(t);
    });
  }
  if (!view.device) view.device = cuda(current_device);
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  }
  view.follow_resizes();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    (*stack)[i] = map_tensors((*stack)[i], [&](const Tensor& t) { return view.to_device(t); });
  }
}

// 2. What makes memory, and what looks at it in another way.

Tensor empty(IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  const DeviceGuard guard(with_index(device.value_or(cuda(-1))));
  return at::detail::empty_generic(size, &memory, DispatchKeySet(DispatchKey::CUDA),
                                   dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  const DeviceGuard guard(with_index(device.value_or(cuda(-1))));
  return at::detail::empty_strided_generic(size, stride, &memory, DispatchKeySet(DispatchKey::CUDA),
                                           dtype_or_default(dtype));
}

Tensor efficient_zero(IntArrayRef size, std::optional<at::ScalarType> dtype,
                      std::optional<at::Layout>, std::optional<Device> device,
                      std::optional<bool>) {
  at::native::ZeroTensorAllocator nothing(with_index(device.value_or(cuda(-1))));
  const auto keys = DispatchKeySet(DispatchKey::CUDA) | DispatchKeySet(DispatchKey::ZeroTensor);
  return at::detail::empty_generic(size, &nothing, keys, dtype_or_default(dtype), std::nullopt);
}

const Tensor& resize_(const Tensor& self, IntArrayRef size,
                      std::optional<at::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  if (self.sizes() != size) impl->set_sizes_contiguous(size);
  if (format) impl->empty_tensor_restride(*format);
  const size_t bytes =
      self.numel() ? at::detail::computeStorageNbytes(self.sizes(), self.strides(), self.itemsize(),
                                                      self.storage_offset())
                   : 0;
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (storage->nbytes() < bytes) {
    const DeviceGuard guard(self.device());
    DataPtr data = memory.allocate(bytes);
    if (storage->nbytes()) std::memcpy(data.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(data));
    storage->set_nbytes(bytes);
  }
  return self;
}

void touch(const Tensor& t, Use use) {
  if (t.is_cuda()) simulated::touch(t.storage().data(), use);
}

// Between two devices, torch makes each one's stream wait for the other's, before and after.
void join_streams(const Tensor& a, const Tensor& b) {
  if (!a.is_cuda() || !b.is_cuda() || a.device() == b.device()) return;
  const int one = current_stream(a.device().index()), other = current_stream(b.device().index());
  const Clock first = record(one), second = record(other);
  wait(one, second);
  wait(other, first);
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  if (!self.is_cuda()) waited(source.device().index(), "copy to the host");
  if (!source.is_cuda() && !non_blocking) waited(self.device().index(), "copy to the device");
  join_streams(self, source);
  touch(source, Use::kRead);
  touch(self, Use::kWrite);
  HostView view;
  static auto op = Dispatcher::singleton()
                       .findSchemaOrThrow("aten::copy_", "")
                       .typed<Tensor&(Tensor&, const Tensor&, bool)>();
  Tensor to = view.to_host(self);
  const Tensor from = view.to_host(source);
  at::AutoDispatchBelowADInplaceOrView below;
  op.redispatch(DispatchKeySet(DispatchKey::CPU), to, from, false);
  join_streams(self, source);
  return self;
}

Tensor& set_storage(Tensor& self, Storage source, int64_t offset, IntArrayRef size,
                    IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset);
  if (stride.data() && stride.size() == size.size()) {
    impl->set_sizes_and_strides(size, stride);
  } else {
    impl->set_sizes_contiguous(size);
  }
  return self;
}

Tensor& set_whole_storage(Tensor& self, Storage source) {
  const int64_t count = source.nbytes() / self.itemsize();
  return set_storage(self, std::move(source), 0, {count}, {1});
}

void record_stream(Tensor& self, Stream stream) {
  std::lock_guard lock(Blocks::known().mutex);
  Block* block = Blocks::known().find(self.storage().data());
  if (block) block->accesses.recorded(number_of(stream));
}

// For a kernel that reads and writes memory by itself.
Tensor host_view(const Tensor& t) {
  touch(t, Use::kUnknown);
  return HostView().to_host(t);
}

}  // namespace
}  // namespace simulated
