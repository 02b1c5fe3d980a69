// wgmma: products of a warpgroup that go on while its threads do, until they wait.
//
// A product is computed when it is issued, but until its group has been waited for its sums are
// NaNs that no arithmetic leaves as they are: so whoever reads them gets NaN, and whoever changes
// them is found. Shared memory that it reads is locked as long: device/wgmma.cuh says what must
// come before.
#pragma once

#include <cstdint>

#include "host/site.h"

namespace bertfast {
namespace host {
namespace wgmma {

// What a lane passes. `sums` are d[n][i] for `columns`, half as many floats, as matrix.h lays out
// C; a is null where A is in shared memory. `outer`: rows in shared memory are inner indices.
struct Product {
  int columns;
  float* sums;
  const unsigned* a;
  uint64_t a_matrix;
  bool a_outer;
  uint64_t b_matrix;
  bool b_outer;
  bool accumulates;
  bool is_bfloat16;
  Site site;
};

void begin_block();
// Throws if a product was not waited for.
void end_block();

void fence(Site site);
void issue(const Product& product);
void commit(Site site);
void wait(int left, Site site);

}  // namespace wgmma
}  // namespace host
}  // namespace bertfast
