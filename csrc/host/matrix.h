// The tensor cores' instructions, lane by lane as the PTX manual lays out their fragments.
//
// With g = lane / 4 and t = lane % 4, a register of two 16-bit values holds
//   of A (16 x 16)  rows g, g + 8, g, g + 8 and columns 2 t, 2 t, 2 t + 8, 2 t + 8 (and the next)
//   of B (16 x 8)   column g and rows 2 t, 2 t + 8 (and the next)
// and the floats of C (16 x 8) are row g columns 2 t, 2 t + 1, then the same of row g + 8.
#pragma once

#include "host/half.h"
#include "host/shared_memory.h"
#include "host/site.h"

namespace bertfast {
namespace host {
namespace matrix {

void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, bool is_bfloat16,
         Site site);

// Four 8 x 8 matrices of 16-bit values: lane i gives the address of row i % 8 of matrix i / 8.
void load(unsigned (&fragment)[4], int start, int index, bool transposed, Site site);
void store(const unsigned (&fragment)[4], int start, int index, Site site);

}  // namespace matrix
}  // namespace host
}  // namespace bertfast
