#include "host/shared_memory.h"

#include <stdexcept>
#include <string>

#include "host/bank_conflicts.h"
#include "host/race_check.h"
#include "host/scheduler.h"

namespace bertfast {
namespace host {
namespace shared_memory {
namespace {

alignas(128) unsigned char memory[kMaxBytes];
int memory_bytes = 0;

}  // namespace

void begin_block(int bytes) {
  memory_bytes = bytes;
  std::memset(memory, 0xff, size_t(bytes));
  race_check::begin_block(bytes);
}

void end_block() {
  banks::close_block();
}

void abandon_block() {
  banks::discard();
}

void* access(int start, int index, int size, bool writes, Site site) {
  long long byte = start + (long long)index * size;
  if (byte < 0 || byte + size > memory_bytes) {
    throw std::runtime_error(
        std::string(writes ? "store" : "load") + " outside shared memory at " + to_string(site) +
        ": element " + std::to_string(index) + " of " + std::to_string(size) +
        " bytes, from byte " + std::to_string(start) + " on, is at byte " + std::to_string(byte) +
        " of " + std::to_string(memory_bytes) + ", in " + thread_name(current_thread()));
  }
  race_check::access(int(byte), size, writes, site);
  banks::access(int(byte), size, writes, site);
  return memory + byte;
}

void check_alignment(int start, int alignment, Site site) {
  if (start % alignment != 0) {
    throw std::runtime_error("misaligned view of shared memory at " + to_string(site) +
                             ": elements of " + std::to_string(alignment) +
                             " bytes can't start at byte " + std::to_string(start));
  }
}

}  // namespace shared_memory
}  // namespace host
}  // namespace bertfast
