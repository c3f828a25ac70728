"""hutchinson_ of every backend against its formula, element by element."""

import torch

from tests.support.backends import each_backend_with
from tests.support.cases import BUT_FLOAT16, DTYPES
from tests.support.checks import check_hutchinson
from tests.support.lists import LIST_NAMES, listed_case


@each_backend_with(specs=LIST_NAMES, dtype=DTYPES)
def test_one_sample_of_the_estimate_is_the_product_with_its_signs(backend: str, dtype: torch.dtype, specs: str) -> None:
    check_hutchinson(backend, listed_case(backend, dtype, specs), 0, 1)


@each_backend_with(few={"dtype": BUT_FLOAT16}, sample=(0, 1, 2), dtype=DTYPES)
def test_the_estimate_starts_at_zero_and_ends_as_the_mean(backend: str, dtype: torch.dtype, sample: int) -> None:
    check_hutchinson(backend, listed_case(backend, dtype, "every size"), sample, 3)
    check_hutchinson(backend, listed_case(backend, dtype, "every layout"), sample, 3)
