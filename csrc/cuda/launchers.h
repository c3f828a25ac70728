// The CUDA half's own interface, free of torch and of CUDA headers: torch.cpp calls it, the .cu files implement it.
//
// Every function enqueues work on a stream and returns without waiting. Scratch memory comes from the caller.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "math/sassha.h"

namespace sassha::cuda {

enum class Dtype { kDouble, kFloat, kBFloat16, kHalf };

// A list of tensors, each dense and all of one dtype.
struct Tensors {
  Dtype dtype;
  std::vector<void*> data;
};

// A one-element tensor.
struct Scalar {
  const void* data;
  Dtype dtype;
};

// Where the work goes.
struct Target {
  const char* name;  // of the operator, for error messages
  void* stream;
};

// The squares of a list, summed in part by each block of the kernels that read it.
struct PartialSums {
  double* sums = nullptr;
  int64_t count = 0;
};

// How many partial sums a pass over tensors of these lengths leaves: at most this many.
int64_t most_partial_sums(const Target& target, const std::vector<int64_t>& numel);

// Appends the sums of squares of gradients (times weights, where there are any) to partial.
void sum_squares(const Target& target, const std::vector<int64_t>& numel, const Tensors& grads, const Tensors* weights,
                 PartialSums& partial);

// norm <- the square root of the whole sum; where skipped is given, unless it holds 1.
void finish_norm(const Target& target, const PartialSums& partial, double* norm, const int64_t* skipped = nullptr);

struct Perturbation {
  std::vector<int64_t> numel;
  std::vector<int64_t> offsets;
  std::vector<int64_t> rows;
  Tensors params;
  Tensors grads;        // or, in the dtype of the state, what else eps* points along
  void* backup;         // or null
  double* norm;         // read; or, where there are partial sums, written
  PartialSums partial;  // of the gradients, or none
  const RowSettings* per_row;
  Settings settings;
};

void perturb(const Target& target, const Perturbation& arguments);

// What the random signs depend on beside an element's index.
struct Signs {
  std::vector<int64_t> indices;
  uint64_t seed;
  const int64_t* evaluation;
  uint32_t sample;
};

void rademacher(const Target& target, const std::vector<int64_t>& numel, const Tensors& signs, const Signs& stream);

struct Estimate {
  std::vector<int64_t> numel;
  std::vector<int64_t> offsets;
  Tensors products;
  void* estimate;
  Signs signs;
  bool first;
  int64_t divisor;  // the number of samples behind the last one, else 1
};

void hutchinson(const Target& target, const Estimate& arguments);

struct BlockAverage {
  std::vector<int64_t> numel;
  std::vector<int64_t> offsets;
  Tensors products;
  const void* exp_hessian;
  void* averaged;
  int64_t blocked;
  Settings settings;
};

void block_average(const Target& target, const BlockAverage& arguments);

// What update_ works out once per step: room for it is scratch_bytes(rows).
int64_t scratch_bytes(int64_t rows);

// How many sums the blocks of a launch leave: at most this many.
int64_t most_block_sums(const Target& target);

struct Update {
  std::vector<int64_t> numel;
  std::vector<int64_t> offsets;
  std::vector<int64_t> rows;
  Tensors params;
  Tensors grads;
  std::optional<Tensors> products;  // on a Hessian step
  const void* averaged;             // what exp_hessian becomes, or null
  const void* backup;               // null where the step is from params themselves
  const double* norm;               // where w is worked out from params, else null
  void* exp_avg;
  void* exp_hessian;     // null of a plain direction
  double* exp_avg_norm;  // or null
  int64_t blocked;
  int64_t* steps;  // [row_count][2]
  const RowSettings* per_row;
  int64_t row_count;
  int64_t* skipped;
  std::vector<Scalar> guards;
  bool guard_grads;
  Settings settings;
  PartialSums partial;  // room for the sums of gradients and products, one more, and most_block_sums of exp_avg
  void* scratch;
};

void update(const Target& target, const Update& arguments);

}  // namespace sassha::cuda
