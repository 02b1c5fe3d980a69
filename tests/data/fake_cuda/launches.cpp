// Launches through csrc/device/cuda.cuh on the fake runtime. Prints what is wrong.
#define __CUDACC__
#include "device/cuda.cuh"

#include <cstdio>
#include <thread>

struct Params {
  int value;
};

void one(Params) {}
void two(Params) {}

int wrong = 0;

void expect(bool right, const char* what) {
  if (right) return;
  ++wrong;
  std::printf("%s\n", what);
}

cudaError_t start(void (*kernel)(Params), int shared_bytes) {
  return bertfast::launch(kernel, dim3{2}, dim3{32}, shared_bytes, nullptr, Params{1});
}

size_t limits_of(void (*kernel)(Params), int device) {
  return fake.limits[{reinterpret_cast<const void*>(kernel), device}].size();
}

int main() {
  constexpr int kMuch = 60 * 1024, kLess = 50 * 1024, kLittle = 1024;

  expect(start(one, kLittle) == cudaSuccess, "a small launch failed");
  expect(limits_of(one, 0) == 0, "a small launch set a limit");

  fake.limit_error = cudaErrorInvalidValue;
  expect(start(one, kMuch) == cudaErrorInvalidValue, "a refused limit was not returned");
  expect(fake.last == cudaSuccess, "a refused limit is left to be blamed on the next call");
  fake.limit_error = cudaSuccess;
  expect(start(two, kLittle) == cudaSuccess, "the launch after a refused limit failed");

  fake.launch_error = cudaErrorLaunchOutOfResources;
  expect(start(two, kLittle) == cudaErrorLaunchOutOfResources, "a launch's error was not returned");
  expect(fake.last == cudaSuccess, "a launch's error is left to be blamed on the next call");
  fake.launch_error = cudaSuccess;
  fake.last = cudaErrorInvalidValue;  // somebody else's
  expect(start(two, kLittle) == cudaSuccess, "another's error was blamed on a launch");
  fake.last = cudaSuccess;

  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([i] {
      current_device = i % 2;
      for (int j = 0; j < 200; ++j) start(i % 4 < 2 ? one : two, j % 2 ? kLess : kMuch);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int device = 0; device < 2; ++device) {
    expect(limits_of(one, device) == 1 && limits_of(two, device) == 1,
           "a limit is not set once for a kernel and device");
  }
  for (const auto& entry : fake.limits) {
    for (const int bytes : entry.second) {
      expect(bytes == Fake::kMost - Fake::kStatic, "a limit is not all that a block may have");
    }
  }
  expect(fake.launched.size() == 3 + 8 * 200, "launches are missing");
  return wrong;
}
