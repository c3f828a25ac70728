"""How many kernels a step launches on CUDA, at the shapes of real models: counted in place of running them."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.shapes import MODELS
from sassha_fused import SAMSGD, MSassha, SAMAdamW, Sassha, ops
from sassha_fused.curvature import exact
from sassha_fused.optimizer import FusedOptimizer
from tests.support import emulation
from tests.support.backends import marks_of
from tests.support.cases import sparse
from tests.support.emulation import BACKEND

pytestmark = marks_of(BACKEND)

Shape = tuple[int, ...]
Launches = dict[str, int]

SHAPES: dict[str, Sequence[Shape]] = {
    "ResNet-50": MODELS["ResNet-50"],
    "GPT-2 small": MODELS["GPT-2 small"],
    "1000 tensors": [(8,)] * 1000,
    "5000 tensors": [(8,)] * 5000,
}

# Launches of perturb_ and update_, which are all of a lazy step, and those that a Hessian step adds to them or has in
# place of them. A table holds 2,500 tensors where one list is read, 1,548 in rademacher_, 1,300 in perturb_ and a lazy
# update_, and 985 in one with products.
FEW = (
    {"perturb_ squares": 1, "perturb_ perturb": 1, "update_ inspect": 1, "update_ update": 1},
    {"rademacher_ rademacher": 1, "update_ inspect": 2},
)
EXPECTED: dict[str, tuple[Launches, Launches]] = {
    "ResNet-50": FEW,
    "GPT-2 small": FEW,
    "1000 tensors": (FEW[0], {**FEW[1], "update_ update": 2}),
    "5000 tensors": (
        {"perturb_ squares": 2, "perturb_ perturb": 4, "update_ inspect": 2, "update_ update": 4},
        {"rademacher_ rademacher": 4, "update_ inspect": 4, "update_ update": 6},
    ),
}


@pytest.fixture(autouse=True)
def nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of a large model stays out of memory, and Hessian products come from nowhere."""
    zeros, zeros_like = torch.zeros, torch.zeros_like

    def sparse_zeros(size: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        large = isinstance(size, int) and size >= 1 << 20
        return sparse(size, dtype) if large else zeros(size, dtype=dtype, device=device)

    def sparse_zeros_like(like: Tensor) -> Tensor:
        return sparse(like.numel(), like.dtype) if like.numel() >= 1 << 20 else zeros_like(like)

    def products(params: Any, gradients: Any, signs: list[Tensor], keep_graph: bool) -> list[Tensor]:
        return [torch.empty_like(z) for z in signs]

    monkeypatch.setattr(torch, "zeros", sparse_zeros)
    monkeypatch.setattr(torch, "zeros_like", sparse_zeros_like)
    monkeypatch.setitem(exact.SOURCES, "autograd", exact.HessianSource(products, needs_graph=False))


def kernel_of(launch: emulation.Launch) -> str:
    """squares_kernel<float, 1>, mangled, is "squares"."""
    found = re.match(r"_ZN6sassha4cuda\d+([a-z_]+)_kernel", launch.name)
    assert found is not None, launch.name
    return found[1]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """The launches so far, by operator and kernel."""
    counts: Counter[str] = Counter()
    original = emulation.emulated()
    with emulation.intercepted() as launches:

        def counting(name: str) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                result = getattr(original, name)(*arguments)
                counts.update(f"{name} {kernel_of(launch)}" for launch in launches)
                launches.clear()
                return result

            return run

        operators: Any = SimpleNamespace(**{name: counting(name) for name in ops.NAMES})
        monkeypatch.setitem(ops.BACKENDS, BACKEND, ops.Backend(("cpu",), lambda: None, lambda: operators))
        yield counts


def take_step(opt: FusedOptimizer, counts: Counter[str]) -> Launches:
    """Takes a step by phases, with gradients of whatever values; returns its launches."""
    counts.clear()
    along_momentum = opt._run.flat.method.along_momentum(opt.param_groups[0])
    for phase in (opt.perturb, opt.step):
        for group in opt.param_groups:
            for param in group["params"]:
                if phase == opt.step or not along_momentum:
                    param.grad = torch.empty_like(param)
        phase()
    return dict(counts)


@pytest.mark.parametrize("name", SHAPES)
def test_a_step_launches_no_more_kernels_than_its_tables_need(counts: Counter[str], name: str) -> None:
    params = [nn.Parameter(sparse(prod(shape), torch.float32).view(shape)) for shape in SHAPES[name]]
    opt = Sassha(params, hessian_interval=2, backend=BACKEND)
    lazy, more = EXPECTED[name]
    for _ in range(2):
        assert opt.hessian_due
        assert take_step(opt, counts) == {**lazy, **more}
        assert not opt.hessian_due
        assert take_step(opt, counts) == lazy
    assert sum(lazy.values()) <= (4 if len(params) <= 1000 else 12)
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("samples", [2, 5])
def test_every_further_sample_launches_its_signs_and_its_sum(counts: Counter[str], samples: int) -> None:
    params = [nn.Parameter(torch.empty(shape)) for shape in MODELS["ResNet-20"]]
    opt = Sassha(params, hessian_samples=samples, backend=BACKEND)
    more = {"rademacher_ rademacher": samples, "hutchinson_ hutchinson": samples, "update_ inspect": 2}
    assert take_step(opt, counts) == {**FEW[0], **more}


def test_an_adaptive_step_and_a_learning_rate_in_a_tensor_launch_no_more(counts: Counter[str]) -> None:
    params = [nn.Parameter(torch.empty(shape)) for shape in MODELS["ResNet-20"]]
    opt = Sassha(params, torch.tensor(0.1), adaptive=True, hessian_interval=2, backend=BACKEND)
    take_step(opt, counts)
    assert take_step(opt, counts) == FEW[0]


@pytest.mark.parametrize("rates", ["numbers", "tensors", "one tensor"])
@pytest.mark.parametrize("groups", [1, 2, 12, 50])
def test_launches_do_not_grow_with_the_groups(counts: Counter[str], groups: int, rates: str) -> None:
    params = [nn.Parameter(torch.empty(8)) for _ in range(1000)]
    shared, share = torch.tensor(0.1), len(params) // groups
    given: list[dict[str, Any]] = []
    for i in range(groups):
        lr: Any = {"numbers": 0.1 / (i + 1), "tensors": torch.tensor(0.1 / (i + 1)), "one tensor": shared}[rates]
        mine = params[i * share : (i + 1) * share]
        given.append({"params": mine, "lr": lr, "weight_decay": 0.01 * (i % 2), "rho": 0.1 * (i % 3)})
    opt = Sassha(given, rho=0.2, hessian_interval=2, backend=BACKEND)
    take_step(opt, counts)
    assert take_step(opt, counts) == FEW[0]
    # A new learning rate is one copy, and no launch.
    opt.param_groups[0]["lr"] = 0.05
    take_step(opt, counts)
    assert take_step(opt, counts) == FEW[0]


def test_groups_of_other_settings_have_launches_of_their_own(counts: Counter[str]) -> None:
    params = [nn.Parameter(torch.empty(8)) for _ in range(6)]
    options: list[dict[str, Any]] = [{}, {"betas": (0.5, 0.9)}, {"lr": 0.01}] * 2
    opt = Sassha([{"params": [p], **own} for p, own in zip(params, options)], hessian_interval=2, backend=BACKEND)
    take_step(opt, counts)
    # Two buckets; the norm is taken of both before either is written, twice.
    launches = {
        "perturb_ perturb": 2,
        "update_ inspect": 2,
        "update_ update": 2,
        "grad_norm squares": 4,
        "grad_norm norm": 4,
    }
    assert take_step(opt, counts) == launches


@pytest.mark.parametrize("member", [SAMSGD, SAMAdamW])
def test_members_without_a_hessian_launch_what_a_lazy_step_does(
    counts: Counter[str], member: Callable[..., FusedOptimizer]
) -> None:
    params = [nn.Parameter(torch.empty(shape)) for shape in MODELS["ResNet-20"]]
    opt = member(params, backend=BACKEND)
    for _ in range(2):
        assert take_step(opt, counts) == FEW[0]


ALONG_MOMENTUM: dict[str, Callable[..., FusedOptimizer]] = {
    "SAMSGD": partial(SAMSGD, momentum=0.9, ascent="momentum", exact_restore=False),
    "SAMAdamW": partial(SAMAdamW, ascent="momentum"),
    "MSassha": partial(MSassha, hessian_interval=100),
    "MSassha by blocks": partial(MSassha, hessian_interval=100, hessian_block=32, exact_restore=False),
}


@pytest.mark.parametrize("member", ALONG_MOMENTUM)
def test_a_step_along_the_momentum_has_its_norm_from_the_step_before(counts: Counter[str], member: str) -> None:
    params = [nn.Parameter(torch.empty(shape)) for shape in MODELS["ResNet-20"]]
    opt = ALONG_MOMENTUM[member](params, backend=BACKEND)
    take_step(opt, counts)
    lazy = {"perturb_ perturb": 1, "update_ inspect": 1, "update_ update_and_squares": 1, "update_ norm": 1}
    if member == "MSassha":  # whose products are averaged as they are read: what they are not is measured
        assert take_step(opt, counts) == {**lazy, "perturb_ squares": 1}
    for _ in range(2):
        assert take_step(opt, counts) == lazy
    _ = opt.state  # who has it may write to it
    for _ in range(2):
        assert take_step(opt, counts) == FEW[0]


def test_a_hessian_step_by_blocks_launches_their_averages(counts: Counter[str]) -> None:
    params = [nn.Parameter(torch.empty(shape)) for shape in MODELS["ResNet-20"]]
    opt = Sassha(params, hessian_interval=2, hessian_block=8, backend=BACKEND)
    # That products are finite is seen by their norm: the update has their averages alone.
    norm = {"grad_norm squares": 1, "grad_norm norm": 1}
    more = {"rademacher_ rademacher": 1, "block_average_ block_average": 1}
    assert take_step(opt, counts) == {**FEW[0], **norm, **more}
    assert take_step(opt, counts) == FEW[0]
