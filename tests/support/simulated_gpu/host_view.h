// One call's tensors as CPU tensors over the same memory, and what it returns as the device's.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>

#include <optional>
#include <utility>
#include <vector>

#include "memory.h"

namespace simulated {

using at::Tensor;
using c10::Storage;

class HostView {
 public:
  std::optional<c10::Device> device;  // of the first tensor; where results go

  Tensor to_host(const Tensor& t) {
    if (!t.defined() || !t.is_cuda()) return t;
    for (auto& [there, here] : tensors_) {
      if (there.is_same(t)) return here;
    }
    if (!device) device = t.device();
    Tensor view = over(t, storage_to_host(t.storage()), c10::DispatchKey::CPU);
    tensors_.emplace_back(t, view);
    return view;
  }

  Tensor to_device(const Tensor& t) {
    if (!t.defined() || !t.device().is_cpu()) return t;
    for (auto& [there, here] : tensors_) {
      if (here.is_same(t)) return there;
    }
    return over(t, storage_to_device(t.storage()), c10::DispatchKey::CUDA);
  }

  // Gives tensors of the device the sizes and the memory that the call gave their views.
  void follow_resizes() {
    for (auto& [there, here] : storages_) {
      if (there.data() == here.data()) continue;
      c10::DeviceGuard guard(there.device());
      there.unsafeGetStorageImpl()->set_data_ptr_noswap(copied(here));
      there.unsafeGetStorageImpl()->set_nbytes(here.nbytes());
    }
    for (auto& [there, here] : tensors_) {
      if (there.sizes() == here.sizes() && there.strides() == here.strides()) continue;
      there.unsafeGetTensorImpl()->set_sizes_and_strides(here.sizes(), here.strides());
    }
  }

 private:
  std::vector<std::pair<Storage, Storage>> storages_;  // the device's, the host's
  std::vector<std::pair<Tensor, Tensor>> tensors_;

  static Tensor over(const Tensor& t, Storage storage, c10::DispatchKey key) {
    Tensor made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage),
                                                           c10::DispatchKeySet(key), t.dtype());
    auto* impl = made.unsafeGetTensorImpl();
    impl->set_storage_offset(t.storage_offset());
    impl->set_sizes_and_strides(t.sizes(), t.strides());
    if (t.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    return made;
  }

  Storage storage_to_host(const Storage& storage) {
    for (auto& [there, here] : storages_) {
      if (there.unsafeGetStorageImpl() == storage.unsafeGetStorageImpl()) return here;
    }
    auto* owner = new Storage(storage);  // the view keeps the memory
    c10::DataPtr data(
        const_cast<void*>(storage.data()), owner,
        [](void* context) { delete static_cast<Storage*>(context); }, at::kCPU);
    Storage view(Storage::use_byte_size_t(), storage.nbytes(), std::move(data),
                 c10::GetCPUAllocator(), true);
    storages_.emplace_back(storage, view);
    return view;
  }

  Storage storage_to_device(const Storage& storage) {
    for (auto& [there, here] : storages_) {
      if (here.unsafeGetStorageImpl() == storage.unsafeGetStorageImpl()) return there;
    }
    c10::DeviceGuard guard(*device);
    Storage made(Storage::use_byte_size_t(), storage.nbytes(), copied(storage), &memory, true);
    storages_.emplace_back(made, storage);
    return made;
  }

  static c10::DataPtr copied(const Storage& storage) {
    c10::DataPtr data = memory.allocate(storage.nbytes());
    if (storage.nbytes()) std::memcpy(data.get(), storage.data(), storage.nbytes());
    return data;
  }
};

}  // namespace simulated
