// Launches through csrc/device/cuda.cuh on the fake runtime. Prints what is wrong.
#define __CUDACC__
#include "device/cuda.cuh"
#include "device/gpu.cuh"

#include <cstdio>
#include <thread>

struct Params {
  int value;
};

void one(Params) {}
void two(Params) {}
void three(Params) {}
void old(Params) {}

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

  fake.limit_error = cudaErrorInvalidValue;
  expect(start(one, kMuch) == cudaErrorInvalidValue, "a refused limit was not returned");
  expect(fake.last == cudaSuccess, "a refused limit is left to be blamed on the next call");
  fake.limit_error = cudaSuccess;
  expect(start(one, kLittle) == cudaSuccess, "a small launch failed");
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
  expect(fake.early == 0, "a launch was early that was not to be");

  // Kernels whose code doesn't wait, as it was compiled for 8.0, and which is empty.
  fake.kernels[reinterpret_cast<const void*>(&old)] = {0, 80, 32};
  for (void (*kernel)(Params) : {one, old}) {
    bertfast::launch_early(kernel, dim3{2}, dim3{32}, kLittle, nullptr, Params{1});
  }
  expect(fake.early == 1, "of two kernels that may be launched early not the one was that waits");
  fake.driver = 12020;
  bertfast::launch_early(three, dim3{2}, dim3{32}, kLittle, nullptr, Params{1});
  expect(fake.early == 1, "a driver that can't capture it had an early launch");
  for (int i = 0; i < 2; ++i) {
    expect(bertfast::has_code(one, 384), "a kernel's code was not found");
    expect(!bertfast::has_code(old, 384), "an empty kernel was taken for one with code");
  }
  return wrong;
}
