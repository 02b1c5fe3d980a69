#include "host/bulk_copy.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "host/async_copy.h"
#include "host/clocks.h"
#include "host/left_out.h"
#include "host/mbarrier.h"
#include "host/race_check.h"
#include "host/scheduler.h"
#include "host/shared_memory.h"

namespace bertfast {
namespace host {
namespace bulk_copy {
namespace {

struct Load {
  int to;
  TensorMap map;
  Place at;
  int barrier;
  clocks::Knowledge knowledge;  // of the thread that started it
  Site site;
};

struct Store {
  TensorMap map;
  Place at;
  std::vector<uint16_t> values;
  Site site;
  uint64_t until;
};

// A thread's stores: closed groups, oldest first, and those that no commit has closed yet.
struct Queue {
  int engine;
  std::deque<std::vector<Store>> groups;
  std::vector<Store> open;
};

std::deque<Load> loads;
std::map<int, Queue> queues;  // by thread

[[noreturn]] void fail(const std::string& message, Site site) {
  throw std::runtime_error(message + " at " + to_string(site) + ", in " +
                           thread_name(current_thread()));
}

int row_bytes(const TensorMap& map) {
  return 2 * map.box[0];
}

int box_bytes(const TensorMap& map) {
  return row_bytes(map) * map.box[1] * map.box[2];
}

// Calls use(value or null, byte of the dense box) with each value of a box; null: outside.
template<class Use>
void for_each_value(const TensorMap& map, const Place& at, Use use) {
  int byte = 0;
  for (int k = 0; k < map.box[2]; ++k) {
    for (int j = 0; j < map.box[1]; ++j) {
      const int y = at[1] + j, z = at[2] + k;
      const bool row_is_there = y >= 0 && y < map.sizes[1] && z >= 0 && z < map.sizes[2];
      const char* row = static_cast<const char*>(map.data);
      if (row_is_there) row += y * map.strides[0] + z * map.strides[1];
      for (int i = 0; i < map.box[0]; ++i, byte += 2) {
        const int x = at[0] + i;
        use(row_is_there && x >= 0 && x < map.sizes[0] ? row + 2 * x : nullptr, byte);
      }
    }
  }
}

void check_place(const char* name, const TensorMap& map, int byte, Site site) {
  if (reinterpret_cast<uintptr_t>(&map) % 64 != 0) {
    fail(std::string(name) + ": the tensor map is not aligned to 64 bytes", site);
  }
  shared_memory::check_range(byte, box_bytes(map), name, site);
  // Where the pattern of the swizzle begins: elsewhere it would be no longer that of Tile.
  const int pattern = 8 * row_bytes(map);
  if (byte % pattern != 0) {
    fail(std::string(name) + " of rows of " + std::to_string(row_bytes(map)) + " bytes: byte " +
             std::to_string(byte) + " of shared memory is no multiple of " +
             std::to_string(pattern),
         site);
  }
  mbarrier::check_apart(byte, box_bytes(map), name, site);
  async_copy::check_landed(byte, box_bytes(map), name, site);
  check_landed(byte, box_bytes(map), name, site);
}

void land(const Load& load) {
  unsigned char* const shared = shared_memory::raw();
  for_each_value(load.map, load.at, [&](const char* from, int byte) {
    uint16_t value = 0;
    if (from) std::memcpy(&value, from, 2);
    std::memcpy(shared + swizzled(load.to + byte, row_bytes(load.map)), &value, 2);
  });
  const int bytes = box_bytes(load.map);
  race_check::engine_wrote(mbarrier::engine(load.barrier), load.to, bytes, load.site);
  mbarrier::bytes_came(load.barrier, bytes, load.knowledge);
}

void land(const Store& store) {
  for_each_value(store.map, store.at, [&](const char* to, int byte) {
    if (to) std::memcpy(const_cast<char*>(to), &store.values[size_t(byte / 2)], 2);
  });
}

Queue& my_queue() {
  const int me = current_thread();
  const auto found = queues.find(me);
  if (found != queues.end()) return found->second;
  const int engine =
      clocks::new_engine("a bulk store of " + thread_name(me),
                         "tma_store_wait_read tells its thread, a barrier after that the others");
  return queues[me] = Queue{engine, {}, {}};
}

}  // namespace

int swizzled(int byte, int row_bytes) {
  return byte ^ (byte >> 7 & (row_bytes == 128 ? 7 : 3)) << 4;
}

void end_block() {
  std::string text;
  for (const Load& load : loads) {
    text =
        block_name() + " ended while a bulk load is under way, started at " + to_string(load.site);
  }
  for (const auto& [thread, queue] : queues) {
    const auto& left = queue.groups.empty() ? queue.open : queue.groups.front();
    if (left.empty()) continue;
    text = thread_name(thread) + " returned without waiting for its bulk store at " +
           to_string(left.front().site);
  }
  abandon_block();
  if (!text.empty()) throw std::runtime_error(text);
}

void abandon_block() {
  loads.clear();
  queues.clear();
}

void load(int to, const TensorMap& from, const Place& at, int barrier_byte, Site site) {
  check_place("tma_load", from, to, site);
  const int barrier = mbarrier::of_copy(barrier_byte, site);
  race_check::EngineAccess(mbarrier::engine(barrier), current_thread(), 1, site)
      .will_write(to, box_bytes(from));
  loads.push_back({to, from, at, barrier, {}, site});
  clocks::release(&loads.back().knowledge);
}

void store(const TensorMap& to, const Place& at, int from, Site site) {
  check_place("tma_store", to, from, site);
  Queue& queue = my_queue();
  race_check::EngineAccess(queue.engine, current_thread(), 1, site).read(from, box_bytes(to));
  Store store{to, at, std::vector<uint16_t>(size_t(box_bytes(to) / 2)), site, 0};
  for (int byte = 0; byte < box_bytes(to); byte += 2) {
    std::memcpy(&store.values[size_t(byte / 2)],
                shared_memory::raw() + swizzled(from + byte, row_bytes(to)), 2);
  }
  queue.open.push_back(std::move(store));
}

void commit(Site site) {
  if (is_left_out(site)) return;
  Queue& queue = my_queue();
  for (Store& store : queue.open) store.until = clocks::tick();
  queue.groups.push_back(std::move(queue.open));
  queue.open.clear();
}

void wait_read(int left, Site site) {
  if (is_left_out(site)) return;
  Queue& queue = my_queue();
  while (queue.groups.size() > size_t(left)) {
    for (const Store& store : queue.groups.front()) {
      clocks::learn(current_thread(), queue.engine, store.until);
      land(store);
    }
    queue.groups.pop_front();
  }
}

bool land_one() {
  if (loads.empty()) return false;
  size_t which = 0;
  if (schedule.order == Order::kReverse) which = loads.size() - 1;
  if (schedule.order == Order::kRandom) which = size_t(next_random() % loads.size());
  const Load load = loads[which];
  loads.erase(loads.begin() + long(which));
  land(load);
  return true;
}

void check_landed(int byte, int size, const char* access, Site site) {
  for (const Load& load : loads) {
    if (byte >= load.to + box_bytes(load.map) || load.to >= byte + size) continue;
    fail(std::string(access) + " of byte " + std::to_string(std::max(byte, load.to)) +
             " of shared memory while the bulk load at " + to_string(load.site) +
             " is under way: no mbarrier_wait has waited for it,",
         site);
  }
}

}  // namespace bulk_copy
}  // namespace host
}  // namespace bertfast
