// CUDA sources, kernels and launchers alike, compiled by g++ and run on the CPU: for tests only, and only for what
// csrc/cuda uses.
//
// Blocks run one after the other. Every thread of a block is a fiber; barriers and warp collectives switch fibers, and
// nothing else does, so threads that meet no barrier run as a plain loop. SASSHA_EMULATION_ORDER (forward, reversed,
// shuffled) says in which order blocks and threads take their turns: results that depend on it come from a race.
#pragma once

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__ __attribute__((visibility("default")))
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__  // libstdc++ uses the name inside attributes
#define __launch_bounds__(...)
#define __grid_constant__
// The tag becomes part of the symbol's name, by which emulation::shared_memory finds the variable.
#define __shared__ static __attribute__((abi_tag("cuda_shared")))

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned width = 1, unsigned height = 1, unsigned depth = 1) : x(width), y(height), z(depth) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

struct alignas(2) __half {
  uint16_t bits;
};
struct alignas(2) __nv_bfloat16 {
  uint16_t bits;
};

inline float __half2float(__half x) { return torch::headeronly::Half(x.bits, torch::headeronly::Half::from_bits()); }
inline float __bfloat162float(__nv_bfloat16 x) {
  return torch::headeronly::BFloat16(x.bits, torch::headeronly::BFloat16::from_bits());
}
// CUDA has one NaN for all.
inline __half __float2half_rn(float x) { return {x != x ? uint16_t{0x7FFF} : torch::headeronly::Half(x).x}; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  return {x != x ? uint16_t{0x7FFF} : torch::headeronly::BFloat16(x).x};
}

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31));
}

// One access of the full width, which -fsanitize=alignment checks.
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}

enum cudaError { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaError_t = cudaError;
using cudaStream_t = struct CUstream_st*;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

namespace emulation {

constexpr int kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxBlocks = 0x7FFFFFFF;
constexpr size_t kMaxArgumentBytes = 32764;
constexpr size_t kMaxSharedBytes = 48 << 10;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;  // redzones and unoptimised frames
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

using Intercept = void (*)(const char* mangled_name, int blocks, int threads, const void* argument, long long bytes);

// What tests set through control.cpp.
struct Device {
  int multiprocessors = 3;
  int blocks_per_multiprocessor = 2;
  Intercept intercept = nullptr;                    // is called instead of the kernel
  int first_blocks_only = 0, last_blocks_only = 0;  // both 0: every block runs
};

inline Device& device() {
  static Device device;
  return device;
}

inline cudaError_t& last_error() {
  static thread_local cudaError_t error = cudaSuccess;
  return error;
}

inline cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error() = error;
  return error;
}

[[noreturn]] inline void fail(const std::string& message) {
  std::fprintf(stderr, "%s\n", message.c_str());
  std::abort();
}

inline std::string kernel_name(const void* kernel) {
  Dl_info info;
  const bool found = dladdr(kernel, &info) != 0 && info.dli_saddr == kernel;
  return found ? info.dli_sname : "unnamed kernel";
}

struct Memory {
  void* start;
  size_t bytes;
};

// The __shared__ variables of all templates and inline functions in the library that the kernel is part of.
inline std::vector<Memory> shared_memory(const void* kernel) {
  std::vector<Memory> found;
  Dl_info info;
  link_map* library = nullptr;
  if (dladdr1(kernel, &info, reinterpret_cast<void**>(&library), RTLD_DL_LINKMAP) == 0) return found;
  const ElfW(Sym)* symbol = nullptr;
  const char* names = nullptr;
  size_t names_bytes = 0;
  for (const ElfW(Dyn)* entry = library->l_ld; entry->d_tag != DT_NULL; ++entry) {
    if (entry->d_tag == DT_SYMTAB) symbol = reinterpret_cast<const ElfW(Sym)*>(entry->d_un.d_ptr);
    if (entry->d_tag == DT_STRTAB) names = reinterpret_cast<const char*>(entry->d_un.d_ptr);
    if (entry->d_tag == DT_STRSZ) names_bytes = entry->d_un.d_val;
  }
  // The table has no length: linkers put the names right behind it.
  for (; reinterpret_cast<const char*>(symbol + 1) <= names; ++symbol) {
    const bool variable = ELF64_ST_TYPE(symbol->st_info) == STT_OBJECT && symbol->st_shndx != SHN_UNDEF;
    if (!variable || symbol->st_name >= names_bytes) continue;
    if (std::strstr(names + symbol->st_name, "B11cuda_shared") == nullptr) continue;
    found.push_back({reinterpret_cast<void*>(library->l_addr + symbol->st_value), symbol->st_size});
  }
  return found;
}

// 0 .. count in the order of turns that the environment asks for.
inline std::vector<int>& arrange(std::vector<int>& turns, size_t count, std::mt19937& random) {
  static const char* const variable = std::getenv("SASSHA_EMULATION_ORDER");
  static const std::string order = variable != nullptr && *variable != '\0' ? variable : "forward";
  turns.resize(count);
  std::iota(turns.begin(), turns.end(), 0);
  if (order == "reversed") {
    std::reverse(turns.begin(), turns.end());
  } else if (order == "shuffled") {
    std::shuffle(turns.begin(), turns.end(), random);
  } else if (order != "forward") {
    fail("SASSHA_EMULATION_ORDER must be forward, reversed or shuffled, is " + order);
  }
  return turns;
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

enum class State { kReady, kAtBarrier, kInWarp, kDone };
enum class Collective { kNone, kSynchronize, kShuffle, kShuffleDown, kShuffleXor };

struct Thread {
  Fiber* fiber = nullptr;  // none before the first turn
  State state = State::kReady;
  Collective collective = Collective::kNone;
  uint32_t mask = 0;
  int source = 0;
  uint64_t given = 0;
  uint64_t received = 0;
};

class Scheduler {
 public:
  using Call = void (*)(const void* kernel, const void* argument);

  void launch(Call call, const void* kernel, const void* argument, unsigned blocks, unsigned threads) {
    const std::lock_guard<std::mutex> one_at_a_time(mutex_);
    call_ = call;
    kernel_ = kernel;
    argument_ = argument;
    gridDim = blocks;
    blockDim = threads;
    random_.seed(0);
    if (shared_.count(kernel) == 0) shared_[kernel] = shared_memory(kernel);
    const unsigned first = device().first_blocks_only, last = device().last_blocks_only;
    const unsigned count = first + last == 0 ? blocks : std::min(blocks, first + last);
    std::vector<int> turns;
    for (const unsigned turn : arrange(turns, count, random_)) {
      blockIdx.x = turn < first ? turn : blocks - count + turn;
      run_block();
    }
  }

  void barrier() {
    leave_ready(State::kAtBarrier);
    if (++at_barrier_ == threads_.size()) {
      at_barrier_ = 0;
      for (Thread& thread : threads_) make_ready(thread);
      turn_ = turns_.size();
    }
    dispatch(threads_[current_].fiber);
  }

  // Waits until the lanes in mask have come to the same collective; then each receives what its source gave.
  uint64_t meet(Collective collective, uint32_t mask, uint64_t given, int source) {
    Thread& self = threads_[current_];
    self.collective = collective;
    self.mask = mask;
    self.source = source;
    self.given = given;
    leave_ready(State::kInWarp);
    Thread* const warp = &threads_[current_ / kWarp * kWarp];
    const int lanes = std::min<int>(kWarp, static_cast<int>(&threads_.back() - warp) + 1);
    uint32_t met = 0;
    for (int lane = 0; lane < lanes; ++lane) {
      const Thread& other = warp[lane];
      const bool meets = other.state == State::kInWarp && other.collective == collective && other.mask == mask;
      met |= uint32_t{meets} << lane;
    }
    if (met == (mask & (~uint32_t{0} >> (kWarp - lanes)))) {
      for (int lane = 0; lane < lanes; ++lane) {
        if ((met >> lane & 1) == 0) continue;
        // A lane that takes no part gives anything: ones, not a number in floating point.
        warp[lane].received = met >> warp[lane].source & 1 ? warp[warp[lane].source].given : ~uint64_t{0};
        make_ready(warp[lane]);
      }
    }
    dispatch(self.fiber);
    return self.received;
  }

 private:
  void run_block() {
    for (const Memory& memory : shared_[kernel_]) std::memset(memory.start, 0xFF, memory.bytes);
    threads_.assign(blockDim.x, Thread{});
    ready_ = threads_.size();
    done_ = at_barrier_ = 0;
    turn_ = turns_.size();
    dispatch(&host_);
  }

  void leave_ready(State state) {
    threads_[current_].state = state;
    --ready_;
  }

  void make_ready(Thread& thread) {
    thread.state = State::kReady;
    ++ready_;
  }

  // Hands over to the thread whose turn is next, or to the host at the end of the block. Returns when self goes on.
  void dispatch(Fiber* self) {
    Fiber* next = &host_;
    if (ready_ > 0) {
      next_turn();
      Thread& thread = threads_[current_];
      if (thread.fiber == nullptr) thread.fiber = idle_fiber();
      next = thread.fiber;
    } else if (done_ < threads_.size()) {
      fail("divergent barrier in " + kernel_name(kernel_) + ": block " + std::to_string(blockIdx.x) + ", " +
           std::to_string(done_) + " threads have returned, " + std::to_string(at_barrier_) + " wait for the block, " +
           std::to_string(threads_.size() - done_ - at_barrier_) + " for their warp");
    }
    if (next != self) switch_fibers(self, next);
  }

  void next_turn() {
    do {
      if (turn_ == turns_.size()) {
        arrange(turns_, threads_.size(), random_);
        turn_ = 0;
      }
      current_ = turns_[turn_++];
    } while (threads_[current_].state != State::kReady);
    threadIdx.x = static_cast<unsigned>(current_);
  }

  // The fiber whose thread returned last comes first: without barriers one fiber runs all threads.
  Fiber* idle_fiber() {
    if (idle_.empty()) return new_fiber();
    Fiber* const fiber = idle_.back();
    idle_.pop_back();
    return fiber;
  }

  Fiber* new_fiber() {
    const size_t guard = sysconf(_SC_PAGESIZE);
    void* const memory = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) fail("no memory for a thread's stack");
    fibers_.push_back(std::make_unique<Fiber>());
    Fiber* const fiber = fibers_.back().get();
    char* const stack = static_cast<char*>(memory) + guard;
    fiber->stack = stack;
    fiber->stack_bytes = kStackBytes;
    make_context(&fiber->context, stack, run_threads);
    return fiber;
  }

  static void run_threads();

  void switch_fibers(Fiber* from, Fiber* to) {
    previous_ = from;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from->fake_stack, to->stack, to->stack_bytes);
#endif
    switch_context(&from->context, &to->context);
    finish_switch(from->fake_stack);
  }

  void finish_switch(void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
    const void* stack = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(fake_stack, &stack, &bytes);
    if (previous_ == &host_) {
      host_.stack = stack;
      host_.stack_bytes = bytes;
    }
#else
    (void)fake_stack;
#endif
  }

  std::mutex mutex_;
  Call call_ = nullptr;
  const void* kernel_ = nullptr;
  const void* argument_ = nullptr;
  std::mt19937 random_;
  std::map<const void*, std::vector<Memory>> shared_;  // of each kernel's library

  std::vector<Thread> threads_;  // of the block that runs
  std::vector<int> turns_;       // of the threads in this round
  size_t turn_ = 0;
  size_t current_ = 0;
  size_t ready_ = 0, at_barrier_ = 0, done_ = 0;

  Fiber host_;
  Fiber* previous_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
};

inline Scheduler& scheduler() {
  static Scheduler scheduler;
  return scheduler;
}

inline void Scheduler::run_threads() {
  Scheduler& scheduler = emulation::scheduler();
  scheduler.finish_switch(nullptr);
  for (;;) {
    scheduler.call_(scheduler.kernel_, scheduler.argument_);
    Fiber* const fiber = scheduler.threads_[scheduler.current_].fiber;
    scheduler.leave_ready(State::kDone);
    ++scheduler.done_;
    scheduler.idle_.push_back(fiber);
    scheduler.dispatch(fiber);
  }
}

template <class T>
T shuffle(Collective collective, uint32_t mask, T value, int source) {
  static_assert((sizeof(T) == 4 || sizeof(T) == 8) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = scheduler().meet(collective, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int lane() { return static_cast<int>(threadIdx.x % kWarp); }

template <class Arguments>
void call(const void* kernel, const void* argument) {
  reinterpret_cast<void (*)(Arguments)>(const_cast<void*>(kernel))(*static_cast<const Arguments*>(argument));
}

}  // namespace emulation

inline void __syncthreads() { emulation::scheduler().barrier(); }

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  emulation::scheduler().meet(emulation::Collective::kSynchronize, mask, 0, emulation::lane());
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulation::shuffle(emulation::Collective::kShuffle, mask, value, source & (emulation::kWarp - 1));
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const int lane = emulation::lane();
  const int source = delta < static_cast<unsigned>(emulation::kWarp - lane) ? lane + static_cast<int>(delta) : lane;
  return emulation::shuffle(emulation::Collective::kShuffleDown, mask, value, source);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  const int source = (emulation::lane() ^ lane_mask) & (emulation::kWarp - 1);
  return emulation::shuffle(emulation::Collective::kShuffleXor, mask, value, source);
}

inline cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error(), cudaSuccess); }

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
  }
  return "unrecognized error code";
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMultiProcessorCount) return emulation::result(cudaErrorInvalidValue);
  *value = emulation::device().multiprocessors;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = emulation::device().blocks_per_multiprocessor;
  return cudaSuccess;
}

template <class Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments), dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t) {
  static_assert(std::is_trivially_copyable_v<Arguments>, "kernel arguments are copied byte by byte");
  const bool one_dimensional = grid.y == 1 && grid.z == 1 && block.y == 1 && block.z == 1;  // all that is emulated
  if (!one_dimensional || grid.x == 0 || grid.x > emulation::kMaxBlocks || block.x == 0 ||
      block.x > emulation::kMaxThreads) {
    return emulation::result(cudaErrorInvalidConfiguration);
  }
  if (sizeof(Arguments) > emulation::kMaxArgumentBytes || shared_bytes > emulation::kMaxSharedBytes) {
    return emulation::result(cudaErrorInvalidValue);
  }
  const void* const address = reinterpret_cast<const void*>(kernel);
  if (const emulation::Intercept intercept = emulation::device().intercept) {
    intercept(emulation::kernel_name(address).c_str(), static_cast<int>(grid.x), static_cast<int>(block.x),
              arguments[0], sizeof(Arguments));
  } else {
    emulation::scheduler().launch(emulation::call<Arguments>, address, arguments[0], grid.x, block.x);
  }
  return cudaSuccess;
}
