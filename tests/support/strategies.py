"""Any tensors, for hypothesis."""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from tests.support.cases import DTYPES, LAYOUTS, Spec

_shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)

# The arguments of make_case.
ANY_CASE: dict[str, Any] = {
    "dtype": st.sampled_from(DTYPES),
    "specs": st.lists(st.builds(Spec, _shapes, st.sampled_from(LAYOUTS), st.integers(0, 31)), min_size=1, max_size=6),
    "others": st.sampled_from(["same", *LAYOUTS]),
    "seed": st.integers(0, 2**32),
}

# For backends whose examples take long.
few_examples = settings(max_examples=10)
