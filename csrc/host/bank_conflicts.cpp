#include "host/bank_conflicts.h"

#include <algorithm>

#include "host/scheduler.h"

namespace bertfast {
namespace host {
namespace banks {
namespace {

constexpr int kBanks = 32;

// One line that loads, or one that stores.
struct Place {
  Site site;
  bool writes;
  int worst_degree = 0;
  int64_t accesses = 0;
};

// What the lanes of a warp did in one execution of a place.
struct WarpAccess {
  uint32_t lanes = 0;
  int size = 0;
  int byte[warpSize];
};

// A warp's executions of one place since it last met.
struct PlaceLog {
  int executed[warpSize] = {};
  size_t used = 0;
  std::vector<WarpAccess> accesses;
};

struct WarpLog {
  std::vector<PlaceLog> places;
  std::vector<size_t> touched;
};

std::vector<Place> places;
WarpLog logs[32];

// A place's number. Called at every access, so the last answers are kept.
size_t number_of(Site site, bool writes) {
  static size_t recent[256];
  size_t& guess = recent[(size_t(site.line) * 2 + writes) % 256];
  auto matches = [&](const Place& place) {
    return place.site.file == site.file && place.site.line == site.line && place.writes == writes;
  };
  if (guess < places.size() && matches(places[guess])) return guess;
  guess = size_t(std::find_if(places.begin(), places.end(), matches) - places.begin());
  if (guess == places.size()) places.push_back({site, writes});
  return guess;
}

// Accesses of 8 bytes are served for half a warp at a time, of 16 bytes for a quarter.
int conflict_degree(const WarpAccess& access) {
  int lanes_at_once = access.size <= 4 ? 32 : access.size == 8 ? 16 : 8;
  int worst = 0;
  for (int first = 0; first < warpSize; first += lanes_at_once) {
    int words_of[kBanks] = {};
    int word_in[kBanks][kBanks];
    for (int lane = first; lane < first + lanes_at_once; ++lane) {
      if (!(access.lanes >> lane & 1)) continue;
      for (int byte = access.byte[lane]; byte < access.byte[lane] + access.size; byte += 4) {
        int word = byte / 4;
        int bank = word % kBanks;
        int* end = word_in[bank] + words_of[bank];
        if (std::find(word_in[bank], end, word) != end) continue;
        *end = word;
        worst = std::max(worst, ++words_of[bank]);
      }
    }
  }
  return worst;
}

}  // namespace

void access(int byte, int size, bool writes, Site site) {
  int lane = current_thread() % warpSize;
  WarpLog& log = logs[current_thread() / warpSize];
  size_t number = number_of(site, writes);
  if (log.places.size() <= number) log.places.resize(number + 1);
  PlaceLog& place = log.places[number];
  size_t execution = size_t(place.executed[lane]++);
  if (execution >= place.used) {
    if (place.used == 0) log.touched.push_back(number);
    place.used = execution + 1;
    if (place.accesses.size() < place.used) place.accesses.resize(place.used);
    place.accesses[execution].lanes = 0;
  }
  WarpAccess& warp_access = place.accesses[execution];
  warp_access.lanes |= 1u << lane;
  warp_access.size = size;
  warp_access.byte[lane] = byte;
}

void close_warp(int warp) {
  WarpLog& log = logs[warp];
  for (size_t number : log.touched) {
    PlaceLog& place = log.places[number];
    for (size_t i = 0; i < place.used; ++i) {
      int degree = conflict_degree(place.accesses[i]);
      places[number].worst_degree = std::max(places[number].worst_degree, degree);
    }
    places[number].accesses += int64_t(place.used);
    place.used = 0;
    std::fill(place.executed, place.executed + warpSize, 0);
  }
  log.touched.clear();
}

void close_block() {
  int threads = int(blockDim.x * blockDim.y * blockDim.z);
  for (int warp = 0; warp * warpSize < threads; ++warp) close_warp(warp);
}

void discard() {
  for (WarpLog& log : logs) log = WarpLog();
}

std::vector<BankConflicts> records() {
  std::vector<BankConflicts> result;
  for (const Place& place : places) {
    if (place.accesses == 0) continue;
    std::string site = to_string(place.site) + (place.writes ? " store" : " load");
    // A header's file name has one address in each object file that includes it.
    auto same = std::find_if(result.begin(), result.end(),
                             [&](const BankConflicts& other) { return other.site == site; });
    if (same == result.end()) {
      result.push_back({site, place.worst_degree, place.accesses});
    } else {
      same->worst_degree = std::max(same->worst_degree, place.worst_degree);
      same->accesses += place.accesses;
    }
  }
  return result;
}

void reset() {
  discard();
  places.clear();
}

}  // namespace banks
}  // namespace host
}  // namespace bertfast
