// The chunk table: where the tensors of a launch lie, carried in the kernel's arguments.
//
// The tensors of a table stand in a row, each from a multiple of 128 elements on (a unit), as they do in the flat
// buffers: one count of units places an element both among the tensors and in every buffer.
#pragma once

#include <stdexcept>

#include "cuda/launchers.h"
#include "cuda/platform.h"

namespace sassha::cuda {

constexpr int kUnit = 128;

// CUDA's limit on the arguments of a kernel, and what a table leaves of it to the other arguments.
constexpr int kArgumentBytes = 32764;
constexpr int kOtherBytes = 256;

// Two lists of 1,300 tensors, or one of 2,500. kMore: bytes per tensor in arrays of the derived table.
template <int kLists, int kMore = 0>
struct Table {
  static constexpr int kListCount = kLists;
  static constexpr int kCapacity = (kArgumentBytes - kOtherBytes) / (kLists * 8 + 4 + 1 + kMore);

  int count;
  void* data[kLists][kCapacity];       // null where a gap of the flat buffers stands in for a tensor
  uint32_t first_unit[kCapacity + 1];  // behind the last one: the number of units
  uint8_t missing[kCapacity];          // how many elements the last unit falls short of 128

  template <class E>
  __device__ E* tensor(int list, int entry) const {
    return static_cast<E*>(data[list][entry]);
  }

  __device__ int64_t numel(int entry) const {
    return int64_t{first_unit[entry + 1] - first_unit[entry]} * kUnit - missing[entry];
  }

  // The entry that a unit belongs to, known to be this one or a later one.
  __device__ int entry_of(uint32_t unit, int entry) const {
    if (unit < first_unit[entry + 1]) return entry;
    int last = count - 1;
    while (entry < last) {
      const int middle = entry + (last - entry + 1) / 2;
      if (first_unit[middle] <= unit) {
        entry = middle;
      } else {
        last = middle - 1;
      }
    }
    return entry;
  }
};

// A table whose tensors have a row each: of their counts, and of what each has of its own.
template <int kLists>
struct RowTable : Table<kLists, sizeof(int32_t)> {
  int32_t row[Table<kLists, sizeof(int32_t)>::kCapacity];  // -1 for a gap

  void set_row(int entry, int64_t tensor, const std::vector<int64_t>& rows) {
    row[entry] = tensor < 0 ? -1 : static_cast<int32_t>(rows[tensor]);
  }
};

// Host side: fills tables with tensors and hands each full one on.
//
// describe(table, entry, tensor): fills in pointers and more; tensor is -1 for a gap, whose pointers are null already.
// launch(table, origin): origin is the element of the flat buffers at which the table's first unit lies. Without any
// tensor there is one launch all the same, of an empty table.
template <class AnyTable, class Describe, class Launch>
void for_each_table(const std::vector<int64_t>& numel, const std::vector<int64_t>* offsets, const Describe& describe,
                    const Launch& launch) {
  constexpr int64_t kMostUnits = int64_t{1} << 31;
  // Before the first launch: what is refused leaves nothing behind.
  for (const int64_t length : numel) {
    if (length / kUnit >= kMostUnits) throw std::runtime_error("a tensor has 2^38 elements or more");
  }
  if (offsets) {
    for (const int64_t offset : *offsets) {
      if (offset % kUnit != 0) throw std::runtime_error("offsets of the state must be multiples of 128 elements");
    }
  }
  AnyTable table;
  table.count = 0;
  table.first_unit[0] = 0;
  int64_t units = 0, origin = 0;
  const auto flush = [&] {
    launch(table, origin);
    table.count = 0;
    units = 0;
  };
  const auto append = [&](int64_t tensor, int64_t more, int missing) {
    const int entry = table.count++;
    table.first_unit[entry] = static_cast<uint32_t>(units);
    units += more;
    table.first_unit[entry + 1] = static_cast<uint32_t>(units);
    table.missing[entry] = static_cast<uint8_t>(missing);
    if (tensor < 0) {
      for (auto& list : table.data) list[entry] = nullptr;
    }
    describe(table, entry, tensor);
  };
  for (int64_t i = 0; i < static_cast<int64_t>(numel.size()); ++i) {
    const int64_t more = (numel[i] + kUnit - 1) / kUnit;
    const int missing = static_cast<int>(more * kUnit - numel[i]);
    int64_t gap = offsets ? ((*offsets)[i] - origin) / kUnit - units : 0;
    const bool full = table.count + (gap > 0 ? 2 : 1) > AnyTable::kCapacity || units + gap + more >= kMostUnits;
    if (table.count > 0 && (full || gap < 0)) flush();
    if (table.count == 0) {
      origin = offsets ? (*offsets)[i] : 0;
      gap = 0;
    }
    if (gap > 0) append(-1, gap, 0);
    append(i, more, missing);
  }
  flush();
}

}  // namespace sassha::cuda
