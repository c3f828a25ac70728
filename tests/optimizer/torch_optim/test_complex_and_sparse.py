"""Complex and sparse, which torch's optimizers take and the method has no meaning for: a clear error, and no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.backends import device_of, each_quick_backend
from tests.support.generic import make, regression, states_of
from tests.support.members import each_member
from tests.support.problems import assert_same, single_threaded, weights

one_thread = pytest.fixture(autouse=True)(single_threaded)

REFUSED = {
    "complex": (torch.ones(2, dtype=torch.complex64), r"complex parameters.*torch\.complex64; use torch\.view_as_real"),
    "sparse": (torch.ones(2).to_sparse(), r"sparse parameters.*torch\.sparse_coo"),
    "float8": (torch.ones(2).to(torch.float8_e4m3fn), r"dtype must be one of.*torch\.float8_e4m3fn"),
}


@each_member
@pytest.mark.parametrize("name", REFUSED)
def test_a_parameter_of_another_kind_is_refused_at_once(member: str, name: str) -> None:
    value, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make(member, [nn.Parameter(torch.ones(2)), nn.Parameter(value)])
    opt = make(member, [nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [nn.Parameter(value)]})
    assert len(opt.param_groups) == 1


@each_quick_backend
@each_member
@pytest.mark.parametrize("steps", [0, 2])
def test_a_sparse_gradient_is_refused_and_the_step_can_be_taken_again(backend: str, member: str, steps: int) -> None:
    found = []
    for refused in (True, False):
        params, loss = regression(device=device_of(backend))
        embedding = nn.Embedding(4, 3, device=device_of(backend))
        nn.init.constant_(embedding.weight, 0.5)
        params.append(embedding.weight)

        def whole() -> Tensor:
            return loss() + embedding(torch.tensor([1, 2], device=device_of(backend))).square().sum()

        opt = make(member, params, backend=backend, **exactly_restored(member))
        for _ in range(steps):
            opt.step(whole)
        if refused:
            before = weights(params)
            embedding.sparse = True
            with pytest.raises(ValueError, match=r"gradient.*sparse.*sparse=False"):
                opt.step(whole)
            embedding.sparse = False
            assert not opt.perturbed
            assert_same(weights(params), before)
            assert all(param.grad is None for param in params)
        for _ in range(3):
            opt.step(whole)
        found.append([weights(params), states_of(opt, params)])
    assert_same(*found)


def exactly_restored(member: str) -> dict[str, Any]:
    """Where w is worked out from w', it comes back to rounding only: that is tested elsewhere."""
    return {"exact_restore": True} if "exact_restore" in make(member, [nn.Parameter(torch.ones(1))]).defaults else {}
