// Fibers: stacks to switch between on one OS thread.
#pragma once

#include <cstddef>

#if !defined(BERTFAST_UCONTEXT) && \
    !(defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__)))
#define BERTFAST_UCONTEXT
#endif

#ifdef BERTFAST_UCONTEXT
#include <ucontext.h>
#endif

namespace bertfast {
namespace host {

class Fiber {
 public:
  // Stands for the stack that the caller is running on.
  Fiber();
  // A stack of its own, on which the first switch runs entry(), which must never return.
  // `colour` shifts the stack's start, so that the hot ends of many stacks don't share cache sets.
  Fiber(void (*entry)(), int colour);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Leaves `from`, which must be the running fiber, and goes on in `to`. Returns when something
  // switches back to `from`.
  static void switch_stacks(Fiber& from, Fiber& to);

 private:
  static void start();
  static void arrive(Fiber& self);

#ifdef BERTFAST_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
  void (*entry_)() = nullptr;
  void* mapping_ = nullptr;  // the guard page, then the stack
  size_t mapping_size_ = 0;
  // What AddressSanitizer has to be told at each switch.
  const void* stack_bottom_ = nullptr;
  size_t stack_size_ = 0;
  void* fake_stack_ = nullptr;
};

}  // namespace host
}  // namespace bertfast
