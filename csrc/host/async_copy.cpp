#include "host/async_copy.h"

#include <cstdint>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>
#include <vector>

#include "host/scheduler.h"
#include "host/shared_memory.h"

namespace bertfast {
namespace host {
namespace async_copy {
namespace {

struct Copy {
  int byte;
  int size;
  Site site;
  unsigned char data[16];
};

// A thread's copies: closed groups, oldest first, and those that no commit has closed yet.
struct Queue {
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

std::vector<Queue> queues;
std::vector<int> owner;  // of each word: 1 + the thread whose copy is under way, or 0
int under_way = 0;

const Copy* find(const Queue& queue, int word) {
  const auto covers = [&](const Copy& copy) {
    return copy.byte / 4 <= word && word < (copy.byte + copy.size) / 4;
  };
  for (const auto& group : queue.groups) {
    for (const Copy& copy : group) {
      if (covers(copy)) return &copy;
    }
  }
  for (const Copy& copy : queue.open) {
    if (covers(copy)) return &copy;
  }
  return nullptr;
}

void land(const Copy& copy) {
  for (int word = copy.byte / 4; word < (copy.byte + copy.size) / 4; ++word)
    owner[size_t(word)] = 0;
  --under_way;
  std::memcpy(shared_memory::write_landed(copy.byte, copy.size, copy.site), copy.data,
              size_t(copy.size));
}

void clear() {
  for (Queue& queue : queues) {
    queue.groups.clear();
    queue.open.clear();
  }
  std::fill(owner.begin(), owner.end(), 0);
  under_way = 0;
}

}  // namespace

void begin_block(int shared_bytes) {
  if (owner.size() < size_t(shared_bytes + 3) / 4) owner.resize(size_t(shared_bytes + 3) / 4);
}

void end_block() {
  if (under_way == 0) return;
  for (size_t word = 0; word < owner.size(); ++word) {
    if (owner[word] == 0) continue;
    const int thread = owner[word] - 1;
    const std::string site = to_string(find(queues[size_t(thread)], int(word))->site);
    clear();
    throw std::runtime_error(thread_name(thread) +
                             " returned without waiting for its cp_async at " + site);
  }
}

void abandon_block() {
  if (under_way) clear();
}

void issue(int byte, int size, const void* from, Site site) {
  Copy copy{byte, size, site, {}};
  if (from) std::memcpy(copy.data, from, size_t(size));
  const int thread = current_thread();
  if (queues.size() <= size_t(thread)) queues.resize(size_t(thread) + 1);
  for (int word = byte / 4; word < (byte + size) / 4; ++word) owner[size_t(word)] = thread + 1;
  ++under_way;
  queues[size_t(thread)].open.push_back(copy);
}

void commit() {
  const size_t thread = size_t(current_thread());
  if (queues.size() <= thread) queues.resize(thread + 1);
  Queue& queue = queues[thread];
  queue.groups.push_back(std::move(queue.open));
  queue.open.clear();
}

void wait(int left) {
  const size_t thread = size_t(current_thread());
  if (queues.size() <= thread) return;
  Queue& queue = queues[thread];
  while (queue.groups.size() > size_t(left)) {
    for (const Copy& copy : queue.groups.front()) land(copy);
    queue.groups.pop_front();
  }
}

void check_landed(int byte, int size, const char* access, Site site) {
  if (under_way == 0) return;
  for (int word = byte / 4; word < (byte + size + 3) / 4; ++word) {
    if (owner[size_t(word)] == 0) continue;
    const int thread = owner[size_t(word)] - 1;
    throw std::runtime_error(
        std::string(access) + " of byte " + std::to_string(4 * word) + " of shared memory at " +
        to_string(site) + " by " + thread_name(current_thread()) + " while a cp_async of " +
        thread_name(thread) + " at " + to_string(find(queues[size_t(thread)], word)->site) +
        " is under way: no cp_async_wait has waited for it");
  }
}

}  // namespace async_copy
}  // namespace host
}  // namespace bertfast
