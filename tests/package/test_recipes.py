"""docs/training.md: every recipe runs as it stands there, and trains."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
SLOW = ("Compiled models", "Lightning", "Hugging Face Trainer", "Accelerate")


def recipes() -> list[Any]:
    """Each block of code, under its heading."""
    found = []
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.M)[1:]:
        heading = section.splitlines()[0]
        for i, block in enumerate(re.findall(r"^```python\n(.*?)^```$", section, flags=re.M | re.S)):
            marks = [pytest.mark.slow] if heading in SLOW else []
            found.append(pytest.param(block, id=f"{heading} {i + 1}", marks=marks))
    return found


@pytest.fixture
def scene(tmp_path: Path) -> dict[str, Any]:
    """What the page says that all recipes have."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
    return {
        "model": model,
        "loader": DataLoader(TensorDataset(x.repeat(12, 1), y.repeat(12)), batch_size=64),
        "criterion": nn.CrossEntropyLoss(),
        "device": "cpu",
        "path": tmp_path / "checkpoint.pt",
    }


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("block", recipes())
def test_a_recipe_runs_as_it_stands_and_trains(block: str, scene: dict[str, Any], request: Any) -> None:
    if "DistributedDataParallel" in block:
        request.getfixturevalue("one_process")
    model, (x, y) = scene["model"], next(iter(scene["loader"]))
    before = scene["criterion"](model(x), y).item()
    exec(compile(block, str(PAGE), "exec"), scene)
    assert scene["criterion"](model(x), y).item() < before


def test_every_section_has_a_recipe_and_a_place_in_the_table() -> None:
    text = PAGE.read_text()
    headings = re.findall(r"^## (.*)$", text, flags=re.M)
    anchors = re.findall(r"\(#([^)]*)\)", text)
    assert [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings if h] == list(dict.fromkeys(anchors))
    assert all("```python" in section for section in re.split(r"^## ", text, flags=re.M)[1:])


def test_the_tests_that_the_readme_names_are_there() -> None:
    root = PAGE.parents[1]
    named = re.findall(r"`(tests/[^`]*)`", (root / "README.md").read_text())
    assert len(named) > 15
    assert [name for name in named if not (root / name).exists()] == []
