// What attention's kernels share: where a tile lies, which keys count, and dropout of the scores.
//
// Positions count from a sequence's first token, so a padded and a packed batch differ only in
// where that token is. A tile is 64 positions of one sequence and head, or, of a plan, 32 or 64,
// which several short sequences may share, whole, one after the other ("many"): they are then one
// sequence whose scores between different ones are masked. Of a tile of 32 half the warps only help
// to copy.
//
// Masking isn't enough where one of them has a NaN or an infinity: its products with the others'
// zeros are NaN. So a shared tile that ends with a sum that isn't finite is done again, sequence by
// sequence: each where it lies in the tile, with zeros in all other rows, and nothing but its own
// rows is written. So the others get the very bits that they would have without it. It costs the
// tiles that don't need it a test at their end.
#pragma once

#include "device/math.cuh"
#include "device/philox.cuh"
#include "params.h"

namespace bertfast {

constexpr int kTileRows = 64;  // packing.py's TILE, the larger one
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
  const int room = kSharedMemory / (shared_bytes + 1024 + 256);
  return room < 1 ? 1 : room < most ? room : most;
}

constexpr float kLog2E = 1.4426950408889634f;

struct TilePlace {
  int batch, head;
  int first;                             // position of the tile's first row
  int start;                             // the sequence's first token
  int length;                            // of the sequence
  int many;                              // how many sequences share the tile
  int tile;                              // its size
  int alone = 0;                         // which of them is done alone, from 1 on; 0: all at once
  int from = 0;                          // the first position to do; `length` is their end
  unsigned low_keys = 0, high_keys = 0;  // which of the rows, if they are keys, count

  // Between a kernel's beginning and its end this waits in shared memory, as the registers are
  // needed. Others see it after a barrier.
  static constexpr int kSharedBytes = 64;
  static constexpr int kDropout = 48;  // where what dropout needs waits too
  __device__ __forceinline__ void put(int shared, int thread) const {
    if (thread != 0) return;
    const Shared<int4> slots = shared_memory<int4>(shared);
    slots.store(0, make_int4(batch, head, first, start));
    slots.store(1, make_int4(length, many, low_keys, high_keys));
    shared_memory<int2>(shared + 32).store(0, make_int2(alone, from));
  }
  static __device__ __forceinline__ TilePlace get(const AttentionBatch& p, int shared) {
    const Shared<int4> slots = shared_memory<int4>(shared);
    const int4 a = slots.load(0), b = slots.load(1);
    const int2 c = shared_memory<int2>(shared + 32).load(0);
    return {a.x, a.y, a.z, a.w, b.x, b.y, p.tile, c.x, c.y, unsigned(b.z), unsigned(b.w)};
  }

  __device__ __forceinline__ bool counts(int key) const {
    return ((key < 32 ? low_keys : high_keys) >> (key & 31) & 1) != 0;
  }
  __device__ __forceinline__ bool inside(int row) const {
    return row < tile && first + row >= from && first + row < length;
  }

  // Whether this was a tile of many, done at once, in which a thread's sums aren't finite: then
  // each sequence has to be done alone. All threads ask.
  __device__ __forceinline__ bool spoilt(bool finite) const {
    return many > 1 && alone == 0 && __syncthreads_or(!finite);
  }
  // The sequence to do alone after this one; 0: none is left.
  __device__ __forceinline__ int next_alone(const AttentionBatch& p) const {
    for (int n = alone; n < many; ++n) {
      if (p.cu_seqlens[batch + n] < p.cu_seqlens[batch + n + 1]) return n + 1;
    }
    return 0;
  }
  // The same at a turn's end; 0 after a turn of all at once.
  __device__ __forceinline__ int after(const AttentionBatch& p) const {
    if (alone == 0) return 0;
    __syncthreads();  // the next one overwrites what others may still read
    return next_alone(p);
  }
};

// Calls turn(alone), which returns the next one's: once with 0 and, if need be, with each sequence.
template<class Turn>
__device__ __forceinline__ void for_each_turn(Turn turn) {
  int alone = 0;
  do {
    alone = turn(alone);
  } while (alone > 0);
}

// Whether no sum is NaN or infinite: 0 times those is NaN.
template<int kCount>
__device__ __forceinline__ bool all_finite(const float (&sums)[kCount][4]) {
  float zero = 0.f;
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) zero = fmaf(sums[n][i], 0.f, zero);
  }
  return zero == 0.f;
}

// Tiles of one head of a sequence are neighbours, as they read the same keys. The grid has room for
// the longest sequence, or for the longest plan; a block without a tile leaves at once, which costs
// less than what a persistent grid would hold back in registers and in balance.
__device__ __forceinline__ TilePlace find_tile(const AttentionBatch& p, int alone) {
  const int block = anew(int(blockIdx.x)), tiles = p.n_tiles;
  TilePlace at;
  at.tile = p.tile;
  if (p.tiles) {
    at.head = block / tiles;
    const int32_t* entry = p.tiles + 3 * (block % tiles);
    at.batch = entry[0];
    at.first = entry[1];
    at.many = entry[2];  // 0 beyond the list's end, and so is the length
    at.start = p.cu_seqlens[at.batch];
    at.length = p.cu_seqlens[at.batch + (alone ? alone : at.many)] - at.start;
    if (alone) at.from = p.cu_seqlens[at.batch + alone - 1] - at.start;
    at.alone = alone;
    return at;
  }
  at.first = block % tiles * kTileRows;
  at.head = block / tiles % p.heads;
  at.batch = block / tiles / p.heads;
  at.many = 1;
  at.start = 0;
  at.length = p.length;
  if (p.cu_seqlens) {
    at.start = p.cu_seqlens[at.batch];
    at.length = p.cu_seqlens[at.batch + 1] - at.start;
  }
  return at;
}

// Element 0 of the row at `position`.
template<class T, class Void>
__device__ __forceinline__ T* row_of(const HeadRows<Void>& x, const TilePlace& at, int position) {
  return static_cast<T*>(x.data) + at.batch * x.batch + at.head * x.head +
         int64_t(at.start + position) * x.token;
}

// Where the statistics of the row at `position` are.
__device__ __forceinline__ int64_t statistics_of(const AttentionBatch& p, const TilePlace& at,
                                                 int position) {
  return at.batch * p.lse_batch + at.head * p.lse_head + at.start + position;
}

// Which keys count: those from low to high, less what the mask's bits leave out. Of a sequence that
// is done alone its own: the bits leave out those before it.
struct Keys {
  int low, high;
  bool masked;
  Shared<unsigned> words;  // bit b of word w: key 32 w + b counts

  // Bytes of shared memory beside the tiles: two ends for each warp, then the words, which reach
  // two tiles beyond the length.
  static __host__ __device__ constexpr int word_count(int length) {
    return (length + 31) / 32 + 2 * kTileRows / 32;
  }
  static __host__ __device__ constexpr int shared_bytes(int length) {
    return 4 * (2 * kAttentionWarps + word_count(length));
  }

  // All warps read the mask, once, if there is one; the bytes begin at `shared`.
  __device__ __forceinline__ Keys(const AttentionBatch& p, const TilePlace& at, int shared,
                                  int thread)
      : low(0),
        high(at.length),
        masked(p.key_mask || at.alone),
        words(shared_memory<unsigned>(shared)) {
    if (!masked) return;
    const Shared<int> ends = shared_memory<int>(shared);
    words = shared_memory<unsigned>(shared + 8 * kAttentionWarps);
    const uint8_t* mask = p.key_mask + at.batch * p.mask_batch;
    const int warp = thread / 32, lane = thread % 32;
    low = at.length;
    high = 0;
#pragma unroll 1
    for (int word = warp; word < word_count(at.length); word += kAttentionWarps) {
      const int key = 32 * word + lane;
      const bool on = key < at.length && (p.key_mask ? mask[key] != 0 : key >= at.from);
      const unsigned bits = __ballot_sync(0xffffffffu, on);
      if (lane == 0) words.store(word, bits);
      if (bits) {
        low = min(low, 32 * word + __ffs(bits) - 1);
        high = 32 * word + 32 - __clz(bits);
      }
    }
    if (lane == 0) {
      ends.store(2 * warp, low);
      ends.store(2 * warp + 1, high);
    }
    __syncthreads();
#pragma unroll
    for (int other = 0; other < kAttentionWarps; ++other) {
      low = min(low, ends.load(2 * other));
      high = max(high, ends.load(2 * other + 1));
    }
    low = at.alone ? 0 : min(low, high);
  }

  // Bit b: key position + b counts.
  __device__ __forceinline__ unsigned bits(int position) const {
    if (!masked) {
      const int left = high - position;
      return left >= 32 ? 0xffffffffu : left <= 0 ? 0u : (1u << left) - 1;
    }
    const int word = position >> 5;
    return __funnelshift_r(words.load(word), words.load(word + 1), position & 31);
  }
};

// Rows of a head as copies read them, from `position` on.
template<class Rows, int kRows, class T>
__device__ __forceinline__ auto copies_of(const HeadRows<const void>& x, const AttentionBatch& p,
                                          const TilePlace& at, int position, int thread) {
  using Copies = typename Rows::template Copies<kRows, kAttentionThreads, T>;
  return Copies(row_of<const T>(x, at, position), x.token, p.head_dim, thread);
}

// The keys of a block that count, 32 in a word.
template<int kKeys>
struct KeyBits {
  unsigned words[kKeys / 32];

  __device__ __forceinline__ KeyBits(const Keys& keys, int block) {
#pragma unroll
    for (int i = 0; i < kKeys / 32; ++i) words[i] = keys.bits(keys.low + block * kKeys + 32 * i);
  }

  // Copies a block of keys or values. What doesn't count is zero, so nothing that lies there gets
  // into a product.
  template<class Copies>
  __device__ __forceinline__ void start(const Copies& copies, Shared<uint4> tile, int block) const {
    copies.start(tile, block, [&](int i, int) {
      return (words[i / 32] >> copies.first() >> (i % 32) & 1) != 0;
    });
  }
};

// The sequence of a row in a tile of many.
struct Segment {
  int origin, end, which;

  __device__ __forceinline__ Segment(const AttentionBatch& p, const TilePlace& at, int row)
      : origin(0), end(at.length), which(0) {
    for (int n = 1; n < at.many; ++n) {
      const int bound = p.cu_seqlens[at.batch + n] - at.start;
      if (bound <= row) {
        origin = bound;
        which = n;
      } else {
        end = min(end, bound);
      }
    }
  }
};

// Which scores dropout keeps. A Philox call serves two queries by four keys with stride 8; the
// layout is in bertfast/ops/dropout.py.
struct ScoreDropout {
  // The seed's halves and the number of the head among all; they wait there, as they are needed for
  // a moment only in each step.
  Shared<uint4> kept;
  unsigned site, least;  // least: the threshold in the upper half

  // Nobody may draw before a barrier.
  __device__ __forceinline__ ScoreDropout(const AttentionBatch& p, const TilePlace& at, bool drops,
                                          int tiles_end, int thread)
      : kept(shared_memory<uint4>(tiles_end + TilePlace::kDropout)),
        site(p.site),
        least(p.threshold << 16) {
    if (!drops || thread != 0) return;
    const uint64_t seed = static_cast<uint64_t>(*p.seed);
    kept.store(0, make_uint4(static_cast<unsigned>(seed), static_cast<unsigned>(seed >> 32),
                             at.batch * p.heads + at.head, 0));
  }

  // The call that serves a query, and a key.
  static __device__ __forceinline__ int query_call(int i) { return (i >> 4) << 3 | (i & 7); }
  static __device__ __forceinline__ int key_call(int j) { return (j >> 5) << 3 | (j & 7); }

  // Eight draws of 16 bits: queries 0, 8 of the call in words 0-1, 2-3; keys 0, 8, 16, 24 in the
  // two words' halves, low half first.
  // further: how many heads on from the tile's, as other sequences that share it are.
  __device__ __forceinline__ uint4 draw(int query_call, int key_call, int further = 0) const {
    const uint4 of_tile = kept.load(0);
    return philox(make_uint4(static_cast<unsigned>(key_call), static_cast<unsigned>(query_call),
                             of_tile.z + static_cast<unsigned>(further), site),
                  make_uint2(of_tile.x, of_tile.y));
  }

  // Compared unsplit: the upper half where it is, the lower one shifted there.
  __device__ __forceinline__ bool keeps_low(unsigned word) const { return word << 16 >= least; }
  __device__ __forceinline__ bool keeps_high(unsigned word) const { return word >= least; }

  // One score's, where the call's others are of no use.
  __device__ __forceinline__ bool keeps(int i, int j, int further) const {
    const uint4 words = draw(query_call(i), key_call(j), further);
    const unsigned first = j & 16 ? words.y : words.x, second = j & 16 ? words.w : words.z;
    const unsigned word = i & 8 ? second : first;
    return j & 8 ? keeps_high(word) : keeps_low(word);
  }
};

// What a thread knows of its 2 x 16 scores in a tile of many, whose sequences begin anywhere: bit
// 16 r + 2 n + e is row r, column 8 n + 2 t + e, for t = lane % 4. It waits in shared memory, as
// tiles of one sequence have no use for it and need the registers.
struct ManyBits {
  unsigned same = 0;  // of one sequence
  unsigned keep = 0;  // by dropout

  static constexpr int kSharedBytes = kAttentionThreads * int(sizeof(uint2));
  // Where, from the tiles' end on: beyond the place, and the keys of a sequence done alone.
  static constexpr int kPlace = TilePlace::kSharedBytes + Keys::shared_bytes(kTileRows);
  __device__ __forceinline__ void put(int shared, int thread) const {
    shared_memory<uint2>(shared).store(thread, make_uint2(same, keep));
  }
  static __device__ __forceinline__ ManyBits get(int shared, int thread) {
    const uint2 bits = shared_memory<uint2>(shared).load(thread);
    return {bits.x, bits.y};
  }

  // rows: the positions of the thread's two rows. kKeyRows: rows are keys and columns queries.
  template<bool kDropout, bool kKeyRows>
  static __device__ __forceinline__ ManyBits find(const AttentionBatch& p, const TilePlace& at,
                                                  const ScoreDropout& dropout, int row0, int row1,
                                                  int thread) {
    ManyBits found;
#pragma unroll 1
    for (int r = 0; r < 2; ++r) {
      const int row = r ? row1 : row0;
      const Segment segment(p, at, row);
      const int further = segment.which * p.heads;
#pragma unroll 1
      for (int c = 0; c < 16; ++c) {
        const int column = c / 2 * 8 + thread % 4 * 2 + c % 2;
        const unsigned bit = 1u << (16 * r + c);
        if (column >= segment.origin && column < segment.end) found.same |= bit;
        if constexpr (kDropout) {
          const int mine = row - segment.origin, other = column - segment.origin;
          const bool kept =
              kKeyRows ? dropout.keeps(other, mine, further) : dropout.keeps(mine, other, further);
          if (kept) found.keep |= bit;
        }
      }
    }
    return found;
  }

  // The bits of one row and of the columns from 32 * half, bit 8 n + e, as the words of KeyBits
  // shifted by 2 t have them.
  static __device__ __forceinline__ unsigned of_row(unsigned bits, int r, int half) {
    bits = bits >> (16 * r) >> (8 * half) & 0xffu;
    bits = (bits | bits << 12) & 0x000f000fu;
    return (bits | bits << 6) & 0x03030303u;
  }
};

// What both kernels with queries as rows do to 32 scores of a row, s[n][i] for n in 0-3: of the
// keys that don't count they become `masked`.
__device__ __forceinline__ void mask_keys(float (*s)[4], float masked, unsigned on,
                                          const TilePlace& at, int many_bits, int group,
                                          int thread) {
  if (on == 0xffffffffu && at.many == 1) return;
  const int t = thread % 4;
  unsigned row_on[2] = {on >> (2 * t), on >> (2 * t)};
  if (at.many > 1) {
    const unsigned same = ManyBits::get(many_bits, thread).same;
    row_on[0] = ManyBits::of_row(same, 0, group);
    row_on[1] = ManyBits::of_row(same, 1, group);
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[n][i] = row_on[i / 2] >> (8 * n + i % 2) & 1 ? s[n][i] : masked;
    }
  }
}

// And dropout makes zeros of some. group: how many 32 keys come before.
__device__ __forceinline__ void drop_keys(float (*s)[4], const ScoreDropout& dropout,
                                          int query_call, const TilePlace& at, int many_bits,
                                          int group, int thread) {
  if (at.many > 1) {
    const unsigned keep = ManyBits::get(many_bits, thread).keep;
    const unsigned row_keep[2] = {ManyBits::of_row(keep, 0, group),
                                  ManyBits::of_row(keep, 1, group)};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = row_keep[i / 2] >> (8 * n + i % 2) & 1 ? s[n][i] : 0.f;
      }
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int key_call = 8 * group + thread % 4 * 2 + e;
    const uint4 words = dropout.draw(query_call, key_call);
    const unsigned of_row[2][2] = {{words.x, words.y}, {words.z, words.w}};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const unsigned word = of_row[r][n / 2];
        const bool kept = n % 2 ? dropout.keeps_high(word) : dropout.keeps_low(word);
        s[n][2 * r + e] = kept ? s[n][2 * r + e] : 0.f;
      }
    }
  }
}

// Two fragments of sums, side by side, as an A operand.
template<class T>
__device__ __forceinline__ void as_operand(unsigned (&a)[4], const float (&left)[4],
                                           const float (&right)[4]) {
  a[0] = pack<T>(left[0], left[1]);
  a[1] = pack<T>(left[2], left[3]);
  a[2] = pack<T>(right[0], right[1]);
  a[3] = pack<T>(right[2], right[3]);
}

// Calls use(T(), kDim) with the element type and the least head dimension that has a kernel.
template<class Use>
cudaError_t with_head_dim(DType dtype, int head_dim, Use use) {
  const auto with_dim = [&](auto t) {
    if (head_dim <= 32) return use(t, std::integral_constant<int, 32>());
    if (head_dim <= 64) return use(t, std::integral_constant<int, 64>());
    if (head_dim <= 96) return use(t, std::integral_constant<int, 96>());
    return use(t, std::integral_constant<int, 128>());
  };
  return dtype == DType::kFloat16 ? with_dim(__half()) : with_dim(__nv_bfloat16());
}

// The grid, which it also enters into p. Where dropout's coordinates don't start at a sequence's
// first position, up to `before` positions before it belong to the first tile.
inline dim3 attention_grid(AttentionBatch& p, int before) {
  if (p.tiles) {
    p.n_tiles = p.plan_size;
    return dim3(p.n_tiles * p.heads);
  }
  const int extra = p.key_mask && p.seed ? before : 0;
  p.n_tiles = (p.length + extra + kTileRows - 1) / kTileRows;
  return dim3(p.n_tiles * p.heads * p.batch);
}

// Of shared memory, beside the tiles: the place, and the mask or what is known of shared tiles.
inline int attention_bytes(const AttentionBatch& p) {
  if (p.tiles) return ManyBits::kPlace + ManyBits::kSharedBytes;
  return TilePlace::kSharedBytes + (p.key_mask ? Keys::shared_bytes(p.length) : 0);
}

}  // namespace bertfast
