#include "host/clocks.h"

#include <algorithm>
#include <limits>

#include "host/scheduler.h"

namespace bertfast {
namespace host {
namespace clocks {

uint64_t now = 0;
uint64_t block_start = 0;
uint64_t block_ordered = 0;
bool has_table = false;

namespace {

struct Engine {
  std::string name;
  std::string hint;
};

uint64_t warp_ordered[32];
std::vector<Engine> engines;
std::vector<Knowledge> table;  // by thread

int threads() {
  return int(blockDim.x * blockDim.y * blockDim.z);
}

void merge(std::vector<uint64_t>* into, const std::vector<uint64_t>& from) {
  if (into->size() < from.size()) into->resize(from.size());
  std::transform(from.begin(), from.end(), into->begin(), into->begin(),
                 [](uint64_t a, uint64_t b) { return std::max(a, b); });
}

uint64_t at(const std::vector<uint64_t>& times, int i) {
  return size_t(i) < times.size() ? times[size_t(i)] : 0;
}

}  // namespace

void begin_block() {
  block_start = block_ordered = ++now;
  has_table = false;
  engines.clear();
}

void use_table() {
  if (has_table) return;
  has_table = true;
  table.assign(size_t(threads()), {});
}

int new_engine(const std::string& name, const std::string& hint) {
  use_table();
  engines.push_back({name, hint});
  return kEngines + int(engines.size()) - 1;
}

std::string name_of(int agent) {
  return agent < kEngines ? thread_name(agent) : engines[size_t(agent - kEngines)].name;
}

const std::string& hint_of(int engine) {
  return engines[size_t(engine - kEngines)].hint;
}

void order_block() {
  block_ordered = ++now;
  if (!has_table) return;
  // What any thread knew of the engines all know now; of threads block_ordered says it.
  std::vector<uint64_t> all;
  for (const Knowledge& known : table) merge(&all, known.engines);
  for (Knowledge& known : table) known.engines = all;
}

void order_warp(int warp) {
  warp_ordered[warp] = ++now;
  if (!has_table) return;
  const int first = warp * warpSize, end = std::min(first + warpSize, threads());
  Knowledge all;
  for (int i = first; i < end; ++i) merge(&all, table[size_t(i)]);
  for (int i = first; i < end; ++i) table[size_t(i)] = all;
}

uint64_t known_until(int thread, int agent) {
  if (agent >= kEngines) {
    return has_table ? at(table[size_t(thread)].engines, agent - kEngines) : 0;
  }
  if (agent == thread) return std::numeric_limits<uint64_t>::max();
  const uint64_t in_table = has_table ? at(table[size_t(thread)].threads, agent) : 0;
  const bool same_warp = agent / warpSize == thread / warpSize;
  return std::max({in_table, block_ordered, same_warp ? warp_ordered[thread / warpSize] : 0});
}

void release(Knowledge* into) {
  use_table();
  const int me = current_thread();
  ++now;
  merge(into, table[size_t(me)]);
  into->threads.resize(size_t(threads()));
  for (int i = 0; i < threads(); ++i) {
    uint64_t& until = into->threads[size_t(i)];
    until = std::max(until, i == me ? now : known_until(me, i));
  }
}

void acquire(int thread, const Knowledge& from) {
  use_table();
  merge(&table[size_t(thread)], from);
}

void merge(Knowledge* into, const Knowledge& from) {
  merge(&into->threads, from.threads);
  merge(&into->engines, from.engines);
}

uint64_t tick() {
  return ++now;
}

void learn(Knowledge* who, int engine, uint64_t until) {
  const size_t index = size_t(engine - kEngines);
  if (who->engines.size() <= index) who->engines.resize(index + 1);
  who->engines[index] = std::max(who->engines[index], until);
}

void learn(int thread, int engine, uint64_t until) {
  learn(&table[size_t(thread)], engine, until);
}

}  // namespace clocks
}  // namespace host
}  // namespace bertfast
