// The devices as torch knows them: current ones, streams, events, and where the host waits.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "memory.h"

using namespace c10;

namespace simulated {
namespace {

Device cuda(DeviceIndex index) {
  return Device(DeviceType::CUDA, index);
}

// A stream's id is its number in order.h, or 0 for a device's default stream.
Stream stream_of(Device device, int number) {
  return Stream(Stream::UNSAFE, cuda(device.index()), number < kDevices ? 0 : number);
}
int number_of(const Stream& stream) {
  return stream.id() == 0 ? stream.device_index() : static_cast<int>(stream.id());
}
Device with_index(Device device) {
  return device.has_index() ? device : cuda(current_device);
}

int new_stream(DeviceIndex device) {
  const int number = streams++;
  TORCH_CHECK(number < kStreams, "the simulation has no more streams");
  device_of_stream[number] = device;
  return number;
}

Clock record(int stream) {
  std::lock_guard lock(Blocks::known().mutex);
  work(stream);
  return clocks[stream];
}
void wait(int stream, const Clock& event) {
  std::lock_guard lock(Blocks::known().mutex);
  clocks[stream].join(event);
}
void host_waits(const Clock& event) {
  std::lock_guard lock(Blocks::known().mutex);
  host.join(event);
}
void host_waits_for_all(DeviceIndex device) {
  std::lock_guard lock(Blocks::known().mutex);
  for (int stream = 0; stream < streams; ++stream) {
    if (device_of_stream[stream] == device) host.join(clocks[stream]);
  }
}

struct Guard final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return cuda(current_device); }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < kDevices, "CUDA error: invalid device ordinal");
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) current_device = device.index();
  }
  Stream getStream(Device device) const noexcept override {
    device = with_index(device);
    return stream_of(device, current_stream(device.index()));
  }
  Stream getDefaultStream(Device device) const override { return stream_of(with_index(device), 0); }
  Stream getNewStream(Device device, int = 0) const override {
    device = with_index(device);
    return stream_of(device, new_stream(device.index()));
  }
  Stream getStreamFromGlobalPool(Device device, bool = false) const override {
    return getNewStream(device);
  }
  Stream exchangeStream(Stream stream) const noexcept override {
    const Stream before = getStream(stream.device());
    current_streams[stream.device_index()] = number_of(stream);
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }

  void record(void** event, const Stream& stream, const DeviceIndex,
              const EventFlag) const override {
    if (!*event) *event = new Clock;
    *static_cast<Clock*>(*event) = simulated::record(number_of(stream));
  }
  void block(void* event, const Stream& stream) const override {
    if (event) wait(number_of(stream), *static_cast<Clock*>(event));
  }
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override {
    delete static_cast<Clock*>(event);
  }
  void synchronizeEvent(void* event) const override {
    if (event) host_waits(*static_cast<Clock*>(event));
  }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream& stream) const override {
    host_waits(simulated::record(number_of(stream)));
  }
  void synchronizeDevice(const DeviceIndex device) const override { host_waits_for_all(device); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

REGISTER_ALLOCATOR(DeviceType::CUDA, &memory);

struct CUDAHooks : at::CUDAHooksInterface {  // torch looks for it by this name
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return kDevices; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex current_device() const override { return simulated::current_device; }
  DeviceIndex getCurrentDevice() const override { return simulated::current_device; }
  void setCurrentDevice(DeviceIndex index) const override { Guard().setDevice(cuda(index)); }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    return Guard().exchangeDevice(cuda(index)).index();
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override {
    return exchangeDevice(index);
  }
  // The CPU's: the same seed gives the same numbers on both.
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
  Device getDeviceFromPtr(void* address) const override {
    std::lock_guard lock(Blocks::known().mutex);
    const Block* block = Blocks::known().find(address);
    TORCH_CHECK(block, "the address is of no simulated device");
    return cuda(block->device);
  }
  Allocator* getPinnedMemoryAllocator() const override { return GetCPUAllocator(); }
  Allocator* getCUDADeviceAllocator() const override { return &memory; }
  void deviceSynchronize(DeviceIndex device) const override { host_waits_for_all(device); }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)

std::atomic<long> waits{0};
std::atomic<bool> capturing{false};
std::string last_wait;

void waited(DeviceIndex device, const std::string& why) {
  TORCH_CHECK(!capturing, "CUDA error: operation not permitted when stream is capturing (", why,
              ")");
  ++waits;
  last_wait = why;
  host_waits(record(current_stream(device)));
}

}  // namespace
}  // namespace simulated
