#include "host/wgmma.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "host/async_copy.h"
#include "host/bulk_copy.h"
#include "host/clocks.h"
#include "host/half.h"
#include "host/left_out.h"
#include "host/matrix_sum.h"
#include "host/race_check.h"
#include "host/scheduler.h"
#include "host/shared_memory.h"

namespace bertfast {
namespace host {
namespace wgmma {
namespace {

constexpr int kM = 64, kMostColumns = 128, kK = 16;
constexpr int kThreads = 128;
constexpr uint32_t kUnderWay = 0x7f80cafeu;  // a signalling NaN: arithmetic makes it a quiet one

// The sums of products under way, by the place of the first thread's.
struct Sums {
  int count;  // a thread's
  float* place[kThreads];
  float values[kThreads][kMostColumns / 2];
  size_t group;
  Site site;

  size_t bytes() const { return size_t(count) * sizeof(float); }
};

struct Warpgroup {
  int engine = 0;
  bool fenced = false;
  std::vector<uint64_t> closed;  // groups: when each was
  std::vector<std::unique_ptr<Sums>> under_way;
};

Warpgroup warpgroups[8];

[[noreturn]] void fail(const std::string& message, Site site) {
  throw std::runtime_error(message + " at " + to_string(site) + ", in " +
                           thread_name(current_thread()));
}

int my_number() {
  return current_thread() / kThreads;
}

Warpgroup& mine() {
  Warpgroup& group = warpgroups[my_number()];
  if (group.engine == 0) {
    group.engine =
        clocks::new_engine("the wgmma of warpgroup " + std::to_string(my_number()),
                           "wgmma_wait tells its warpgroup, a barrier after that the others");
  }
  return group;
}

// A matrix descriptor (PTX ISA, "Matrix Descriptor Format") of kK inner indices and of others, rows
// of A or columns of B.
class Matrix {
 public:
  Matrix(uint64_t bits, bool outer, Site site)
      : start_(int(bits & 0x3fff) << 4),
        slab_bytes_(int(bits >> 16 & 0x3fff) << 4),
        eight_rows_(int(bits >> 32 & 0x3fff) << 4),
        outer_(outer) {
    const int swizzle = int(bits >> 62);
    if (swizzle != 1 && swizzle != 2)
      fail("wgmma of a matrix that isn't swizzled by 128 or 64 bytes", site);
    row_bytes_ = swizzle == 1 ? 128 : 64;
    // Rows of a swizzle's pattern are told by the address: it must begin at row 0.
    if ((start_ / row_bytes_) % 8 != 0 || (bits >> 49 & 7) != 0) {
      fail("wgmma of a matrix at byte " + std::to_string(start_) + " of shared memory: rows of " +
               std::to_string(row_bytes_) + " bytes must begin at a multiple of " +
               std::to_string(8 * row_bytes_),
           site);
    }
    if (outer ? start_ % row_bytes_ != 0 : start_ % row_bytes_ + 2 * kK > row_bytes_) {
      fail("wgmma of a matrix that crosses the end of its rows of " + std::to_string(row_bytes_) +
               " bytes",
           site);
    }
  }

  // The byte of shared memory where an element lies.
  int operator()(int other, int inner) const {
    const int row = outer_ ? inner : other, column = outer_ ? other : inner;
    const int in_row = row_bytes_ / 2;
    const int slab = outer_ ? column / in_row * slab_bytes_ : 0;
    const int byte = start_ + row / 8 * eight_rows_ + row % 8 * row_bytes_ + slab +
                     2 * (outer_ ? column % in_row : column);
    return bulk_copy::swizzled(byte, row_bytes_);
  }

 private:
  int start_, slab_bytes_, eight_rows_, row_bytes_;
  bool outer_;
};

float value(uint16_t bits, bool is_bfloat16) {
  return is_bfloat16 ? __bfloat162float({bits}) : __half2float({bits});
}

// Reads a matrix with so many others as the warpgroup's engine; use(other, inner, value) with each
// element.
template<class Use>
void read(const Matrix& matrix, int others, const char* name, const Product& product,
          race_check::EngineAccess* access, Use use) {
  for (int other = 0; other < others; ++other) {
    for (int inner = 0; inner < kK; ++inner) {
      const int byte = matrix(other, inner);
      if (byte % 16 == 0) {
        shared_memory::check_range(byte, 16, name, product.site);
        async_copy::check_landed(byte, 16, name, product.site);
        bulk_copy::check_landed(byte, 16, name, product.site);
        access->read(byte, 16);
      }
    }
    for (int inner = 0; inner < kK; ++inner) {
      uint16_t bits;
      std::memcpy(&bits, shared_memory::raw() + matrix(other, inner), 2);
      use(other, inner, value(bits, product.is_bfloat16));
    }
  }
}

// Where sum i of a thread is among the product's.
int row_of(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}
int column_of(int thread, int i) {
  return i / 4 * 8 + thread % 4 * 2 + i % 2;
}

void check_untouched(const Sums& sums) {
  for (int thread = 0; thread < kThreads; ++thread) {
    for (int i = 0; i < sums.count; ++i) {
      uint32_t bits;
      std::memcpy(&bits, sums.place[thread] + i, 4);
      if (bits == kUnderWay) continue;
      throw std::runtime_error("sums of the wgmma at " + to_string(sums.site) +
                               " were written before a wgmma_wait, by " +
                               thread_name(my_number() * kThreads + thread));
    }
  }
}

void compute(void* const* lane_data, int) {
  const auto lane = [&](int i) { return static_cast<const Product*>(lane_data[i]); };
  const Product& first = *lane(0);
  Warpgroup& group = mine();
  for (int i = 1; i < kThreads; ++i) {
    if (lane(i)->a_matrix == first.a_matrix && lane(i)->b_matrix == first.b_matrix) continue;
    fail("wgmma of other matrices in one thread of the warpgroup than in another", first.site);
  }
  if (!group.fenced) fail("wgmma with no wgmma_fence since the last wgmma_commit", first.site);
  race_check::EngineAccess access(group.engine, my_number() * kThreads, kThreads, first.site);
  static float a[kM][kK];
  static float b[kMostColumns / 32][kK][32], d[kMostColumns / 32][kM][32];
  read(Matrix(first.b_matrix, first.b_outer, first.site), first.columns, "wgmma's B", first,
       &access, [&](int n, int k, float v) { b[n / 32][k][n % 32] = v; });
  if (first.a) {
    for (int thread = 0; thread < kThreads; ++thread) {
      for (int i = 0; i < 8; ++i) {
        const unsigned pair = lane(thread)->a[i / 2];
        const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
        a[row][thread % 4 * 2 + i / 4 * 8 + i % 2] =
            value(uint16_t(pair >> (16 * (i % 2))), first.is_bfloat16);
      }
    }
  } else {
    read(Matrix(first.a_matrix, first.a_outer, first.site), kM, "wgmma's A", first, &access,
         [&](int m, int k, float v) { a[m][k] = v; });
  }

  const auto known = std::find_if(
      group.under_way.begin(), group.under_way.end(),
      [&](const std::unique_ptr<Sums>& other) { return other->place[0] == first.sums; });
  Sums* sums;
  if (known != group.under_way.end()) {
    sums = known->get();
    if (sums->count != first.columns / 2) {
      fail("wgmma of more or fewer columns than the one under way at " + to_string(sums->site),
           first.site);
    }
    check_untouched(*sums);
  } else {
    group.under_way.push_back(std::make_unique<Sums>());
    sums = group.under_way.back().get();
    sums->count = first.columns / 2;
    for (int thread = 0; thread < kThreads; ++thread) {
      sums->place[thread] = lane(thread)->sums;
      std::memcpy(sums->values[thread], lane(thread)->sums, sums->bytes());
    }
  }
  sums->group = group.closed.size();
  sums->site = first.site;
  for (int thread = 0; thread < kThreads; ++thread) {
    for (int i = 0; i < sums->count; ++i) {
      const int column = column_of(thread, i);
      d[column / 32][row_of(thread, i)][column % 32] =
          first.accumulates ? sums->values[thread][i] : 0.f;
    }
  }
  for (int slab = 0; slab < first.columns / 32; ++slab) {
    for (int row = 0; row < kM; ++row) add_products<kK, 32>(d[slab][row], a[row], b[slab]);
  }
  for (int thread = 0; thread < kThreads; ++thread) {
    for (int i = 0; i < sums->count; ++i) {
      const int column = column_of(thread, i);
      sums->values[thread][i] = d[column / 32][row_of(thread, i)][column % 32];
      std::memcpy(sums->place[thread] + i, &kUnderWay, 4);
    }
  }
}

void compute_fence(void* const*, int) {
  mine().fenced = true;
}

void compute_commit(void* const*, int) {
  Warpgroup& group = mine();
  group.fenced = false;
  group.closed.push_back(clocks::tick());
}

void compute_wait(void* const* data, int) {
  Warpgroup& group = mine();
  const size_t left = size_t(*static_cast<const int*>(data[0]));
  if (group.closed.size() <= left) return;
  const size_t done = group.closed.size() - left;
  for (int thread = 0; thread < kThreads; ++thread) {
    clocks::learn(my_number() * kThreads + thread, group.engine, group.closed[done - 1]);
  }
  const auto is_done = [&](const std::unique_ptr<Sums>& sums) {
    if (sums->group >= done) return false;
    check_untouched(*sums);
    for (int thread = 0; thread < kThreads; ++thread) {
      std::memcpy(sums->place[thread], sums->values[thread], sums->bytes());
    }
    return true;
  };
  group.under_way.erase(std::remove_if(group.under_way.begin(), group.under_way.end(), is_done),
                        group.under_way.end());
}

}  // namespace

void begin_block() {
  for (Warpgroup& group : warpgroups) group = Warpgroup();
}

void end_block() {
  for (const Warpgroup& group : warpgroups) {
    if (group.under_way.empty()) continue;
    const std::string site = to_string(group.under_way.front()->site);
    begin_block();
    throw std::runtime_error(block_name() + " ended without waiting for its wgmma at " + site);
  }
}

void fence(Site site) {
  if (is_left_out(site)) return;
  warpgroup_collective("wgmma_fence", site, nullptr, &compute_fence);
}

void issue(const Product& product) {
  Product mine = product;
  warpgroup_collective("wgmma", product.site, &mine, &compute);
}

void commit(Site site) {
  if (is_left_out(site)) return;
  warpgroup_collective("wgmma_commit", site, nullptr, &compute_commit);
}

void wait(int left, Site site) {
  if (is_left_out(site)) return;
  warpgroup_collective("wgmma_wait", site, &left, &compute_wait);
}

}  // namespace wgmma
}  // namespace host
}  // namespace bertfast
