#include "host/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define BERTFAST_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define BERTFAST_ASAN
#endif
#endif
#ifdef BERTFAST_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef BERTFAST_UCONTEXT
// Saves the registers that a callee must preserve on the current stack, stores the stack pointer to
// *from, and takes up the stack `to`, which was left in the same way. The floating-point control
// words are not switched: kernels don't change them.
extern "C" void bertfast_switch_stacks(void** from, void* to);
#endif

#if defined(BERTFAST_UCONTEXT)
#elif defined(__x86_64__)
asm(R"(
.text
.globl bertfast_switch_stacks
.hidden bertfast_switch_stacks
.type bertfast_switch_stacks, @function
bertfast_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx  # not ret: the processor would predict a return to this fiber's own caller
.size bertfast_switch_stacks, .-bertfast_switch_stacks
)");
constexpr int kSavedWords = 8;  // six registers, where to go on, and a return address of zero
constexpr int kResumeWord = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.globl bertfast_switch_stacks
.hidden bertfast_switch_stacks
.type bertfast_switch_stacks, %function
bertfast_switch_stacks:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  br x30
.size bertfast_switch_stacks, .-bertfast_switch_stacks
)");
constexpr int kSavedWords = 20;
constexpr int kResumeWord = 11;  // x30
#endif

namespace bertfast {
namespace host {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr int kColours = 32;
constexpr size_t kColourBytes = 128;

// The ends of the switch in progress: who left, and who a fresh stack belongs to.
Fiber* leaving;
Fiber* entering;

}  // namespace

Fiber::Fiber() = default;

Fiber::Fiber(void (*entry)(), int colour) : entry_(entry) {
  size_t page = size_t(sysconf(_SC_PAGESIZE));
  mapping_size_ = page + kStackBytes;
  mapping_ =
      mmap(nullptr, mapping_size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  // Stacks grow down, so running off the end hits the guard page and not a neighbour.
  if (mapping_ == MAP_FAILED || mprotect(mapping_, page, PROT_NONE) != 0) throw std::bad_alloc();
  stack_bottom_ = static_cast<char*>(mapping_) + page;
  stack_size_ = kStackBytes - size_t(colour % kColours) * kColourBytes;
  char* top = static_cast<char*>(mapping_) + page + stack_size_;

#ifdef BERTFAST_UCONTEXT
  (void)top;
  getcontext(&context_);
  context_.uc_stack.ss_sp = static_cast<char*>(mapping_) + page;
  context_.uc_stack.ss_size = stack_size_;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::start, 0);
#else
  // As if start() had just been called and had switched away before its first instruction. The
  // mapping is all zeros, and so are the saved registers.
  void** saved = reinterpret_cast<void**>(top) - kSavedWords;
  saved[kResumeWord] = reinterpret_cast<void*>(&Fiber::start);
  stack_pointer_ = saved;
#endif
}

Fiber::~Fiber() {
  if (mapping_) munmap(mapping_, mapping_size_);
}

void Fiber::switch_stacks(Fiber& from, Fiber& to) {
  leaving = &from;
  entering = &to;
#ifdef BERTFAST_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack_, to.stack_bottom_, to.stack_size_);
#endif
#ifdef BERTFAST_UCONTEXT
  swapcontext(&from.context_, &to.context_);
#else
  bertfast_switch_stacks(&from.stack_pointer_, to.stack_pointer_);
#endif
  arrive(from);
}

void Fiber::start() {
  Fiber& self = *entering;
  arrive(self);
  self.entry_();
  __builtin_trap();
}

void Fiber::arrive(Fiber& self) {
#ifdef BERTFAST_ASAN
  // Also how the bounds of the OS thread's own stack become known.
  __sanitizer_finish_switch_fiber(self.fake_stack_, &leaving->stack_bottom_, &leaving->stack_size_);
#else
  (void)self;
#endif
}

}  // namespace host
}  // namespace bertfast
