// The threads of one block at a time, as fibers that take turns; barriers and warp collectives let others go on.
//
// SASSHA_EMULATION_ORDER (forward, reversed, shuffled) says in which order blocks and threads take their turns: results
// that depend on it come from a race.
#pragma once

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned width = 1, unsigned height = 1, unsigned depth = 1) : x(width), y(height), z(depth) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

// What tests set through control.cpp.
namespace emulation {

constexpr int kWarp = 32;

using Intercept = void (*)(const char* mangled_name, int blocks, int threads, const void* argument, long long bytes);

struct Device {
  int multiprocessors = 3;
  int blocks_per_multiprocessor = 2;
  Intercept intercept = nullptr;                    // is called instead of the kernel
  int first_blocks_only = 0, last_blocks_only = 0;  // both 0: every block runs
  bool refuses = false;                             // every launch
};

inline Device& device() {
  static Device device;
  return device;
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

enum class State { kReady, kAtBarrier, kInWarp, kDone };
enum class Collective { kNone, kShuffle, kShuffleDown, kShuffleXor };

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
      turn_ = 0;  // warps run as far ahead of each other as they can
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

}  // namespace emulation
