"""What only a GPU can show. ``pytest -m gpu`` also runs the conformance suite there, as backends cuda and triton."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import Sassha, available_backends
from sassha_fused.graphs import GraphedStep
from sassha_fused.layout import layouts_of
from sassha_fused.ops import Operators, operators
from sassha_fused.settings import Settings
from tests.support.backends import BACKENDS
from tests.support.calls import HYPER
from tests.support.formulas import formula_perturb
from tests.support.problems import STYLES, assert_same
from tests.support.reference import signs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend with kernels of its own for CUDA tensors."""
    reason = available_backends()[request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


class Network:
    """A small network on a device, and its batches."""

    def __init__(self, device: str = "cuda", lr: float | Tensor = 0.05, **options: object) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(37, 65), nn.Tanh(), nn.Linear(65, 5)).to(device)
        self.inputs, self.targets = torch.randn(16, 37, device=device), torch.randn(16, 5, device=device)
        self.opt = Sassha(self.model.parameters(), lr, **{"hessian_interval": 3, **options})

    def loss(self) -> Tensor:
        return (self.model(self.inputs) - self.targets).square().mean()

    def new_batch(self) -> None:
        self.inputs.normal_()
        self.targets.normal_()

    def state(self) -> list[Tensor]:
        states = [value for state in self.opt.state.values() for value in state.values()]
        return [tensor.detach().cpu().clone() for tensor in [*self.model.parameters(), *states]]


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_the_kernels_serve_cuda_tensors(name: str) -> None:
    if name == "triton":
        pytest.importorskip("triton")
    assert available_backends()[name] is None
    network = Network(backend=name)
    network.opt.step(network.loss)
    assert network.opt.skipped_steps == 0
    assert available_backends()[name] is None  # now that the device is in use, it was tried


def test_the_conformance_suite_runs_on_this_device() -> None:
    assert BACKENDS["cuda"] == BACKENDS.get("triton", "cuda") == "cuda"


def test_the_self_test_passes_on_this_device() -> None:
    command = [sys.executable, "-m", "sassha_fused", "selftest"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "cuda:0   cuda " in done.stdout
    assert "triton" not in BACKENDS or "cuda:0   triton " in done.stdout


@pytest.mark.parametrize("style", STYLES)
def test_two_runs_agree_bit_for_bit(backend: str, style: str) -> None:
    results = []
    for _ in range(2):
        network = Network(backend=backend)
        for _ in range(8):
            STYLES[style](network.opt, network.loss)
        results.append(network.state())
    assert_same(results[1], results[0])


@contextmanager
def sync_debug_mode(mode: str) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "options", [{}, {"hessian_samples": 3}, {"adaptive": True, "bias_correction": "update"}], ids=str
)
def test_whole_steps_do_not_synchronize(backend: str, style: str, options: dict[str, object]) -> None:
    network = Network(lr=torch.tensor(0.05, device="cuda"), backend=backend, **options)
    for _ in range(4):
        STYLES[style](network.opt, network.loss)
    with sync_debug_mode("error"):
        for _ in range(6):
            STYLES[style](network.opt, network.loss)


TRITON_KERNELS = {"squares_kernel", "perturb_kernel", "inspect_kernel", "update_kernel"}


def test_a_lazy_step_of_the_optimizer_is_four_launches(backend: str) -> None:
    network = Network(hessian_interval=100, backend=backend)
    for _ in range(3):
        network.opt.step(network.loss)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        network.opt.step(network.loss)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    kernels = [name for name in names if "sassha::cuda" in name or name in TRITON_KERNELS]
    assert len(kernels) == 4, kernels


def test_triton_compiles_nothing_once_every_kind_of_step_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton").knobs
    network = Network(backend="triton", hessian_samples=2)
    compiled: list[object] = []
    for step in range(100):
        if step == 6:
            monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **details: compiled.append(details))
        group = network.opt.param_groups[0]
        group["lr"], group["eps"], group["rho"] = 0.05 / (1 + step), 1e-4 * (1 + step), 0.01 * step
        group["weight_decay"], group["betas"] = step % 3, (0.9 - step / 1000, 0.999)
        # Now and then without the last bias, so that there are fewer tensors.
        list(network.model.parameters())[-1].requires_grad_(step % 4 != 3)
        network.opt.step(network.loss)
    assert not compiled


def test_graphs_with_a_changing_learning_rate_are_the_steps_without_them(backend: str) -> None:
    results, losses = [], []
    for graphed in (False, True):
        network = Network(lr=torch.tensor(0.05, device="cuda"), backend=backend)
        usual = functools.partial(network.opt.step, network.loss)
        step = GraphedStep(network.opt, network.loss) if graphed else usual
        torch.manual_seed(1)
        taken = []
        for i in range(30):
            network.new_batch()
            if i == 20:
                network.inputs[0, 0] = torch.inf
            network.opt.param_groups[0]["lr"].fill_(0.05 / (1 + i))
            taken.append(step().clone())
        assert network.opt.skipped_steps == 1
        results.append(network.state())
        losses.append([loss.cpu() for loss in taken])
    assert_same(losses[1], losses[0])
    assert_same(results[1], results[0])


def test_a_step_runs_on_the_current_stream(backend: str) -> None:
    results = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        network = Network(backend=backend)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(5):
                torch.cuda._sleep(10_000_000)  # work of another stream would overtake what follows
                network.opt.step(network.loss)
        stream.synchronize()
        results.append(network.state())
    assert_same(results[1], results[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two CUDA devices")
def test_parameters_may_lie_on_several_devices_whichever_is_current(backend: str) -> None:
    results = []
    for devices in (("cuda:0", "cuda:0"), ("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(300).to(device)) for device in devices]
        opt = Sassha([{"params": [p]} for p in params], hessian_interval=2, backend=backend)
        for _ in range(5):
            opt.step(lambda: sum((p**4).sum().to("cuda:0") for p in params))
        results.append([p.detach().cpu() for p in params])
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def perturb(
    kernels: Operators, w: Tensor, g: Tensor, backup: Tensor, norm: Tensor, *,
    rho: float = 0.1, table: str = "cuda", layouts: Tensor | None = None,
) -> None:  # fmt: skip
    """perturb_ of one parameter by a given norm; table: the device of per_row."""
    per_row = torch.tensor([[0.0, 0.0, rho]], dtype=torch.float64, device=table)
    layouts = layouts_of([w]) if layouts is None else layouts
    kernels.perturb_([w], [g], backup, [0], [0], layouts, norm, False, per_row, list(Settings.of(HYPER)))


def test_tensors_beyond_two_to_the_31_elements(backend: str) -> None:
    count = 2**31 + 300
    if torch.cuda.mem_get_info()[0] < 4 * 2 * count + (4 << 30):
        pytest.skip("the device has too little memory for tensors of 2^31 elements")
    kernels = operators(backend, torch.device("cuda"))
    w, g = (torch.full((count,), value, dtype=torch.bfloat16, device="cuda") for value in (1.0, 2.0))
    backup = torch.zeros(-(-count // 128) * 128, dtype=torch.bfloat16, device="cuda")
    tail = slice(count - 1000, count)
    generator = torch.Generator().manual_seed(0)
    for tensor in (w, g):
        tensor[tail] = torch.randn(1000, generator=generator).bfloat16().cuda()
    old, gradient = w[tail].cpu(), g[tail].cpu()
    norm = torch.tensor(3.0, dtype=torch.float64, device="cuda")
    perturb(kernels, w, g, backup, norm, rho=0.5)
    exact = formula_perturb(old.double(), gradient.double(), 3.0, 0.5, False, False)
    assert_same(w[tail].cpu(), exact.w.float().bfloat16())
    assert_same(backup[count - 1000 : count].cpu(), old)
    measured = kernels.grad_norm([g], [], None, False)
    squares = 4.0 * (count - 1000) + float(gradient.double().square().sum())
    assert float(measured) == pytest.approx(squares**0.5, rel=1e-12)
    kernels.rademacher_([w], [5], 7, torch.tensor(1, device="cuda"), 0)
    assert_same(w[tail].cpu(), signs(5 + count - 1000, 1000, 7, 1, 0).bfloat16())


def test_a_tensor_on_another_device_is_refused(backend: str) -> None:
    kernels = operators(backend, torch.device("cuda"))
    w, g = torch.ones(200, device="cuda"), torch.ones(200, device="cuda")
    backup, norm = torch.zeros(256, device="cuda"), torch.ones((), dtype=torch.float64, device="cuda")
    for tensors in ((w, g.cpu(), backup, norm), (w, g, backup.cpu(), norm)):
        with pytest.raises((RuntimeError, ValueError), match=r"device|cpu"):
            perturb(kernels, *tensors)
    with pytest.raises((RuntimeError, ValueError), match=r"norm .*(device|cpu)"):
        perturb(kernels, w, g, backup, norm.cpu())
    with pytest.raises((RuntimeError, ValueError), match=r"per_row .*(device|cpu)"):
        perturb(kernels, w, g, backup, norm, table="cpu")
    with pytest.raises((RuntimeError, ValueError), match=r"layouts .*(device|cpu|CPU)"):
        perturb(kernels, w, g, backup, norm, layouts=layouts_of([w]).cuda())
    assert bool((w == 1).all()) and not bool(backup.any())


def test_capturing_a_step_by_hand_is_refused_and_says_what_to_use() -> None:
    network = Network(hessian_interval=100)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            network.opt.step(network.loss)
    stream.synchronize()
    with pytest.raises(RuntimeError, match="GraphedStep"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        network.opt.step(network.loss)


# Every operator, size, alignment and layout, and a step that is skipped. Of Triton's kernels none: in its stead
# those of backend triton_ptx.
SANITIZED = {
    "perturb update hutchinson norm guards": "(perturb_moves or update_changes or one_sample or norm_is_exact or"
    " brings_back) and not many and not triton",
    "signs": "(any_index or memory) and not triton",
}


@pytest.mark.parametrize("files", SANITIZED)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool: str, files: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer was not found: it comes with the CUDA toolkit")
    chosen = ["-m", "gpu", "-k", SANITIZED[files], *(f"tests/operators/test_{name}.py" for name in files.split())]
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    options = [f"--tool={tool}", "--error-exitcode=9", "--target-processes=all"]
    if tool != "initcheck":  # which must see what torch's kernels have written
        options.append("--kernel-regex=kns=sassha")
    # Memory that torch hands out again looks initialised.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [sanitizer, *options, *tests], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stdout[-5000:]
