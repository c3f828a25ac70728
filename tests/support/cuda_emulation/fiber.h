// Stacks of their own for the threads of a block, and switching from one to another.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;  // redzones and unoptimised frames
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

[[noreturn]] inline void fail(const std::string& message) {
  std::fprintf(stderr, "%s\n", message.c_str());
  std::abort();
}

#if defined(__x86_64__)
// As swapcontext, but without its system call, in a fifth of the time.
struct Context {
  void* stack_pointer = nullptr;
};

__attribute__((naked, noipa)) inline void switch_context(Context* /*from: rdi*/, const Context* /*to: rsi*/) {
  asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq (%rsi), %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}

// On fresh memory, all zero: six registers to pop, then where to go, then that function's own return address.
inline void make_context(Context* context, char* stack, void (*function)()) {
  void** const top = reinterpret_cast<void**>(stack + kStackBytes) - 8;
  top[6] = reinterpret_cast<void*>(function);
  context->stack_pointer = top;
}
#else
struct Context {
  ucontext_t context{};
};

inline void switch_context(Context* from, const Context* to) { swapcontext(&from->context, &to->context); }

inline void make_context(Context* context, char* stack, void (*function)()) {
  getcontext(&context->context);
  context->context.uc_stack.ss_sp = stack;
  context->context.uc_stack.ss_size = kStackBytes;
  makecontext(&context->context, function, 0);
  // ASan's swapcontext would forget what is poisoned on a stack that it knows the size of.
  context->context.uc_stack.ss_size = 0;
}
#endif

// A stack that threads, one after the other, run on; or the stack of who launches.
struct Fiber {
  Context context;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // ASan's
};

}  // namespace emulation
