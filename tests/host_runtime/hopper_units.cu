// Single products by wgmma, single bulk copies and stores of fragments. See hopper_units.h.
#include "hopper_units.h"

#include "device/tma.cuh"
#include "device/warpgroup.cuh"
#include "device/wgmma.cuh"

#ifdef BERTFAST_HOST
#include <cstdio>
#include <string>

#include "cases.h"
#else
#include <iostream>
#include <map>
#include <string>
#endif

namespace bertfast {
namespace hopper_units {
namespace {

constexpr int kThreads = 128;

struct ProductParams {
  const uint4* image;         // of shared memory: A, then B, where A's place is
  const unsigned* registers;  // of A, (steps, threads, 4)
  float* sums;                // (threads, columns / 2)
};

enum class From { kRegisters, kInner, kOuter };

// The image of A or B for so many rows of A or columns of B. Slabs are whole.
template<int kRowBytes>
constexpr int image_bytes(int others) {
  constexpr int kWidth = kRowBytes / 2;
  return (others + kWidth - 1) / kWidth * kWidth * kRowBytes;
}

// 64 x kColumns sums, over as many inner indices as a row of kRowBytes has values: 64 or 32.
template<class T, int kRowBytes, From kFrom, Major kB, int kColumns>
__global__ void __launch_bounds__(kThreads) product(ProductParams p) {
  constexpr Major kA = kFrom == From::kOuter ? Major::kOuter : Major::kInner;
  constexpr int kMatrix = image_bytes<kRowBytes>(64);
  constexpr int kBytes = kMatrix + image_bytes<kRowBytes>(kColumns);
  constexpr int kSlab = kRowBytes / 2 * kRowBytes;
  const int thread = int(threadIdx.x);
  const Shared<uint4> shared = shared_memory<uint4>(0);
  for (int i = thread; i < kBytes / 16; i += kThreads) shared.store(i, p.image[i]);
  async_proxy_fence();
  __syncthreads();
  float d[kColumns / 8][4];
  unsigned a[kRowBytes / 32][4];
  if constexpr (kFrom == From::kRegisters) {
#pragma unroll
    for (int step = 0; step < kRowBytes / 32; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[step][i] = p.registers[(step * kThreads + thread) * 4 + i];
    }
  }
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kRowBytes / 32; ++step) {
    const uint64_t b =
        wgmma_matrix<kRowBytes>(shared, kMatrix + step * kWgmmaStep<kRowBytes, kB>, kSlab);
    if constexpr (kFrom == From::kRegisters) {
      wgmma<T, kB>(d, a[step], b, step > 0);
    } else {
      wgmma<T, kA, kB>(d, wgmma_matrix<kRowBytes>(shared, step * kWgmmaStep<kRowBytes, kA>, kSlab),
                       b, step > 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) p.sums[thread * kColumns / 2 + i] = d[i / 4][i % 4];
}

template<class T, int kRowBytes, int kColumns>
cudaError_t launch_product(int from, bool b_outer, const ProductParams& p) {
  void (*kernel)(ProductParams);
  if (from == 0) {
    kernel = b_outer ? product<T, kRowBytes, From::kRegisters, Major::kOuter, kColumns>
                     : product<T, kRowBytes, From::kRegisters, Major::kInner, kColumns>;
  } else if (from == 1) {
    kernel = b_outer ? product<T, kRowBytes, From::kInner, Major::kOuter, kColumns>
                     : product<T, kRowBytes, From::kInner, Major::kInner, kColumns>;
  } else {
    kernel = b_outer ? product<T, kRowBytes, From::kOuter, Major::kOuter, kColumns>
                     : product<T, kRowBytes, From::kOuter, Major::kInner, kColumns>;
  }
  const int bytes = image_bytes<kRowBytes>(64) + image_bytes<kRowBytes>(kColumns);
  return launch(kernel, 1, kThreads, bytes, nullptr, p);
}

// All with the columns of a tile of heads; other numbers with one type, as the operands are alike.
template<int kRowBytes>
cudaError_t launch_columns(int columns, bool bfloat16, int from, bool b_outer,
                           const ProductParams& p) {
  if (!bfloat16) return launch_product<__half, kRowBytes, 64>(from, b_outer, p);
  if (columns == 32) return launch_product<__nv_bfloat16, kRowBytes, 32>(from, b_outer, p);
  if (columns == 64) return launch_product<__nv_bfloat16, kRowBytes, 64>(from, b_outer, p);
  if (columns == 96) return launch_product<__nv_bfloat16, kRowBytes, 96>(from, b_outer, p);
  return launch_product<__nv_bfloat16, kRowBytes, 128>(from, b_outer, p);
}

struct CopyParams {
  TensorMap from, to;
  int from_place[3], to_place[3];
  int bytes;
  uint4* image;
};

// Loads a box, shows what shared memory looks like, and stores the box elsewhere.
__global__ void __launch_bounds__(kThreads) copy(const __grid_constant__ CopyParams p) {
  const int thread = int(threadIdx.x);
  const Shared<uint4> box = shared_memory<uint4>(1024);
  const Mbarriers barriers = shared_memory<uint64_t>(0);
  if (thread == 0) {
    mbarrier_init(barriers, 0, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (thread / 32 == 0 && elect_one()) {
    mbarrier_arrive_expecting(barriers, 0, p.bytes);
    tma_load(box, p.from, p.from_place[0], p.from_place[1], p.from_place[2], barriers, 0);
  }
  mbarrier_wait(barriers, 0, 0);
  for (int i = thread; i < p.bytes / 16; i += kThreads) p.image[i] = box.load(i);
  if (thread / 32 == 0 && elect_one()) {
    tma_store(p.to, p.to_place[0], p.to_place[1], p.to_place[2], box);
    tma_store_commit();
    tma_store_wait_read<0>();
  }
}

struct StoreParams {
  const uint4* fragments;  // of each lane
  int place[32];           // of each row
  uint4* rows;
};

__global__ void store_matrices(const __grid_constant__ StoreParams p) {
  const int lane = int(threadIdx.x);
  const uint4 of = p.fragments[lane];
  const unsigned fragment[4] = {of.x, of.y, of.z, of.w};
  const Shared<uint4> rows = shared_memory<uint4>(0);
  stmatrix(rows, p.place[lane], fragment);
  __syncwarp();
  p.rows[lane] = rows.load(p.place[lane]);
}

}  // namespace

// ROW_BYTES COLUMNS FROM (0 registers, 1 inner, 2 outer) B_OUTER BFLOAT16; in: the image, then the
// registers.
cudaError_t run_wgmma(const Numbers& numbers, const void* in, void* out) {
  const int row_bytes = numbers.at(0), columns = numbers.at(1), from = numbers.at(2);
  const bool b_outer = numbers.at(3) != 0, bfloat16 = numbers.at(4) != 0;
  const char* const bytes = static_cast<const char*>(in);
  const auto image = row_bytes == 128 ? &image_bytes<128> : &image_bytes<64>;
  const ProductParams p{reinterpret_cast<const uint4*>(bytes),
                        reinterpret_cast<const unsigned*>(bytes + image(64) + image(columns)),
                        static_cast<float*>(out)};
  return row_bytes == 128 ? launch_columns<128>(columns, bfloat16, from, b_outer, p)
                          : launch_columns<64>(columns, bfloat16, from, b_outer, p);
}

// SIZES BOX FROM_PLACE TO_PLACE (3 each); in: a dense tensor; out: the box's image, then a tensor
// of the same size.
cudaError_t run_copy(const Numbers& numbers, const void* in, void* out) {
  const auto three = [&](int i, int (&to)[3]) {
    for (int j = 0; j < 3; ++j) to[j] = numbers.at(size_t(3 * i + j));
  };
  Boxes boxes{};
  boxes.data = in;
  three(0, boxes.sizes);
  boxes.strides[0] = boxes.sizes[0];
  boxes.strides[1] = int64_t(boxes.sizes[0]) * boxes.sizes[1];
  three(1, boxes.box);
  CopyParams p{};
  three(2, p.from_place);
  three(3, p.to_place);
  p.bytes = 2 * boxes.box[0] * boxes.box[1] * boxes.box[2];
  p.image = static_cast<uint4*>(out);
  cudaError_t error = make_tensor_map(&p.from, boxes);
  boxes.data = static_cast<char*>(out) + p.bytes;
  if (error == cudaSuccess) error = make_tensor_map(&p.to, boxes);
  if (error != cudaSuccess) return error;
  return launch(copy, 1, kThreads, 1024 + p.bytes, nullptr, p);
}

// PLACE (below 64) of each of 32 rows; in: the lanes' fragments; out: the rows.
cudaError_t run_stmatrix(const Numbers& numbers, const void* in, void* out) {
  StoreParams p{static_cast<const uint4*>(in), {}, static_cast<uint4*>(out)};
  for (size_t i = 0; i < 32; ++i) p.place[i] = numbers.at(i);
  return launch(store_matrices, 1, 32, 64 * 16, nullptr, p);
}

#ifdef BERTFAST_HOST

// OUT_BYTES NUMBER...; stdin: in; stdout: out.
template<Unit kUnit>
void run(const host_runtime_test::Arguments& arguments) {
  Numbers numbers;
  for (const std::string& argument : arguments) numbers.push_back(std::stoi(argument));
  std::vector<uint4> in, out(size_t(numbers.front()) / 16 + 1);
  for (uint4 some; std::fread(&some, 1, 16, stdin) == 16;) in.push_back(some);
  host_runtime_test::require(
      kUnit(Numbers(numbers.begin() + 1, numbers.end()), in.data(), out.data()));
  std::fwrite(out.data(), 1, size_t(numbers.front()), stdout);
}

host_runtime_test::Case wgmma_case("wgmma", &run<run_wgmma>);
host_runtime_test::Case copy_case("copy", &run<run_copy>);
host_runtime_test::Case stmatrix_case("stmatrix", &run<run_stmatrix>);
host_runtime_test::Case pipeline_case("pipeline", &run<run_pipeline>);

#endif

}  // namespace hopper_units
}  // namespace bertfast

#ifndef BERTFAST_HOST

// stdin: NAME OUT_BYTES IN_BYTES COUNT NUMBER..., a line's end and in's bytes, again and again;
// stdout: out's bytes. Ends at the first error.
int main() {
  namespace units = bertfast::hopper_units;
  const std::map<std::string, units::Unit> known = {{"wgmma", units::run_wgmma},
                                                    {"copy", units::run_copy},
                                                    {"stmatrix", units::run_stmatrix},
                                                    {"pipeline", units::run_pipeline}};
  std::string name;
  size_t out_bytes, in_bytes, count;
  while (std::cin >> name >> out_bytes >> in_bytes >> count) {
    units::Numbers numbers(count);
    for (int& number : numbers) std::cin >> number;
    std::cin.get();
    std::vector<char> in(in_bytes), out(out_bytes);
    std::cin.read(in.data(), std::streamsize(in_bytes));
    void *on_device = nullptr, *result = nullptr;
    cudaError_t error = cudaMalloc(&on_device, in_bytes);
    if (!error) error = cudaMalloc(&result, out_bytes);
    if (!error) error = cudaMemcpy(on_device, in.data(), in_bytes, cudaMemcpyHostToDevice);
    if (!error) error = cudaMemset(result, 0, out_bytes);
    if (!error) error = known.at(name)(numbers, on_device, result);
    if (!error) error = cudaMemcpy(out.data(), result, out_bytes, cudaMemcpyDeviceToHost);
    if (error) {
      std::cerr << name << ": " << cudaGetErrorString(error) << "\n";
      return 1;
    }
    cudaFree(on_device);
    cudaFree(result);
    std::cout.write(out.data(), std::streamsize(out_bytes));
    std::cout.flush();
  }
  return 0;
}

#endif
