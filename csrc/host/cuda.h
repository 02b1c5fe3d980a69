// Stands in for the CUDA headers when a kernel source is compiled for a CPU.
//
// A launch runs the grid's blocks one after the other, and the threads of a block as fibers on the
// calling OS thread: scheduler.h says how they take turns and meet, shared_memory.h what is
// checked. Nothing here comes from CUDA's headers, which a plain C++ compiler can't read.
//
// Compile with -ffp-contract=off, so that a multiply and an add aren't fused where the kernel
// didn't say so; with -fno-strict-aliasing, since kernels read floats through a uint4, which nvcc
// allows; and with -Wno-unknown-pragmas, for `#pragma unroll`.
#pragma once

#ifndef BERTFAST_HOST
#error "host/cuda.h is for builds with BERTFAST_HOST"
#endif

#include "host/half.h"
#include "host/intrinsics.h"
#include "host/launch.h"
#include "host/math.h"
#include "host/shared_memory.h"
#include "host/vector_access.h"
#include "host/vector_types.h"

#define __global__
#define __device__
#define __host__
// Only a hint here: forcing it makes a kernel file take half as long again to compile.
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
