// What the positions of a query and a key do to their score: a window, and a bias by distance.
//
// Calls with these have kernels of their own (kernels/attention/by_position.cu), made of the same
// tiles: in the loop that serves all calls, code for them would take registers.
#pragma once

#include "device/attention/place.cuh"
#include "device/vec.cuh"

namespace bertfast {

// Of 32 positions from `position` on, those from `from` to `to`.
__device__ __forceinline__ unsigned bits_inside(int position, int from, int to) {
  const int left = to - position, skip = from - position;
  const unsigned below = left >= 32 ? 0xffffffffu : left <= 0 ? 0u : (1u << left) - 1;
  return skip <= 0 ? below : skip >= 32 ? 0u : below & 0xffffffffu << skip;
}

// Of 32 keys from `key` on, those that a query sees.
__device__ __forceinline__ unsigned keys_of_query(const AttentionScores& scores, int query,
                                                  int key) {
  return bits_inside(key, query - scores.left, query + scores.right + 1);
}

// Of 32 queries from `query` on, those that see a key, of a sequence's `length`.
__device__ __forceinline__ unsigned queries_of_key(const AttentionScores& scores, int key,
                                                   int query, int length) {
  return bits_inside(query, max(key - scores.right, 0), min(key + scores.left + 1, length));
}

__device__ __forceinline__ bool in_window(const AttentionScores& scores, int query, int key) {
  return key >= query - scores.left && key <= query + scores.right;
}

// One head's biases of so many distances as a warp's step has, from the least one on, times log2 e,
// in shared memory.
struct BiasLine {
  static constexpr int kDistances = 64;
  static constexpr int kBytesOfWarp = kDistances * int(sizeof(float));
  static constexpr int kSharedBytes = kAttentionWarps * kBytesOfWarp;
  Shared<float> biases;

  // All lanes of the warp. shared: where the warps' lines begin.
  __device__ __forceinline__ BiasLine(const AttentionScores& scores, int head, int least,
                                      int shared, int thread)
      : biases(shared_memory<float>(shared + thread / 32 * kBytesOfWarp)) {
    const int reach = scores.reach;
    const int64_t zero = int64_t(head) * (2 * reach + 1) + reach;
    __syncwarp();  // the line of the step before has been read
#pragma unroll
    for (int i = 0; i < kDistances; i += 32) {
      const int place = i + thread % 32;
      const int distance = min(max(least + place, -reach), reach);
      biases.store(place, read(scores, zero + distance) * kLog2E);
    }
    __syncwarp();
  }

  __device__ __forceinline__ float operator[](int place) const { return biases.load(place); }

 private:
  static __device__ __forceinline__ float read(const AttentionScores& scores, int64_t index) {
    if (scores.bias_dtype == DType::kFloat32) return read_as<float>(scores.bias, index);
    if (scores.bias_dtype == DType::kFloat16) return read_as<__half>(scores.bias, index);
    return read_as<__nv_bfloat16>(scores.bias, index);
  }
  template<class T>
  static __device__ __forceinline__ float read_as(const void* biases, int64_t index) {
    return Vec<T, 1>::load(static_cast<const T*>(biases) + index)[0];
  }
};

}  // namespace bertfast
