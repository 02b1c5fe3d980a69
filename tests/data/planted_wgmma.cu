// Kernels with wgmma, in two of which the gates must find a fault: tests/test_kernels_wgmma.py.
#include "device/wgmma.cuh"

namespace bertfast {

struct Planted {
  const uint4* in;
  const unsigned* a;
  float* out;
};

template<bool kFenced, bool kMixed>
__global__ void __launch_bounds__(128) planted_kernel(Planted p) {
  const int thread = int(threadIdx.x);
  const Shared<uint4> shared = shared_memory<uint4>(0);
  for (int i = thread; i < 512; i += 128) shared.store(i, p.in[i]);
  async_proxy_fence();
  __syncthreads();
  float d[8][4] = {};
  for (int turn = 0; turn < 8; ++turn) {
    unsigned a[4];
    for (int i = 0; i < 4; ++i) a[i] = p.a[4 * turn + i];
    if (kFenced) wgmma_fence();
    wgmma<__half, Major::kInner>(d, a, wgmma_matrix<128>(shared, 0), true);
    wgmma_commit();
    wgmma_wait<0>();
  }
  if (kMixed) {
    const unsigned a[4] = {p.a[0], p.a[1], p.a[2], p.a[3]};
    mma_m16n8k16<__half>(d[0], a, p.a[4], p.a[5]);
  }
  for (int i = 0; i < 32; ++i) p.out[32 * thread + i] = d[i / 4][i % 4];
}

template __global__ void planted_kernel<true, false>(Planted);
template __global__ void planted_kernel<false, false>(Planted);
template __global__ void planted_kernel<true, true>(Planted);

}  // namespace bertfast
