// What Python sets in the emulated device; compiled into the same library as the emulated sources.
#include "cuda_on_cpu.h"

#define SASSHA_EXPORT extern "C" __attribute__((visibility("default")))

// From here on kernels are not run but reported; nullptr has them run again.
SASSHA_EXPORT void sassha_emulation_intercept(emulation::Intercept callback) {
  emulation::device().intercept = callback;
}

SASSHA_EXPORT void sassha_emulation_device(int multiprocessors, int blocks_per_multiprocessor) {
  emulation::device().multiprocessors = multiprocessors;
  emulation::device().blocks_per_multiprocessor = blocks_per_multiprocessor;
}

// Runs the first and the last blocks of each launch only; all of them after (0, 0).
SASSHA_EXPORT void sassha_emulation_only_blocks(int head, int tail) {
  emulation::device().first_blocks_only = head;
  emulation::device().last_blocks_only = tail;
}

// From here on every launch fails, or none.
SASSHA_EXPORT void sassha_emulation_refuse(bool refuse) { emulation::device().refuses = refuse; }
