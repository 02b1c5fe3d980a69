// Streams, and what makes one wait for another. Work runs at once here, so what would go wrong on a
// GPU doesn't go wrong; but each stream's clock says which work of others it is known to follow,
// and memory remembers who touched it. Work that follows nothing that it needs is a race.
#pragma once

#include <c10/core/Stream.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <string>

namespace simulated {

constexpr c10::DeviceIndex kDevices = 2;
constexpr int kStreams =
    256;  // of all devices together; number 0 to kDevices - 1 are the default ones

inline thread_local c10::DeviceIndex current_device = 0;
inline thread_local std::array<int, kDevices> current_streams{0, 1};
inline std::atomic<int> streams{kDevices};
inline std::array<c10::DeviceIndex, kStreams> device_of_stream{0, 1};

// For each stream the number of its latest work that is known to be done before.
struct Clock : std::array<long, kStreams> {
  Clock() { fill(0); }
  void join(const Clock& other) {
    for (int i = 0; i < kStreams; ++i) (*this)[i] = std::max((*this)[i], other[i]);
  }
};

inline std::array<Clock, kStreams> clocks;  // by stream; guarded by the mutex of Blocks
inline Clock host;                          // what the host has waited for

inline int current_stream(c10::DeviceIndex device) {
  return current_streams[device];
}
inline int current_stream() {
  return current_stream(current_device);
}

// Starts a piece of work. All that the host has waited for is done.
inline long work(int stream) {
  clocks[stream].join(host);
  return ++clocks[stream][stream];
}

inline std::string name(int stream) {
  return "stream " + std::to_string(stream);
}

// kUnknown: a kernel's, which may write what its own stream wrote last, and reads all else.
enum class Use { kRead, kWrite, kUnknown };

// The work that touched one block of memory.
class Accesses {
 public:
  // An allocator gives a stream memory that the same stream had before: as if it had written it.
  void allocated(int stream) {
    owner_ = writer_ = stream;
    written_ = work(stream);
  }

  // A race in words, or nothing.
  std::string touched(int stream, Use use) {
    const long now = work(stream);
    std::string race;
    if (clocks[stream][writer_] < written_) {
      race = name(stream) + " doesn't wait for what " + name(writer_) + " writes";
    }
    if (use == Use::kWrite) {
      for (int other = 0; other < kStreams; ++other) {
        if (clocks[stream][other] < read_[other]) {
          race = name(stream) + " writes what " + name(other) + " may still read";
        }
      }
    }
    if (use == Use::kWrite || (use == Use::kUnknown && stream == writer_)) {
      writer_ = stream;
      written_ = now;
    }
    read_[stream] = now;
    return race;
  }

  // What `stream` has been told to use is kept until it is done.
  void recorded(int stream) { recorded_ |= uint64_t{1} << stream; }

  std::string freed() const {
    for (int other = 0; other < kStreams; ++other) {
      const bool waits = recorded_ >> other & 1 || host[other] >= read_[other];
      if (!waits && clocks[owner_][other] < read_[other]) {
        return "memory of " + name(owner_) + " is freed while " + name(other) + " may still use it";
      }
    }
    return {};
  }

 private:
  int owner_ = 0, writer_ = 0;
  long written_ = 0;
  Clock read_;
  uint64_t recorded_ = 0;
};

}  // namespace simulated
