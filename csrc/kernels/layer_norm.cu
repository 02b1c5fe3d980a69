// y = (z - mean) * rstd * weight + bias, with z = dropout(x + x_bias) + residual, over rows of
// `cols`.
//
// Saved for the backward: z, mean and rstd (float32), the seed. With g = dy * weight,
// h = (z - mean) * rstd and < > the mean over a row:
//   dz = rstd * (g - <g> - h * <g * h>) + dsum,  dresidual = dz,  dx = dropout(dz)
//   dweight = sum of dy * h,  dbias = sum of dy,  dx_bias = sum of dx    (over rows)
// dsum is z's own gradient, where z was returned as well. bias may be absent. RMSNorm is the same
// without mean and <g>. Without a weight nothing is normalised: y = z, dz = dy.
//
// kThreads threads share a row and hold it in registers, so the variance is a second pass over
// registers. A thread holds kPerThread vectors of kVec columns, kThreads vectors apart; the
// launcher picks the split that leaves no lane empty at BERT's widths (384: 16 threads by 3 vectors
// of 8). Up to 32 threads a row need no barrier; wider rows take a block.
//
// Forward moves 2 to 5 values an element (x, residual; y, z, copy), backward 3 to 5 (dy, z, dsum;
// dz, dx). copy is y in x's dtype, for the 16-bit product that follows a float32 stream under
// autocast. The backward sums columns in registers over the rows that a block meets, of which the
// number of rows alone decides, and writes one row of float32 partial sums a block;
// launch_column_sum adds those in a fixed order. No atomics: the same bits each run.
#include <type_traits>

#include "device/earlier.cuh"
#include "device/philox.cuh"
#include "device/reduce.cuh"
#include "device/row_split.cuh"
#include "device/types.cuh"
#include "device/vec.cuh"
#include "params.h"

namespace bertfast {
namespace {

// A copy may be wanted where x is narrower than y.
template<class X, class T>
constexpr bool kMayCopy = !std::is_same_v<X, T>;

template<bool kCopy, bool kFurther>
using ForwardParams =
    std::conditional_t<kFurther, LayerNormForwardFurther,
                       std::conditional_t<kCopy, LayerNormForwardCopying, LayerNormForward>>;

// kDropout: there may be dropout; with a full split, there is. kFurther: anything may be absent or
// RMSNorm, which branches at run time; in an instance of its own, as the others' code shall not pay
// for it. Rows that aren't read in vectors are rare, and have this instance only.
template<class X, class T, class S, bool kDropout, bool kFurther>
__global__ void __launch_bounds__(S::kBlock, 512 / S::kBlock)
    layer_norm_forward_kernel(ForwardParams<kMayCopy<X, T>, kFurther> p) {
  await_earlier_kernels();
  using XVec = Vec<X, S::kVec>;
  using TVec = Vec<T, S::kVec>;
  const int row = blockIdx.x * S::kRows + S::group();
  // A warp past the last row leaves. Half a warp can't, its other half needs it for the sums: it
  // works on the last row again, unseen.
  if (S::kThreads >= 32 && row >= p.rows) return;
  const bool live = S::kThreads >= 32 || row < p.rows;
  const int64_t from = live ? row : p.rows - 1;
  const int cols = S::kFull ? S::kCols : p.cols;
  const bool has_x_bias = S::kFull || p.x_bias, has_residual = S::kFull || p.residual;
  const bool drops = kDropout && (S::kFull || p.seed);
  const RowDropout dropout(drops ? *p.seed : 0, p.site, p.threshold);
  const int64_t mask_row = drops && p.row_index ? p.row_index[from] : from;

  // 1. all loads of the row, before anything waits for one
  const X* x = static_cast<const X*>(p.x) + from * p.x_row_stride + S::first();
  const T* residual = static_cast<const T*>(p.residual) + from * p.residual_row_stride + S::first();
  XVec x_bits[S::kPerThread];
  TVec residual_bits[S::kPerThread];
#pragma unroll
  for (int j = 0; j < S::kPerThread; ++j) {
    if (S::col(j) < cols) {
      x_bits[j] = XVec::load(x + j * S::kStep);
      if (has_residual) residual_bits[j] = TVec::load(residual + j * S::kStep);
    }
  }

  // 2. z = dropout(x + x_bias) + residual
  const T* x_biases = static_cast<const T*>(p.x_bias) + S::first();
  const int64_t to = from * cols + S::first();
  float z[S::kPerThread][S::kVec];
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < S::kPerThread; ++j) {
    const int col = S::col(j);
    if (col < cols) {
#pragma unroll
      for (int k = 0; k < S::kVec; ++k) z[j][k] = x_bits[j][k];
      if (has_x_bias) {
        const TVec x_bias = TVec::load(x_biases + j * S::kStep);
#pragma unroll
        for (int k = 0; k < S::kVec; ++k) z[j][k] += x_bias[k];
      }
      if (drops) drop(z[j], dropout, mask_row, col, p.keep_scale);
      if (has_residual) {
#pragma unroll
        for (int k = 0; k < S::kVec; ++k) z[j][k] += residual_bits[j][k];
      }
      if (p.z && live) TVec::store(static_cast<T*>(p.z) + to + j * S::kStep, z[j]);
#pragma unroll
      for (int k = 0; k < S::kVec; ++k) sum += z[j][k];
    }
  }

  // 3. mean, then the centred variance
  float mean =
      row_mean(row_sum<S::kThreads, S::kBlock>(sum, shared_memory<float>(0)), cols, p.inv_cols);
  bool is_rms = false, normalises = true;
  if constexpr (kFurther) {
    is_rms = p.rms;
    normalises = p.weight;
    if (is_rms || !normalises) mean = 0.f;
  }
  float squares = 0.f;
#pragma unroll
  for (int j = 0; j < S::kPerThread; ++j) {
    if (S::col(j) < cols) {
#pragma unroll
      for (int k = 0; k < S::kVec; ++k) {
        z[j][k] -= mean;
        squares = fmaf(z[j][k], z[j][k], squares);
      }
    }
  }
  const Shared<float> second = shared_memory<float>(kReduceBytes<S> / 2);
  const float variance = row_sum<S::kThreads, S::kBlock>(squares, second) * p.inv_cols;
  const float rstd = normalises ? rsqrtf(variance + p.eps) : 1.f;
  if (!live) return;
  if constexpr (kFurther) {
    if (p.rstd && S::lane() == 0) {
      if (p.mean) p.mean[row] = mean;
      p.rstd[row] = cols == 1 && !is_rms ? 0.f : rstd;
    }
  } else if (p.mean && S::lane() == 0) {
    p.mean[row] = mean;
    // A row of one value is its own mean, so nothing flows back: exactly, not up to z's rounding.
    p.rstd[row] = cols == 1 ? 0.f : rstd;
  }

  // 4. scale, shift, write
  const T* weights = static_cast<const T*>(p.weight) + S::first();
  const T* biases = static_cast<const T*>(p.bias) + S::first();
#pragma unroll
  for (int j = 0; j < S::kPerThread; ++j) {
    if (S::col(j) < cols) {
      float y[S::kVec];
      if constexpr (kFurther) {
        TVec weight, bias;
        if (normalises) weight = TVec::load(weights + j * S::kStep);
        if (p.bias) bias = TVec::load(biases + j * S::kStep);
        // Without them: the numbers that change nothing, not even the sign of zero.
#pragma unroll
        for (int k = 0; k < S::kVec; ++k) {
          y[k] = fmaf(z[j][k] * rstd, normalises ? weight[k] : 1.f, p.bias ? bias[k] : -0.f);
        }
      } else {
        const TVec weight = TVec::load(weights + j * S::kStep);
        const TVec bias = TVec::load(biases + j * S::kStep);
#pragma unroll
        for (int k = 0; k < S::kVec; ++k) y[k] = fmaf(z[j][k] * rstd, weight[k], bias[k]);
      }
      TVec::store(static_cast<T*>(p.y) + to + j * S::kStep, y);
      if constexpr (kMayCopy<X, T>) {
        if (p.copy) XVec::store(static_cast<X*>(p.copy) + to + j * S::kStep, y);
      }
    }
  }
}

// A block's column sums in shared memory, a part of each for every row group, by pieces of up to 4
// columns: a group's first halves of all vectors, then their second halves. So the lanes that write
// lie in different banks, and half a vector of padding lets those that read in order of columns do.
template<class S>
struct PartialSlots {
  static constexpr int kWide = S::kVec < 4 ? S::kVec : 4;
  using Piece = std::conditional_t<kWide == 4, float4, float>;
  static constexpr int kHalves = S::kVec / kWide;
  static constexpr int kHalf = S::kCols / S::kVec + (kHalves > 1 ? 4 : 0);
  static constexpr int kGroup = kHalves * kHalf;
  static constexpr int kBytes = S::kRows * kGroup * sizeof(Piece);
  static constexpr int kPieces = S::kCols / kWide;  // that are written

  static __device__ __forceinline__ int slot(int group, int vector, int half) {
    return group * kGroup + half * kHalf + vector;
  }
};

// Adds a block's column sums over its row groups and writes them: partial[col] = sum over groups.
template<class S>
__device__ __forceinline__ void write_partial(const float (&sums)[S::kPerThread][S::kVec],
                                              float* partial, int cols) {
  using Slots = PartialSlots<S>;
  using Piece = typename Slots::Piece;
  constexpr int kWide = Slots::kWide;
  const Shared<Piece> slots = shared_memory<Piece>(0);
  __syncthreads();  // whoever still reads the slots is done
#pragma unroll
  for (int j = 0; j < S::kPerThread; ++j) {
#pragma unroll
    for (int half = 0; half < Slots::kHalves; ++half) {
      Piece piece;
      memcpy(&piece, &sums[j][half * kWide], sizeof(Piece));
      slots.store(Slots::slot(S::group(), j * S::kThreads + S::lane(), half), piece);
    }
  }
  __syncthreads();
#pragma unroll
  for (int from = 0; from < Slots::kPieces; from += S::kBlock) {
    const int i = from + threadIdx.x;
    if (i * kWide >= cols) break;
    float total[kWide] = {};
#pragma unroll
    for (int group = 0; group < S::kRows; ++group) {
      const Piece piece = slots.load(Slots::slot(group, i / Slots::kHalves, i % Slots::kHalves));
      float part[kWide];
      memcpy(part, &piece, sizeof(Piece));
#pragma unroll
      for (int k = 0; k < kWide; ++k) total[k] += part[k];
    }
    Vec<float, kWide>::store(partial + i * kWide, total);
  }
}

// Blocks of the backward that a multiprocessor has registers for.
template<class S>
constexpr int kResident = S::kBlock < 384 ? 384 / S::kBlock : 1;

template<bool kFurther>
using BackwardParams = std::conditional_t<kFurther, LayerNormBackwardFurther, LayerNormBackward>;

template<class X, class T, class S, bool kDropout, bool kFurther>
__global__ void __launch_bounds__(S::kBlock, kResident<S>)
    layer_norm_backward_kernel(BackwardParams<kFurther> p) {
  await_earlier_kernels();
  using XVec = Vec<X, S::kVec>;
  using TVec = Vec<T, S::kVec>;
  const int cols = S::kFull ? S::kCols : p.cols;
  // The weight stays in registers, except in rows so wide that the sums need them: there it is read
  // again for each row.
  constexpr bool kKeepWeight = S::kPerThread < 8;
  const T* weights = static_cast<const T*>(p.weight) + S::first();
  bool normalises = true;
  if constexpr (kFurther) normalises = p.weight;
  TVec kept_weight[S::kPerThread];
  if constexpr (kKeepWeight) {
#pragma unroll
    for (int j = 0; j < S::kPerThread; ++j) {
      if (normalises && S::col(j) < cols) kept_weight[j] = TVec::load(weights + j * S::kStep);
    }
  }
  const auto weight = [&](int j) {
    return kKeepWeight ? kept_weight[j] : TVec::load_again(weights + j * S::kStep);
  };
  const bool drops = kDropout && ((S::kFull && !kFurther) || p.seed);
  const RowDropout dropout(drops ? *p.seed : 0, p.site, p.threshold);
  float dweight[S::kPerThread][S::kVec] = {};
  float dbias[S::kPerThread][S::kVec] = {};
  float dx_bias[S::kPerThread][S::kVec] = {};

  // The loop's bounds are the block's, not the row's: lanes without a row stay for their warp's
  // sums.
  // Unsigned, as the row behind the last may be beyond 2^31.
  const unsigned rows = p.rows;
  for (unsigned first = blockIdx.x * S::kRows; first < rows; first += gridDim.x * S::kRows) {
    const unsigned row = first + S::group();
    const bool live = row < rows;
    const T* dy = static_cast<const T*>(p.dy) + int64_t(row) * p.dy_row_stride + S::first();
    const T* z = static_cast<const T*>(p.z) + int64_t(row) * p.z_row_stride + S::first();
    const int64_t to = int64_t(row) * cols + S::first();

    // 1. the row, normalised again
    const int64_t mask_row = drops && live && p.row_index ? p.row_index[row] : row;
    const bool has_mean = !kFurther || p.mean;
    const float mean = live && has_mean ? p.mean[row] : 0.f;
    const float rstd = live && normalises ? p.rstd[row] : 0.f;
    TVec dy_bits[S::kPerThread], z_bits[S::kPerThread];
#pragma unroll
    for (int j = 0; j < S::kPerThread; ++j) {
      if (live && S::col(j) < cols) {
        dy_bits[j] = TVec::load(dy + j * S::kStep);
        if (normalises) z_bits[j] = TVec::load(z + j * S::kStep);
      }
    }

    // 2. the parameters' gradients and the two sums over the row
    float sum_g = 0.f, sum_gh = 0.f;
#pragma unroll
    for (int j = 0; j < S::kPerThread; ++j) {
      if (live && normalises && S::col(j) < cols) {
        const TVec weight_j = weight(j);
#pragma unroll
        for (int k = 0; k < S::kVec; ++k) {
          const float dy_k = dy_bits[j][k];
          const float h = (z_bits[j][k] - mean) * rstd;
          const float g = dy_k * weight_j[k];
          dweight[j][k] = fmaf(dy_k, h, dweight[j][k]);
          dbias[j][k] += dy_k;
          sum_g += g;
          sum_gh = fmaf(g, h, sum_gh);
        }
      }
    }
    const Shared<float> second = shared_memory<float>(kReduceBytes<S> / 2);
    float mean_g =
        row_mean(row_sum<S::kThreads, S::kBlock>(sum_g, shared_memory<float>(0)), cols, p.inv_cols);
    const float mean_gh =
        row_mean(row_sum<S::kThreads, S::kBlock>(sum_gh, second), cols, p.inv_cols);

    if constexpr (kFurther) {
      if (!has_mean) mean_g = 0.f;
    }

    // 3. dz, and dx = dropout(dz)
#pragma unroll
    for (int j = 0; j < S::kPerThread; ++j) {
      const int col = S::col(j);
      if (live && col < cols) {
        // g and h again, from the packed values: as floats the row would not fit beside the sums.
        dy_bits[j].forget();
        z_bits[j].forget();
        float dz[S::kVec];
        if (normalises) {
          const TVec weight_j = weight(j);
#pragma unroll
          for (int k = 0; k < S::kVec; ++k) {
            const float h = (z_bits[j][k] - mean) * rstd;
            dz[k] = rstd * (dy_bits[j][k] * weight_j[k] - mean_g - h * mean_gh);
          }
        } else {
#pragma unroll
          for (int k = 0; k < S::kVec; ++k) dz[k] = dy_bits[j][k];
        }
        if constexpr (kFurther) {
          if (p.dsum) {
            const TVec dsum =
                TVec::load(static_cast<const T*>(p.dsum) + int64_t(row) * p.dsum_row_stride + col);
#pragma unroll
            for (int k = 0; k < S::kVec; ++k) dz[k] += dsum[k];
          }
        }
        if (p.dz) TVec::store(static_cast<T*>(p.dz) + to + j * S::kStep, dz);
        if (drops) drop(dz, dropout, mask_row, col, p.keep_scale);
        if (p.dx) XVec::store(static_cast<X*>(p.dx) + to + j * S::kStep, dz);
#pragma unroll
        for (int k = 0; k < S::kVec; ++k) dx_bias[j][k] += dz[k];
      }
    }
    // The next row's first sum must not overwrite slots that a slower warp still reads.
    if constexpr (S::kThreads > 32) __syncthreads();
  }

  // 4. one row of partial sums
  const int64_t offset = int64_t(blockIdx.x) * cols;
  if (p.partial_dweight) {
    write_partial<S>(dweight, p.partial_dweight + offset, cols);
    if (!kFurther || p.partial_dbias) write_partial<S>(dbias, p.partial_dbias + offset, cols);
  }
  if (p.partial_dx_bias) write_partial<S>(dx_bias, p.partial_dx_bias + offset, cols);
}

// The splits. `use` gets the one for a width; kVec is 1 where 16-byte accesses aren't possible.
// BERT's widths fill one exactly and have kernels of their own; the others share a few.
template<int kVec, class Use>
auto with_forward_split(int cols, bool full, Use use) {
  const int vectors = (cols + kVec - 1) / kVec;
  if constexpr (kVec == 1) {
    return vectors <= 256 ? use(Split<1, 8, 32>()) : use(Split<1, 16, 512>());
  } else {
    constexpr bool k16Bit = kVec == 8;
    constexpr int kWide = k16Bit ? 32 : 64;
    if (full && cols == 384) return use(Split<kVec, 3, kWide / 2, true>());
    if (full && cols == 512) return use(Split<kVec, k16Bit ? 2 : 4, 32, true>());
    if (full && cols == 768) return use(Split<kVec, 3, kWide, true>());
    if (full && cols == 1024) return use(Split<kVec, 4, kWide, true>());
    if (vectors <= 64) return use(Split<kVec, 2, 32>());
    if (vectors <= 128) return use(Split<kVec, 4, 32>());
    if (vectors <= 256) return use(Split<kVec, 4, 64>());
    if constexpr (!k16Bit) {
      if (vectors > 1024) return use(Split<kVec, 8, 256>());
    }
    return use(Split<kVec, 4, 256>());
  }
}

// The backward's: fewer columns a thread, since three sums of each stay in registers. Two rows
// share a block where their warps would be a small one, as each block leaves partial sums.
template<int kVec, int kPerThread, int kThreads, bool kFull = false>
using BackwardSplit = Split<kVec, kPerThread, kThreads, kFull, kThreads <= 64 ? 128 : kThreads>;

template<int kVec, class Use>
auto with_backward_split(int cols, Use use) {
  const int vectors = (cols + kVec - 1) / kVec;
  if constexpr (kVec == 1) {
    return vectors <= 256 ? use(BackwardSplit<1, 8, 32>()) : use(BackwardSplit<1, 32, 256>());
  } else {
    constexpr int kWide = kVec == 8 ? 32 : 64;
    if (cols == 384) return use(BackwardSplit<kVec, 3, kWide / 2, true>());
    if (cols == 512) return use(BackwardSplit<kVec, 2, kWide, true>());
    if (cols == 768) return use(BackwardSplit<kVec, 3, kWide, true>());
    if (cols == 1024) return use(BackwardSplit<kVec, 2, 2 * kWide, true>());
    if (vectors <= 64) return use(BackwardSplit<kVec, 2, 32>());
    if (vectors <= 128) return use(BackwardSplit<kVec, 2, 64>());
    if (vectors <= 256) return use(BackwardSplit<kVec, 2, 128>());
    if constexpr (kVec == 4) {
      if (vectors > 1024) return use(BackwardSplit<kVec, 8, 256>());
    }
    return use(BackwardSplit<kVec, 2, 512>());
  }
}

}  // namespace

cudaError_t launch_layer_norm_forward(const LayerNormForwardFurther& p, DType x_dtype, DType dtype,
                                      Stream stream) {
  return with_types(x_dtype, dtype, [&](auto x, auto t) {
    using X = decltype(x);
    using T = decltype(t);
    constexpr bool kCopy = kMayCopy<X, T>;
    if (p.copy && !kCopy) return cudaErrorInvalidValue;
    const auto launch_with = [&](auto split, const auto kernel, const auto& params) {
      using S = decltype(split);
      const dim3 grid((p.rows - 1) / S::kRows + 1);
      return launch_early(kernel, grid, dim3(S::kBlock), kReduceBytes<S>, stream, params);
    };
    const auto launch_split = [&](auto split) {
      using S = decltype(split);
      const auto kernel = p.seed || !S::kFull
                              ? layer_norm_forward_kernel<X, T, S, true, false>
                              : layer_norm_forward_kernel<X, T, S, !S::kFull, false>;
      return launch_with(split, kernel, static_cast<const ForwardParams<kCopy, false>&>(p));
    };
    const auto launch_further = [&](auto split) {
      using S = decltype(split);
      if constexpr (S::kFull) {
        return cudaErrorInvalidValue;  // not chosen: further forms have no kernels for these
      } else {
        return launch_with(split, layer_norm_forward_kernel<X, T, S, true, true>, p);
      }
    };
    constexpr int kVec = kVecOf<T>;
    const bool wide =
        p.cols % kVec == 0 && p.x_row_stride % kVec == 0 && p.residual_row_stride % kVec == 0 &&
        is_aligned(p.x) && is_aligned(p.residual) && is_aligned(p.x_bias) && is_aligned(p.weight) &&
        is_aligned(p.bias) && is_aligned(p.y) && is_aligned(p.z) && is_aligned(p.copy);
    const bool full = p.x_bias && p.residual;
    if (!wide) return with_forward_split<1>(p.cols, false, launch_further);
    if (p.rms || !p.bias) return with_forward_split<kVec>(p.cols, false, launch_further);
    return with_forward_split<kVec>(p.cols, full, launch_split);
  });
}

cudaError_t launch_layer_norm_backward(const LayerNormBackwardFurther& p, DType x_dtype,
                                       DType dtype, Stream stream) {
  return with_types(x_dtype, dtype, [&](auto x, auto t) {
    using X = decltype(x);
    using T = decltype(t);
    const auto launch_split = [&](auto split) {
      using S = decltype(split);
      constexpr int kPartialBytes = PartialSlots<S>::kBytes;
      constexpr int kBytes = kPartialBytes > kReduceBytes<S> ? kPartialBytes : kReduceBytes<S>;
      const dim3 grid(p.blocks), block(S::kBlock);
      if constexpr (S::kVec > 1) {
        if (!p.dsum && p.mean && (!p.partial_dweight || p.partial_dbias)) {
          const auto kernel = p.seed || !S::kFull
                                  ? layer_norm_backward_kernel<X, T, S, true, false>
                                  : layer_norm_backward_kernel<X, T, S, !S::kFull, false>;
          const LayerNormBackward& params = p;
          return launch_early(kernel, grid, block, kBytes, stream, params);
        }
      }
      const auto kernel = layer_norm_backward_kernel<X, T, S, true, true>;
      return launch_early(kernel, grid, block, kBytes, stream, p);
    };
    constexpr int kVec = kVecOf<T>;
    const bool wide = p.cols % kVec == 0 && p.dy_row_stride % kVec == 0 &&
                      p.z_row_stride % kVec == 0 && p.dsum_row_stride % kVec == 0 &&
                      is_aligned(p.dy) && is_aligned(p.z) && is_aligned(p.dsum) &&
                      is_aligned(p.weight) && is_aligned(p.dz) && is_aligned(p.dx) &&
                      is_aligned(p.partial_dweight) && is_aligned(p.partial_dbias) &&
                      is_aligned(p.partial_dx_bias);
    return wide ? with_backward_split<kVec>(p.cols, launch_split)
                : with_backward_split<1>(p.cols, launch_split);
  });
}

RowBlock layer_norm_backward_block(int cols, DType dtype) {
  const auto block = [](auto split) -> RowBlock {
    using S = decltype(split);
    return {S::kRows, kResident<S>};
  };
  return dtype == DType::kFloat32 ? with_backward_split<4>(cols, block)
                                  : with_backward_split<8>(cols, block);
}

}  // namespace bertfast
