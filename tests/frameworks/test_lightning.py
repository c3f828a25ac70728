"""Lightning's automatic optimization as it is: a closure that runs backward without a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sassha_fused import Sassha
from tests.support.kinds import Net, assert_states_close, reference_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lightning() -> Any:
    """Not imported before it is needed: that takes seconds."""
    return pytest.importorskip("lightning", reason="lightning is not installed (requirements-dev.txt, frameworks)")


def module_of(net: Net, lightning: Any) -> Any:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.net.loss()

        def configure_optimizers(self) -> Sassha:
            self.opt = Sassha(self.parameters(), lr=0.01, hessian_interval=2, backend="cpu")
            return self.opt

    return Module()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("clip", [None, 1e9], ids=["plain", "clipped"])
def test_automatic_optimization_is_the_reference_run(lightning: Any, clip: float | None, tmp_path: Any) -> None:
    net, other = Net(), Net()
    module = module_of(net, lightning)
    trainer = lightning.Trainer(
        max_steps=5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=clip,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(range(5), batch_size=1))
    reference = reference_of(Sassha(other.parameters(), lr=0.01, hessian_interval=2))
    for _ in range(5):
        reference.step(other.loss)
    assert_states_close([*net.parameters()], module.opt, [*other.parameters()], reference, 1e-10)
