// The memory of the simulated devices. It shows what was never written, and what was written
// beside.
#pragma once

#include <c10/core/Allocator.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "order.h"

namespace simulated {

constexpr size_t kZone = 256;  // on either side of an allocation; its alignment too
// Fresh memory is NaN in every floating type. A zone is NaN or huge, and no value that is written.
constexpr char kFresh = '\xff', kForbidden = '\xfe';

struct Block {
  char* base;
  size_t bytes;
  c10::DeviceIndex device;
  Accesses accesses;

  char* begin() const { return base + kZone; }
  bool overrun() const {
    for (size_t i = 0; i < kZone; ++i) {
      if (base[i] != kForbidden || begin()[bytes + i] != kForbidden) return true;
    }
    return false;
  }
};

// All that is allocated, by its first byte. Never destroyed: tensors may outlive it.
struct Blocks {
  std::mutex mutex;
  std::map<const char*, Block*> all;
  std::string faults;  // a line each

  static Blocks& known() {
    static Blocks* blocks = new Blocks;
    return *blocks;
  }
  // The block that holds an address; null where none does.
  Block* find(const void* address) {
    const char* at = static_cast<const char*>(address);
    auto next = all.upper_bound(at);
    if (next == all.begin()) return nullptr;
    Block* block = std::prev(next)->second;
    return at < block->begin() + block->bytes ? block : nullptr;
  }
  void fault(const std::string& text) {
    if (faults.size() < 10000) faults += text + "\n";
  }
};

inline void look_for_overrun(const Block& block) {
  if (!block.overrun()) return;
  Blocks::known().fault("a write outside of an allocation of " + std::to_string(block.bytes) +
                        " bytes on cuda:" + std::to_string(block.device));
}

class Memory final : public c10::Allocator {
 public:
  // On the current device, for its current stream.
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(c10::DeviceType::CUDA, current_device);
    if (bytes == 0) return c10::DataPtr(nullptr, device);
    const size_t all = (bytes + 2 * kZone + kZone - 1) / kZone * kZone;
    auto* base = static_cast<char*>(std::aligned_alloc(kZone, all));
    TORCH_CHECK(base, "CUDA out of memory (simulated)");
    std::memset(base, kForbidden, all);
    auto* block = new Block{base, bytes, current_device, {}};
    std::memset(block->begin(), kFresh, bytes);
    Blocks& blocks = Blocks::known();
    std::lock_guard lock(blocks.mutex);
    block->accesses.allocated(current_stream());
    blocks.all[block->begin()] = block;
    return c10::DataPtr(block->begin(), block, &free, device);
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }

 private:
  static void free(void* context) {
    auto* block = static_cast<Block*>(context);
    Blocks& blocks = Blocks::known();
    std::lock_guard lock(blocks.mutex);
    look_for_overrun(*block);
    const std::string race = block->accesses.freed();
    if (!race.empty()) blocks.fault(race);
    blocks.all.erase(block->begin());
    std::free(block->base);
    delete block;
  }
};

inline Memory memory;

// Work on the current stream of the memory's device touches it.
inline void touch(const void* address, Use use) {
  Blocks& blocks = Blocks::known();
  std::lock_guard lock(blocks.mutex);
  Block* block = blocks.find(address);
  if (!block) return;
  const std::string race = block->accesses.touched(current_stream(block->device), use);
  if (!race.empty()) blocks.fault(race);
}

}  // namespace simulated
