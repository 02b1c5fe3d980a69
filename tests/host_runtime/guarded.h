// Global memory for the cases: an array between two zones that a kernel must leave alone.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace bertfast {
namespace host_runtime_test {

// AddressSanitizer has its own zones, right at the ends of an allocation.
#ifdef __SANITIZE_ADDRESS__
constexpr int kZone = 0;
#else
constexpr int kZone = 64;
#endif

// Everything starts as 0xff bytes, which is NaN: what is read from a zone poisons the result, and
// what is never written stays recognisable.
template<class T>
class Guarded {
 public:
  explicit Guarded(int size) : size_(size), memory_(size_t(size + 2 * kZone)) {
    std::memset(static_cast<void*>(memory_.data()), 0xff, memory_.size() * sizeof(T));
  }

  T* data() { return memory_.data() + kZone; }

  void check_zones() const {
    for (int i = 0; i < kZone; ++i) {
      check_untouched(-1 - i);
      check_untouched(size_ + i);
    }
  }
  void check_written() const {
    for (int i = 0; i < size_; ++i) {
      if (untouched(i)) {
        throw std::runtime_error("element " + std::to_string(i) +
                                 " is NaN: never written, or made from what never was");
      }
    }
  }

 private:
  bool untouched(int i) const {
    T poison;
    std::memset(static_cast<void*>(&poison), 0xff, sizeof(T));
    return std::memcmp(&memory_[size_t(kZone + i)], &poison, sizeof(T)) == 0;
  }
  void check_untouched(int i) const {
    if (!untouched(i)) {
      throw std::runtime_error("guard zone written: element " + std::to_string(i) + " of " +
                               std::to_string(size_));
    }
  }

  int size_;
  std::vector<T> memory_;
};

}  // namespace host_runtime_test
}  // namespace bertfast
