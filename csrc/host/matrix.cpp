#include "host/matrix.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "host/matrix_sum.h"
#include "host/scheduler.h"

namespace bertfast {
namespace host {
namespace matrix {
namespace {

constexpr int kM = 16, kN = 8, kK = 16;

struct MmaLane {
  unsigned a[4];
  unsigned b[2];
  float c[4];
};

struct StoreLane {
  int byte;      // of its row
  int words[4];  // where its registers go
};

struct LoadLane {
  int byte;  // of its row
  unsigned fragment[4];
  int words[8];  // the words of shared memory that the lane's registers came from
};

void check_full_warp(const char* name, int lanes) {
  if (lanes == warpSize) return;
  throw std::runtime_error(std::string(name) + " needs 32 lanes, the warp has " +
                           std::to_string(lanes));
}

template<bool kBFloat16>
float value(unsigned pair, int half) {
  const uint16_t bits = uint16_t(pair >> (16 * half));
  return kBFloat16 ? __bfloat162float({bits}) : __half2float({bits});
}

template<bool kBFloat16>
void compute_mma(void* const* lane_data, int lanes) {
  check_full_warp("mma_m16n8k16", lanes);
  float a[kM][kK], b[kK][kN], c[kM][kN];
  for (int lane = 0; lane < warpSize; ++lane) {
    const MmaLane& from = *static_cast<const MmaLane*>(lane_data[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = value<kBFloat16>(from.a[i], half);
      }
      for (int i = 0; i < 2; ++i) b[2 * t + i * 8 + half][g] = value<kBFloat16>(from.b[i], half);
      for (int i = 0; i < 2; ++i) c[g + i * 8][2 * t + half] = from.c[2 * i + half];
    }
  }
  for (int row = 0; row < kM; ++row) add_products<kK, kN>(c[row], a[row], b);
  for (int lane = 0; lane < warpSize; ++lane) {
    MmaLane& to = *static_cast<MmaLane*>(lane_data[lane]);
    for (int i = 0; i < 4; ++i) to.c[i] = c[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
  }
}

template<bool kTransposed>
void compute_load(void* const* lane_data, int lanes) {
  check_full_warp("ldmatrix", lanes);
  for (int lane = 0; lane < warpSize; ++lane) {
    LoadLane& to = *static_cast<LoadLane*>(lane_data[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int matrix = 0; matrix < 4; ++matrix) {
      const auto row = [&](int i) {
        return static_cast<const LoadLane*>(lane_data[8 * matrix + i]);
      };
      unsigned short pair[2];
      for (int half = 0; half < 2; ++half) {
        const LoadLane& from = *row(kTransposed ? 2 * t + half : g);
        const int byte = 2 * (kTransposed ? g : 2 * t + half);
        std::memcpy(&pair[half], shared_memory::raw() + from.byte + byte, 2);
        to.words[2 * matrix + half] = from.byte + byte / 4 * 4;
      }
      to.fragment[matrix] = pair[0] | unsigned(pair[1]) << 16;
    }
  }
}

void compute_store(void* const* lane_data, int lanes) {
  check_full_warp("stmatrix", lanes);
  for (int lane = 0; lane < warpSize; ++lane) {
    StoreLane& from = *static_cast<StoreLane*>(lane_data[lane]);
    for (int matrix = 0; matrix < 4; ++matrix) {
      const StoreLane& row = *static_cast<const StoreLane*>(lane_data[8 * matrix + lane / 4]);
      from.words[matrix] = row.byte + lane % 4 * 4;
    }
  }
}

}  // namespace

void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, bool is_bfloat16,
         Site site) {
  MmaLane lane{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  warp_collective("mma_m16n8k16", site, &lane,
                  is_bfloat16 ? &compute_mma<true> : &compute_mma<false>);
  std::memcpy(c, lane.c, sizeof(lane.c));
}

void load(unsigned (&fragment)[4], int start, int index, bool transposed, Site site) {
  LoadLane lane{};
  lane.byte = shared_memory::matrix_row(start, index, false, site);
  warp_collective("ldmatrix", site, &lane, transposed ? &compute_load<true> : &compute_load<false>);
  for (int i = 0; i < 8; i += transposed ? 1 : 2) shared_memory::read_word(lane.words[i], site);
  std::memcpy(fragment, lane.fragment, sizeof(lane.fragment));
}

void store(const unsigned (&fragment)[4], int start, int index, Site site) {
  StoreLane lane{};
  lane.byte = shared_memory::matrix_row(start, index, true, site);
  warp_collective("stmatrix", site, &lane, &compute_store);
  for (int i = 0; i < 4; ++i) {
    std::memcpy(shared_memory::write_landed(lane.words[i], 4, site), &fragment[i], 4);
  }
}

}  // namespace matrix
}  // namespace host
}  // namespace bertfast
