// What the first launch of update_ leaves to the second.
#pragma once

#include <cmath>

#include "cuda/launchers.h"
#include "cuda/platform.h"

namespace sassha::cuda {

// What the elements of one parameter share in this step, and its counts behind it. T: the compute type.
template <class T>
struct Prepared {
  UpdateScalars<T> scalars;
  int64_t step;
  int64_t hessian_step;
};

// Whether w is worked out from params, by this norm.
__device__ inline bool unperturbs(const double* norm) { return norm != nullptr && std::isfinite(*norm); }

// Looks at everything that must be finite, and prepares the rows of the counts.
PartialSums inspect(const Target& target, const Update& u);

}  // namespace sassha::cuda
