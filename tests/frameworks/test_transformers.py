"""A GPT-2 of transformers with its default attention: exact products with no change by the user."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sassha_fused import Sassha
from tests.support.kinds import assert_states_close
from tests.support.problems import ALL_STYLES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def transformers() -> Any:
    """Not imported before it is needed: that takes seconds."""
    return pytest.importorskip(
        "transformers", reason="transformers is not installed (requirements-dev.txt, frameworks)"
    )


def trained(transformers: Any, attention: dict[str, str], style: str) -> tuple[list[Any], Sassha]:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=31, n_positions=12, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = transformers.GPT2LMHeadModel._from_config(config, **attention).double()
    tokens = torch.randint(0, 31, (2, 12))
    opt = Sassha(model.named_parameters(), lr=0.01, hessian_interval=2, backend="cpu")

    def loss() -> Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    for _ in range(3):
        ALL_STYLES[style](opt, loss)
    return [*model.parameters()], opt


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("style", ["closure", "standard", "hessian_pass"])
def test_default_attention_takes_exact_products(transformers: Any, style: str) -> None:
    # transformers sums the loss in float32, whatever the model's dtype.
    assert_states_close(
        *trained(transformers, {}, style), *trained(transformers, {"attn_implementation": "eager"}, "closure"), 1e-4
    )
