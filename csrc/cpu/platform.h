// What depends on the compiler and the processor: run-time dispatch over instruction sets and streaming stores.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

// One copy of the function per instruction set, chosen when the library loads. Sanitizers intercept the resolvers'
// calls.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define SASSHA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
// The same where the copies are written by hand: one function per instruction set, all of one name.
#define SASSHA_VERSION(instruction_set) __attribute__((target(instruction_set)))
#else
#define SASSHA_CLONES
#endif

namespace sassha::cpu {

// Copies around the cache where the processor can: a plain store to memory not read before costs a read as well.
inline void copy_streaming(void* destination, const void* source, int64_t bytes) {
#if defined(__SSE2__)
  char* to = static_cast<char*>(destination);
  const char* from = static_cast<const char*>(source);
  const int64_t misaligned = reinterpret_cast<uintptr_t>(to) % 16;
  const int64_t head = misaligned == 0 ? 0 : (16 - misaligned < bytes ? 16 - misaligned : bytes);
  std::memcpy(to, from, head);
  int64_t i = head;
  for (; i + 16 <= bytes; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
  std::memcpy(to + i, from + i, bytes - i);
#else
  std::memcpy(destination, source, bytes);
#endif
}

// Makes streamed stores visible to the threads that run after the parallel region.
inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace sassha::cpu
