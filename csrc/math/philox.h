// Rademacher signs from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// Key = seed (low, high); counter = (block low, block high, evaluation, sample). One call gives the signs of the 128
// elements of one block: element i has block i / 128 and bit i % 32 of word (i % 128) / 32; a set bit is +1.
#pragma once

#include <cstdint>

#include "math/portable.h"

namespace sassha {

constexpr int64_t kSignsPerBlock = 128;

struct SignBlock {
  uint32_t word[4];
};

struct SignStream {
  uint64_t seed;
  uint32_t evaluation;
  uint32_t sample;
};

SASSHA_HOST_DEVICE SignBlock philox4x32_10(SignBlock counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

SASSHA_HOST_DEVICE SignBlock sign_block(const SignStream& stream, int64_t block) {
  const uint64_t index = static_cast<uint64_t>(block);
  const SignBlock counter{{
      static_cast<uint32_t>(index),
      static_cast<uint32_t>(index >> 32),
      stream.evaluation,
      stream.sample,
  }};
  return philox4x32_10(counter, static_cast<uint32_t>(stream.seed), static_cast<uint32_t>(stream.seed >> 32));
}

// The sign that a bit of a word stands for.
template <class T>
SASSHA_HOST_DEVICE T sign_of(uint32_t word, int bit) {
  return (word >> bit) & 1u ? T(1) : T(-1);
}

}  // namespace sassha
