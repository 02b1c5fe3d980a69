// The size of a block of attention, and how many of them a multiprocessor holds.
#pragma once

namespace bertfast {

constexpr int kTileRows = 64;  // the larger tile of bertfast/packing
constexpr int kAttentionWarps = kTileRows / 16;
constexpr int kAttentionThreads = 32 * kAttentionWarps;
// What the blocks of a multiprocessor share, on the architecture that is compiled for.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ % 100 != 0 || __CUDA_ARCH__ >= 1200)
constexpr int kSharedMemory = 100 * 1024;
#else
constexpr int kSharedMemory = 164 * 1024;
#endif
// How many blocks shared memory has room for, if not more than `most`: so many must fit by
// registers. Each block costs a kilobyte more than it asks for.
constexpr int blocks_that_fit(int shared_bytes, int most) {
  const int room = kSharedMemory / (shared_bytes + 1024);
  return room < 1 ? 1 : room < most ? room : most;
}

}  // namespace bertfast
