#include "host/shared_memory.h"

#include <stdexcept>
#include <string>

#include "host/async_copy.h"
#include "host/bank_conflicts.h"
#include "host/bulk_copy.h"
#include "host/clocks.h"
#include "host/mbarrier.h"
#include "host/named_barrier.h"
#include "host/proxy.h"
#include "host/race_check.h"
#include "host/registers.h"
#include "host/scheduler.h"
#include "host/wgmma.h"

namespace bertfast {
namespace host {
namespace shared_memory {

namespace {

alignas(1024) unsigned char memory[kMaxBytes];
int memory_bytes = 0;

// Where an element is. Throws if that is outside, or if a copy to it is under way.
int find(int start, int index, int size, const char* access, Site site) {
  long long byte = start + (long long)index * size;
  if (byte < 0 || byte + size > memory_bytes) {
    throw std::runtime_error(std::string(access) + " outside shared memory at " + to_string(site) +
                             ": element " + std::to_string(index) + " of " + std::to_string(size) +
                             " bytes, from byte " + std::to_string(start) + " on, is at byte " +
                             std::to_string(byte) + " of " + std::to_string(memory_bytes) +
                             ", in " + thread_name(current_thread()));
  }
  async_copy::check_landed(int(byte), size, access, site);
  bulk_copy::check_landed(int(byte), size, access, site);
  mbarrier::check_apart(int(byte), size, access, site);
  return int(byte);
}

}  // namespace

void begin_block(int bytes) {
  memory_bytes = bytes;
  std::memset(memory, 0xff, size_t(bytes));
  clocks::begin_block();
  race_check::begin_block(bytes);
  async_copy::begin_block(bytes);
  mbarrier::begin_block();
  named_barrier::begin_block();
  proxy::begin_block();
  registers::begin_block();
  wgmma::begin_block();
}

void end_block() {
  banks::close_block();
  async_copy::end_block();
  wgmma::end_block();
  bulk_copy::end_block();
  mbarrier::end_block();
  named_barrier::end_block();
}

void abandon_block() {
  banks::discard();
  async_copy::abandon_block();
  bulk_copy::abandon_block();
}

unsigned char* raw() {
  return memory;
}

void check_range(int byte, int size, const char* access, Site site) {
  if (byte >= 0 && byte + size <= memory_bytes) return;
  throw std::runtime_error(std::string(access) + " outside shared memory at " + to_string(site) +
                           ": bytes " + std::to_string(byte) + " to " +
                           std::to_string(byte + size - 1) + " of " + std::to_string(memory_bytes) +
                           ", in " + thread_name(current_thread()));
}

void* access(int start, int index, int size, bool writes, Site site) {
  int byte = find(start, index, size, writes ? "store" : "load", site);
  race_check::access(byte, size, writes, site);
  banks::access(byte, size, writes, site);
  return memory + byte;
}

int begin_copy(int start, int index, int size, Site site) {
  int byte = find(start, index, size, "cp_async", site);
  race_check::access(byte, size, true, site);
  banks::access(byte, size, true, site);
  return byte;
}

void* write_landed(int byte, int size, Site site) {
  race_check::access(byte, size, true, site);
  return memory + byte;
}

int matrix_row(int start, int index, bool writes, Site site) {
  const int byte = find(start, index, 16, writes ? "stmatrix" : "ldmatrix", site);
  banks::access(byte, 16, writes, site);
  return byte;
}

void read_word(int byte, Site site) {
  race_check::access(byte, 4, false, site);
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
