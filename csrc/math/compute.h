// The type in which the elements of a dtype are computed, and in which their state is kept.
#pragma once

namespace sassha {

template <class P>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class P>
using Compute = typename ComputeType<P>::type;

}  // namespace sassha
