"""Steps do not wait for the device: on fake tensors, where reading a value raises, whole steps run through."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sassha_fused import Sassha, ops
from sassha_fused.curvature import exact
from tests.support.members import ALONG_MOMENTUM, MEMBERS, each_member
from tests.support.problems import BACKENDS, STYLES, Problem

pytestmark = pytest.mark.slow

# Of the kernels, none is started: where tensors are fake, nothing is launched.
FAKED = [*BACKENDS, *(["triton"] if ops.BACKENDS["triton"].missing() is None else [])]

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "three samples": {"hessian_samples": 3},
    "adaptive, update": {"adaptive": True, "bias_correction": "update", "weight_decay": 0.1},
    "maximize, power": {"maximize": True, "hessian_power": 0.7},
}


def set_tensor_lr(opt: Sassha, device: str = "cpu") -> None:
    """After construction, where the value of a learning rate is checked."""
    for group in opt.param_groups:
        group["lr"] = torch.full((), 0.1, device=device)


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    with FakeTensorMode() as mode:
        yield mode


def test_reading_a_value_raises_here(fake: FakeTensorMode) -> None:
    with pytest.raises(DataDependentOutputException):
        torch.ones(3).sum().item()


# Each style takes Hessian steps and lazy ones, and either one the first steps; plain torch takes seconds for each.
@pytest.mark.parametrize("backend", FAKED)
@pytest.mark.parametrize(
    "name, tensor_lr, first, then",
    [
        ("defaults", False, "closure", "phase"),
        ("three samples", True, "phase", "closure"),
        ("adaptive, update", False, "phase", "closure"),
        ("maximize, power", True, "closure", "phase"),
    ],
)
def test_whole_steps_read_no_value(
    fake: FakeTensorMode, backend: str, name: str, tensor_lr: bool, first: str, then: str
) -> None:
    weight, bias = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4))
    scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    half = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    inputs = torch.ones(6, 3)
    groups = [{"params": [weight, bias, scale]}, {"params": [half], "rho": 0.1}]
    opt = Sassha(groups, hessian_interval=2, backend=backend, **OPTIONS[name])
    if tensor_lr:
        set_tensor_lr(opt)

    def loss() -> Tensor:
        return (inputs @ weight.t() + bias).tanh().mean() + (scale**3).float() + (half**3).sum().float()

    due = []
    for style in (first, first, then, then):
        due.append(opt.hessian_due)
        opt.zero_grad()
        STYLES[style](opt, loss)
    assert due == [True, False, True, False]
    assert all(isinstance(value, FakeTensor) for state in opt.state.values() for value in state.values())


class Reads(TorchDispatchMode):
    """Counts the values read back from tensors, real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("style", STYLES)
def test_a_step_reads_one_value_back_namely_whether_the_one_before_was_skipped(backend: str, style: str) -> None:
    problem = Problem(backend)
    counts = []
    for _ in range(6):
        with Reads() as reads:
            problem.step(style)
        counts.append(reads.count)
    assert counts == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("backend", FAKED)
def test_a_parameter_that_joins_late_reads_no_value(fake: FakeTensorMode, backend: str) -> None:
    first, late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = Sassha([first, late], backend=backend)
    opt.step(lambda: (first**3).sum())
    opt.step(lambda: (first**3).sum() + (late**3).sum())
    assert set(opt.state[late]) == set(opt.state[first])


@pytest.mark.parametrize("backend", FAKED)
def test_an_early_restore_reads_no_value(fake: FakeTensorMode, backend: str) -> None:
    w = nn.Parameter(torch.ones(3))
    opt = Sassha([w], backend=backend)
    (w**3).sum().backward()
    opt.perturb()
    gradient = torch.autograd.grad((w**3).sum(), w, create_graph=True)
    w.grad = gradient[0]
    opt.restore()
    opt.step()
    assert not opt.perturbed


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods without their Python bindings, which refuse CUDA tensors, even fake ones, where torch has no CUDA."""

    def getitem(self: Tensor, key: Any) -> Tensor:
        for part in key if isinstance(key, tuple) else (key,):
            if isinstance(part, int):
                self = torch.ops.aten.select.int(self, 0, part)
            else:
                assert isinstance(part, slice) and self.dim() == 1
                self = torch.ops.aten.slice.Tensor(self, 0, part.start, part.stop)
        return self

    monkeypatch.setattr(Tensor, "__getitem__", getitem)
    monkeypatch.setattr(Tensor, "__invert__", lambda self: torch.ops.aten.bitwise_not(self))
    monkeypatch.setattr(Tensor, "copy_", lambda self, other, **options: torch.ops.aten.copy_(self, other, **options))


def ones(params: Any, gradients: Any, signs: list[Tensor], keep_graph: bool) -> list[Tensor]:
    """Hessian products from nowhere: backward on fake CUDA tensors aborts the process."""
    return [torch.ones_like(z) for z in signs]


class Arrivals(TorchDispatchMode):
    """Notes of every copy from the GPU to the CPU whether it goes on before the value has arrived."""

    def __init__(self) -> None:
        super().__init__()
        self.early: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].is_cuda and str(kwargs.get("device")) == "cpu":
            self.early.append(bool(kwargs.get("non_blocking")))
        if func is torch.ops.aten.copy_.default and args[1].is_cuda and not args[0].is_cuda:
            self.early.append(bool(args[2] if len(args) > 2 else kwargs.get("non_blocking")))
        return func(*args, **kwargs)


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """As where torch has CUDA: the compiled operators then serve fake tensors through their fake kernels."""
    monkeypatch.setitem(ops.BACKENDS, "cuda", replace(ops.BACKENDS["cuda"], missing=lambda: None))
    if backend == "triton":
        triton = pytest.importorskip("triton") and ops.BACKENDS["triton"]
        monkeypatch.setitem(ops.BACKENDS, "triton", replace(triton, devices=None, missing=lambda: None))
    monkeypatch.setitem(exact.SOURCES, "autograd", exact.HessianSource(ones, needs_graph=False))


@pytest.mark.parametrize("backend", ["eager", "auto", "triton"])
@pytest.mark.parametrize("name, lr_device", [*zip(OPTIONS, (None, "cpu", "cuda", "cuda"))])
def test_perturb_and_step_on_fake_cuda_tensors_read_no_value(
    fake: FakeTensorMode,
    bindings: None,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    name: str,
    lr_device: str | None,
) -> None:
    pretend_cuda(monkeypatch, backend)
    params = [
        nn.Parameter(torch.ones(4, 5, device="cuda")),
        nn.Parameter(torch.ones((), device="cuda")),
        nn.Parameter(torch.ones(7, device="cuda", dtype=torch.bfloat16)),
        nn.Parameter(torch.ones(3, device="cuda", dtype=torch.float64)),
        nn.Parameter(torch.ones(3)),  # on the CPU
    ]
    groups = [{"params": params[:2]}, {"params": params[2:], "rho": 0.1}]
    opt = Sassha(groups, hessian_interval=2, backend=backend, **OPTIONS[name])
    if lr_device is not None:
        set_tensor_lr(opt, lr_device)
    for due in (True, False, True):
        for phase in (opt.perturb, opt.step):
            for param in params:
                param.grad = torch.ones_like(param)
            assert opt.hessian_due == due
            with Arrivals() as arrivals:
                phase()
            # The norm and the guards of the GPU, which the update of the parameter on the CPU reads at once.
            assert arrivals.early and not any(arrivals.early)
        opt.zero_grad()
    for param in params:
        assert all(value.device == param.device for value in opt.state[param].values())
        assert opt.state[param]["exp_avg"].shape == param.shape


@pytest.mark.parametrize("backend", FAKED)
@each_member
def test_steps_of_every_member_read_no_value(fake: FakeTensorMode, backend: str, member: str) -> None:
    kind, options = MEMBERS[member]
    weight, bias = nn.Parameter(torch.ones(8, 3)), nn.Parameter(torch.ones(8))
    opt = kind([weight, bias], backend=backend, **options)
    inputs = torch.ones(6, 3)
    for _ in range(4):
        opt.step(lambda: (inputs @ weight.t() + bias).tanh().square().mean())
    assert all(isinstance(value, FakeTensor) for state in opt.state.values() for value in state.values())


# Of plain torch no averages of blocks: more of what they call has bindings that refuse CUDA tensors.
@pytest.mark.parametrize(
    "backend, member",
    [*(("auto", m) for m in MEMBERS), *(("eager", m) for m, (_, o) in MEMBERS.items() if "hessian_block" not in o)],
)
def test_every_member_steps_parameters_on_cpu_and_gpu_of_two_dtypes_and_reads_no_value(
    fake: FakeTensorMode, bindings: None, monkeypatch: pytest.MonkeyPatch, backend: str, member: str
) -> None:
    pretend_cuda(monkeypatch, backend)
    kind, options = MEMBERS[member]
    places = [("cuda", torch.float32), ("cpu", torch.float32), ("cuda", torch.float64), ("cpu", torch.float64)]
    params = [nn.Parameter(torch.ones(4, 5, device=device, dtype=dtype)) for device, dtype in places]
    opt = kind(params, backend=backend, **options)
    for _ in range(3):
        for phase in (opt.perturb, opt.step) if "rho" in opt.defaults else (opt.step,):
            for param in params:
                param.grad = None if member in ALONG_MOMENTUM and phase == opt.perturb else torch.ones_like(param)
            phase()
        opt.zero_grad()
    for param in params:
        assert opt.state[param]["exp_avg" if "exp_avg" in opt.state[param] else "momentum_buffer"].dtype == param.dtype
        assert all(value.device == param.device for value in opt.state[param].values())
