// The size of a block of attention, and how many of them a multiprocessor holds.
#pragma once

namespace bertfast {

constexpr int kTileRows = 64;  // the larger tile of bertfast/packing
constexpr int kAttentionWarps = kTileRows / 16;
constexpr int kAttentionThreads = 32 * kAttentionWarps;
// What the blocks of a multiprocessor share: on some architectures, and on the others.
constexpr int kMuchShared = 164 * 1024, kLittleShared = 100 * 1024;
// On the architecture that is compiled for, in sources that setup.py compiles for each.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ % 100 != 0 || __CUDA_ARCH__ >= 1200)
constexpr int kSharedMemory = kLittleShared;
#else
constexpr int kSharedMemory = kMuchShared;
#endif

// How many blocks shared memory has room for, if not more than `most`: so many must fit by
// registers. Each block costs a kilobyte more than it asks for.
constexpr int blocks_that_fit(int shared_bytes, int most, int shared_memory = kSharedMemory) {
  const int room = shared_memory / (shared_bytes + 1024);
  return room < 1 ? 1 : room < most ? room : most;
}

int architectures_differ();  // isn't there: a call in a constant doesn't compile

// The same where one number must do for all architectures. Where one has room for a single block
// and another for two, both leave a thread all the registers that it may have.
constexpr int blocks_anywhere(int shared_bytes, int most) {
  const int most_room = blocks_that_fit(shared_bytes, most, kMuchShared);
  const int least_room = blocks_that_fit(shared_bytes, most, kLittleShared);
  return most_room == least_room || most_room <= 2 ? most_room : architectures_differ();
}

}  // namespace bertfast
