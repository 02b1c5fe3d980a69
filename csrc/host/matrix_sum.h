// The sums of the tensor cores' products.
//
// Products are exact and sums are float32, from the first to the last. How the hardware rounds
// inside isn't documented: with perturb on, each sum runs in an order of its own and cuts off
// instead of rounding.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host/half.h"
#include "host/perturb.h"

namespace bertfast {
namespace host {

// a + b with the bits that don't fit cut off.
inline float add_and_cut(float a, float b) {
  const double exact = double(a) + double(b);
  const float rounded = float(exact);
  if (!std::isfinite(rounded) || std::fabs(double(rounded)) <= std::fabs(exact)) return rounded;
  return __uint_as_float(__float_as_uint(rounded) - 1);
}

template<int kK, int kN>
float perturbed_sum(const float* a, const float (*b)[kN], int column, float sum) {
  int order[kK] = {};
  uint64_t bits = uint64_t(__float_as_uint(sum)) << 8 | unsigned(column);
  for (int k = 0; k < kK; ++k) {
    bits = perturb::random(bits);
    const int other = int(bits % uint64_t(k + 1));
    order[k] = order[other];
    order[other] = k;
  }
  for (int k : order) sum = add_and_cut(sum, a[k] * b[k][column]);
  return sum;
}

// sums += a b, of one row of a.
template<int kK, int kN>
void add_products(float (&sums)[kN], const float (&a)[kK], const float (&b)[kK][kN]) {
  if (perturb::enabled()) {
    for (int n = 0; n < kN; ++n) sums[n] = perturbed_sum<kK, kN>(a, b, n, sums[n]);
    return;
  }
  for (int k = 0; k < kK; ++k) {
    for (int n = 0; n < kN; ++n) sums[n] += a[k] * b[k][n];
  }
}

}  // namespace host
}  // namespace bertfast
