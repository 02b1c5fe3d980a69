// Rotary positions: attention's queries and keys, rotated, for the other kernels.
//
// With the halves x1 and x2 of a head of a token, and the tables' row of its position,
//   x1 cos - x2 sin,  x2 cos + x1 sin
// in float32, rounded once. Positions count from a sequence's first token, and in a padded batch
// from the row's. The backward's kernels rotate back (device/attention/rotary.cuh).
//
// A block has a tile of tokens, as the other kernels have them, so it knows where its sequence
// begins, and kHeads heads. A thread takes the same kVec columns of both halves: 16 bytes of each
// where the half of a head has whole vectors of 8. It loads their cosines and sines once, for the
// queries and keys of all its heads.
//
// Moves 4 values for each element of q (q, k; both rotated), and the tables, which the caches
// serve: an eighth as much.
#include "device/attention/launch.cuh"
#include "device/attention/rotary.cuh"
#include "device/earlier.cuh"
#include "device/vec.cuh"
#include "params.h"

namespace bertfast {
namespace {

constexpr int kThreads = 128;
constexpr int kHeads = 4;

template<class T, int kVec>
__global__ void __launch_bounds__(kThreads) rotate_kernel(AttentionRotation p) {
  await_earlier_kernels();
  using TVec = Vec<T, kVec>;
  TilePlace at = find_tile(p.batch, 0);
  at.head *= kHeads;  // the first one
  const int last = min(p.heads - at.head, kHeads) - 1;
  const int half = p.half, vectors = half / kVec;
  const int count = min(at.tile, at.length - at.first) * vectors;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) {
    // 1. the cosines and sines of a token's columns
    const int row = i / vectors, column = (i - row * vectors) * kVec;
    const int position = position_of(p.batch, at, row);
    float cos[kVec], sin[kVec];
    const int64_t entry = int64_t(position) * half + column;
    constexpr int kTableVec = kVec < 4 ? kVec : 4;
#pragma unroll
    for (int k = 0; k < kVec; k += kTableVec) {
      const auto of_cos = Vec<float, kTableVec>::load(p.cos + entry + k);
      const auto of_sin = Vec<float, kTableVec>::load(p.sin + entry + k);
#pragma unroll
      for (int e = 0; e < kTableVec; ++e) cos[k + e] = of_cos[e], sin[k + e] = of_sin[e];
    }

    // 2. queries, then keys: all heads are loaded before the first is used. Where there are no more
    // it is the last one again, since a branch for each would keep the loads apart.
    const auto rotate = [&](const HeadRows<const void>& from, const HeadRows<void>& to) {
      const T* x = row_of<const T>(from, at, at.first + row) + column;
      T* y = row_of<T>(to, at, at.first + row) + column;
      TVec firsts[kHeads], seconds[kHeads];
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
        firsts[head] = TVec::load_again(x);
        seconds[head] = TVec::load_again(x + half);
        if (head < last) x += from.head;
      }
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
        float first[kVec], second[kVec];
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
          first[k] = firsts[head][k] * cos[k] - seconds[head][k] * sin[k];
          second[k] = seconds[head][k] * cos[k] + firsts[head][k] * sin[k];
        }
        TVec::store_whole(y, first);
        TVec::store_whole(y + half, second);
        if (head < last) y += to.head;
      }
    };
    rotate(p.q, p.rotated_q);
    rotate(p.k, p.rotated_k);
  }
}

// Whether everything begins at, and is apart by, whole vectors of `vec` values.
bool are_vectors(const AttentionRotation& p, int vec) {
  int64_t steps = p.half;
  uintptr_t places = 0;
  const auto look_at = [&](const auto& x) {
    steps |= x.batch | x.head | x.token;
    places |= reinterpret_cast<uintptr_t>(x.data);
  };
  look_at(p.q);
  look_at(p.k);
  look_at(p.rotated_q);
  look_at(p.rotated_k);
  return steps % vec == 0 && places % (2 * vec) == 0;
}

template<class T>
cudaError_t launch_rotate(const AttentionRotation& p, dim3 grid, Stream stream) {
  const auto kernel = are_vectors(p, 8)   ? rotate_kernel<T, 8>
                      : are_vectors(p, 4) ? rotate_kernel<T, 4>
                                          : rotate_kernel<T, 1>;
  return launch_early(kernel, grid, dim3(kThreads), 0, stream, p);
}

}  // namespace

cudaError_t launch_attention_rotate(const AttentionRotation& params, DType dtype, Stream stream) {
  AttentionRotation p = params;
  p.heads = p.batch.heads;
  p.batch.heads = (p.heads + kHeads - 1) / kHeads;
  p.batch.key_mask = nullptr;  // what doesn't count is rotated too
  const dim3 grid = attention_grid(p.batch, 0);
  return dtype == DType::kFloat16 ? launch_rotate<__half>(p, grid, stream)
                                  : launch_rotate<__nv_bfloat16>(p, grid, stream);
}

}  // namespace bertfast
