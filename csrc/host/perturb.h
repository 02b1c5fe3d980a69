// A mode, off by default, in which what a GPU computes only approximately comes out differently.
//
// A GPU's approximate functions don't give the bits that a CPU's library gives, and the inner
// rounding of its tensor cores isn't documented. A kernel's error bound must not hang on either:
// its numbers must stay within the bound with every such result moved by as much as is documented.
#pragma once

#include <cmath>
#include <cstdint>

#include "host/half.h"

namespace bertfast {
namespace host {
namespace perturb {

struct Mode {
  bool on = false;
  uint64_t seed = 0;
};
inline Mode mode;

inline bool enabled() {
  return mode.on;
}
inline uint64_t seed() {
  return mode.seed;
}

// 64 well-mixed bits that depend on the key and the seed alone (the finaliser of SplitMix64), so a
// kernel gives the same bits in every order of its threads.
inline uint64_t random(uint64_t key) {
  uint64_t bits = key + (seed() + 1) * 0x9e3779b97f4a7c15u;
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
  return bits ^ (bits >> 31);
}

// `value`, moved by up to `max_ulps` units in the last place, either way. `argument` is what the
// function was called with: two arguments with the same result then move differently. Zeros,
// infinities and NaNs stay; a result that leaves the finite numbers stops at the last one.
inline float ulps(float value, int max_ulps, float argument = 0.0f) {
  if (!enabled() || value == 0.0f || !std::isfinite(value)) return value;
  uint64_t key = uint64_t(__float_as_uint(value)) << 32 | __float_as_uint(argument);
  int64_t move = int64_t(random(key) % uint64_t(2 * max_ulps + 1)) - max_ulps;
  // Floats of one sign are ordered as their bits are.
  uint32_t bits = __float_as_uint(value);
  int64_t magnitude = int64_t(bits & 0x7fffffffu) + move;
  if (magnitude < 0) magnitude = 0;
  if (magnitude > 0x7f7fffff) magnitude = 0x7f7fffff;
  return __uint_as_float((bits & 0x80000000u) | uint32_t(magnitude));
}

}  // namespace perturb
}  // namespace host
}  // namespace bertfast
