// The namespace of the operators: torch.ops.sassha_fused, unless a build asks for another.
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef SASSHA_NAMESPACE
#define SASSHA_NAMESPACE sassha_fused
#endif

// Expands its arguments, which torch's own macro does not.
#define SASSHA_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
