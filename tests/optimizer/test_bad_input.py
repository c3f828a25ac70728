"""What is refused: each error says what and why, and nothing has changed when it is raised."""

import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import Sassha, available_backends, eager, ops
from sassha_fused.checks import check_gradients
from tests.support.problems import (
    BACKENDS,
    STYLES,
    Problem,
    assert_differ,
    assert_same,
    backward,
    parameter,
    undisturbed,
    weights,
)

both_backends = pytest.mark.parametrize("backend", BACKENDS)
all_styles = pytest.mark.parametrize("style", STYLES)
NAN, INF = math.nan, math.inf


@contextmanager
def refused(problem: Problem, error: type[Exception], match: str) -> Iterator[None]:
    """The block raises, and leaves no trace: not in weights, state, groups or counts, nor in the steps after it."""
    expected = [undisturbed(type(problem), problem.opt._backend, problem.steps + more) for more in (0, 4)]
    assert_same(problem.snapshot(), expected[0])
    with pytest.raises(error, match=match):
        yield
    assert not problem.opt.perturbed
    assert_same(problem.snapshot(), expected[0])
    assert_same(problem.train(4).snapshot(), expected[1])


# ---------------------------------------------------------------------------------------------------------------------
# Hyperparameters

BAD_HYPERPARAMETERS: list[tuple[str, Any, type[Exception]]] = [
    *[(name, -0.1, ValueError) for name in ("lr", "eps", "weight_decay", "rho")],
    *[(name, NAN, ValueError) for name in ("lr", "eps", "weight_decay", "rho")],
    *[(name, INF, ValueError) for name in ("lr", "eps", "weight_decay", "rho")],
    *[(name, "0.1", TypeError) for name in ("lr", "eps", "weight_decay", "rho")],
    *[(name, True, TypeError) for name in ("lr", "eps", "weight_decay", "rho")],
    *[(name, None, TypeError) for name in ("lr", "eps", "weight_decay", "rho")],
    ("lr", torch.tensor(-0.1), ValueError),
    ("lr", torch.tensor(NAN), ValueError),
    ("lr", torch.tensor([0.1, 0.2]), ValueError),
    ("lr", torch.tensor(1), ValueError),
    ("betas", (1.0, 0.9), ValueError),
    ("betas", (0.9, 1.0), ValueError),
    ("betas", (-0.1, 0.9), ValueError),
    ("betas", (0.9, NAN), ValueError),
    ("betas", (0.9, 0.99, 0.999), ValueError),
    ("betas", (0.9,), ValueError),
    ("betas", 0.9, ValueError),
    ("betas", ("0.9", 0.9), ValueError),
    ("betas", (True, 0.9), ValueError),
    ("hessian_power", 0.0, ValueError),
    ("hessian_power", -0.5, ValueError),
    ("hessian_power", 1.1, ValueError),
    ("hessian_power", NAN, ValueError),
    ("hessian_power", "0.5", ValueError),
    ("hessian_power", None, ValueError),
    ("hessian_interval", 0, ValueError),
    ("hessian_interval", -1, ValueError),
    ("hessian_samples", 0, ValueError),
    ("hessian_samples", 2**32, ValueError),
    ("hessian_warmup", -1, ValueError),
    ("seed", -1, ValueError),
    ("seed", 2**63, ValueError),
    *[(f"hessian_{name}", 2.0, TypeError) for name in ("interval", "samples", "warmup")],
    *[(f"hessian_{name}", "2", TypeError) for name in ("interval", "samples", "warmup")],
    *[(f"hessian_{name}", True, TypeError) for name in ("interval", "samples", "warmup")],
    ("bias_correction", "both", ValueError),
    ("bias_correction", None, ValueError),
    ("adaptive", 1, TypeError),
    ("maximize", "no", TypeError),
]
OPTIMIZER_ONLY: list[tuple[str, Any, type[Exception]]] = [
    ("hvp", "jax", ValueError),
    ("hvp", None, ValueError),
    ("backend", "tpu", ValueError),
    ("backend", None, ValueError),
]


def naming(name: str, value: Any) -> str:
    """A message that has the argument's name, and later its value."""
    return rf"(?s){name}\b.*{re.escape(repr(value))}"


@pytest.mark.parametrize("name, value, error", BAD_HYPERPARAMETERS + OPTIMIZER_ONLY)
def test_a_bad_hyperparameter_is_named_with_its_value(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=naming(name, value)):
        Sassha([parameter(1.0)], **{name: value})


@pytest.mark.parametrize("name, value, error", BAD_HYPERPARAMETERS)
def test_a_bad_hyperparameter_of_one_group_is_refused(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=naming(name, value)):
        Sassha([{"params": [parameter(1.0)]}, {"params": [parameter(2.0)], name: value}])


@pytest.mark.parametrize("name, value, error", BAD_HYPERPARAMETERS)
def test_a_bad_group_added_later_changes_nothing(name: str, value: Any, error: type[Exception]) -> None:
    problem = Problem().train(2)
    with refused(problem, error, naming(name, value)):
        problem.opt.add_param_group({"params": [parameter(1.0)], name: value})


@pytest.mark.parametrize("name, value", [("seed", 5), ("hessian_samples", 4)])
def test_what_the_random_signs_share_cannot_differ_between_groups(name: str, value: int) -> None:
    problem = Problem().train(2)
    with refused(problem, ValueError, naming(name, value)):
        problem.opt.add_param_group({"params": [parameter(1.0)], name: value})


@pytest.mark.parametrize(
    "name, value",
    [
        *[(name, 0.0) for name in ("lr", "eps", "weight_decay", "rho")],
        ("lr", 1),
        ("lr", torch.tensor(0.1)),
        ("betas", (0.0, 0.0)),
        ("betas", [0.9, 0.99]),
        ("hessian_power", 1),
        ("hessian_interval", 1),
        ("seed", 2**63 - 1),
    ],
)
def test_the_limits_of_what_is_allowed_are_allowed(name: str, value: Any) -> None:
    before = weights(Problem().params)
    problem = Problem(**{"rho": 0.1, name: value}).train(2)
    assert all(param.isfinite().all() for param in problem.params)
    assert_differ(weights(problem.params[2:]), before[2:])


# ---------------------------------------------------------------------------------------------------------------------
# Backends


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> str:
    reason = "the extension was left at home"
    monkeypatch.setattr(ops, "_EXTENSION_MISSING", reason)
    monkeypatch.setattr(ops, "_warned", set())
    return reason


def spy_on_eager(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the eager operators as they are called from now on."""
    called: list[str] = []
    for name in ops.NAMES:
        original = getattr(eager, name)
        monkeypatch.setattr(eager, name, lambda *a, name=name, original=original: called.append(name) or original(*a))
    return called


def test_a_backend_that_cannot_serve_is_refused_with_its_reason(without_extension: str) -> None:
    backends = available_backends()
    assert (backends["cpu"], backends["eager"]) == (without_extension, None)
    with pytest.raises(ValueError, match=rf"backend 'cpu'.*{without_extension}"):
        Sassha([parameter(1.0)], backend="cpu")


@pytest.mark.parametrize(
    "names, reason",
    [
        ((), "this torch was built without CUDA"),
        (("version",), "_cuda was not built"),
        (("version", "loaded"), "no CUDA device is available"),
        (("version", "loaded", "available"), None),
        (("version", "loaded", "available", "initialized"), "do not run on cuda:0: no kernel image"),
    ],
    ids=str,
)
def test_why_the_cuda_kernels_cannot_be_used_is_told(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], reason: str | None
) -> None:
    def refuses(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.version, "cuda", "13.0" if "version" in names else None)
    not_built = "the extension sassha_fused._cuda was not built"
    monkeypatch.setattr(ops, "_load_cuda", lambda: None if "loaded" in names else not_built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "available" in names)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: "initialized" in names)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "ones", refuses)
    ops._refusal.cache_clear()
    found = available_backends()["cuda"]
    ops._refusal.cache_clear()
    assert found is None if reason is None else found is not None and reason in found


def test_auto_falls_back_to_eager_and_says_so_once(without_extension: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = spy_on_eager(monkeypatch)
    with pytest.warns(UserWarning, match=without_extension) as caught:
        problem = Problem("auto").train(4)
        Problem("auto").train(1)
    assert len(caught) == 1
    assert set(called) >= {"grad_norm", "perturb_", "update_", "rademacher_"}
    assert_same(problem.snapshot(), Problem("eager").train(4).snapshot())


def test_the_environment_takes_the_place_of_auto_only(monkeypatch: pytest.MonkeyPatch) -> None:
    called = spy_on_eager(monkeypatch)
    for value in ("", "auto", "cpu"):
        monkeypatch.setenv("SASSHA_FUSED_BACKEND", value)
        Problem("auto").train(1)
        assert not called
    monkeypatch.setenv("SASSHA_FUSED_BACKEND", "eager")
    Problem("cpu").train(1)
    assert not called
    Problem("auto").train(1)
    assert called


@pytest.mark.parametrize("value", ["tpu", "CPU", "cpu,eager"])
def test_an_unknown_backend_in_the_environment_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SASSHA_FUSED_BACKEND", value)
    with pytest.raises(ValueError, match=naming("SASSHA_FUSED_BACKEND", value)):
        Problem("auto").train(1)


def test_an_unavailable_backend_in_the_environment_is_refused_with_its_reason(
    without_extension: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SASSHA_FUSED_BACKEND", "cpu")
    with pytest.raises(ValueError, match=without_extension):
        Problem("auto").train(1)


def test_a_backend_refused_in_the_first_step_can_be_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("auto")
    monkeypatch.setenv("SASSHA_FUSED_BACKEND", "tpu")
    for _ in range(2):
        with pytest.raises(ValueError, match="SASSHA_FUSED_BACKEND"):
            problem.step()
    monkeypatch.delenv("SASSHA_FUSED_BACKEND")
    assert_same(problem.train(4).snapshot(), Problem().train(4).snapshot())


def test_a_backend_is_refused_for_a_device_it_does_not_serve() -> None:
    w = nn.Parameter(torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match=r"backend 'cpu'.*meta"):
        opt = Sassha([w], backend="cpu")
        opt.step(lambda: (w**3).sum())


# ---------------------------------------------------------------------------------------------------------------------
# Parameters


def test_no_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        Sassha([])


def test_a_single_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="iterable"):
        Sassha(parameter(1.0))


BAD_PARAMETERS = {
    "complex": (lambda: nn.Parameter(torch.ones(2, dtype=torch.complex64)), r"complex.*torch\.complex64"),
    "integer": (lambda: torch.ones(2, dtype=torch.int32), r"dtype.*torch\.int32"),
    "bool": (lambda: torch.ones(2, dtype=torch.bool), r"dtype.*torch\.bool"),
    "float8": (lambda: nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn)), r"dtype.*float8_e4m3fn"),
    "sparse": (lambda: nn.Parameter(torch.ones(2).to_sparse()), r"sparse.*torch\.sparse_coo"),
    "no leaf": (lambda: parameter(1.0) * 2, "leaf"),
}


@pytest.mark.parametrize("kind", BAD_PARAMETERS)
def test_parameters_without_a_method_are_refused_at_once(kind: str) -> None:
    make, message = BAD_PARAMETERS[kind]
    with pytest.raises(ValueError, match=message):
        Sassha([parameter(1.0), make()])
    problem = Problem().train(2)
    with refused(problem, ValueError, message):
        problem.opt.add_param_group({"params": [make()]})


def test_a_parameter_in_two_groups_is_refused() -> None:
    problem = Problem().train(2)
    with refused(problem, ValueError, "more than one parameter group"):
        problem.opt.add_param_group({"params": [problem.params[0]]})


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


class Embedded(Problem):
    """The problem with an embedding in a group of its own, whose gradients are sparse in the passes listed."""

    sparse_in: tuple[int, ...] = ()

    def __init__(self, backend: str) -> None:
        super().__init__(backend)
        self.embedding = nn.Embedding(4, 3)
        nn.init.constant_(self.embedding.weight, 0.5)
        self.params.append(self.embedding.weight)
        self.opt.add_param_group({"params": [self.embedding.weight]})
        self.passes = 0

    def loss(self) -> Tensor:
        self.embedding.sparse = self.passes in self.sparse_in
        self.passes += 1
        return super().loss() + (self.embedding(torch.tensor([1, 2])) ** 2).sum()


@both_backends
@all_styles
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_sparse_gradient_is_refused_in_either_pass_of_any_step(backend: str, style: str, at: int, steps: int) -> None:
    problem = Embedded(backend).train(steps, style)
    before = weights(problem.params)
    problem.sparse_in = (2 * steps + at,)
    with pytest.raises(ValueError, match=r"gradient.*sparse.*sparse=False"):
        problem.step(style)
    if style == "phase":
        problem.opt.restore()
    assert_same(weights(problem.params), before)
    assert_same(problem.train(3, style).snapshot(), undisturbed(Embedded, backend, steps + 3))


def misfit_shape(w: Tensor) -> None:
    w.grad = torch.ones_like(w)
    w.data = torch.zeros(5)


def misfit_dtype(w: Tensor) -> None:
    w.grad = torch.ones_like(w)
    w.data = w.data.double()


def misfit_grad_dtype(w: Tensor) -> None:
    if not hasattr(w, "grad_dtype"):
        pytest.skip("this torch does not allow gradients of another dtype")
    w.grad_dtype = None
    w.grad = torch.ones_like(w, dtype=torch.bfloat16)


MISFITS: dict[str, Callable[[Tensor], None]] = {
    "parameter .* shape": misfit_shape,
    "parameter .* dtype": misfit_dtype,
    "gradient of parameter .* dtype torch.bfloat16": misfit_grad_dtype,
}


@both_backends
@pytest.mark.parametrize("groups", ["alone", "together", "apart"])
@pytest.mark.parametrize("when", ["first step", "perturb", "step"])
@pytest.mark.parametrize("misfit", MISFITS)
def test_a_gradient_that_does_not_fit_its_parameter_is_refused(
    backend: str, groups: str, when: str, misfit: str
) -> None:
    params = [parameter(1.0, -2.0, 3.0) for _ in range(1 if groups == "alone" else 2)]
    opt = Sassha(
        [{"params": [param]} for param in params] if groups == "apart" else params,
        hessian_interval=100,
        backend=backend,
    )

    def loss() -> Tensor:
        return torch.stack([param**4 for param in params]).sum()

    if when != "first step":
        opt.step(loss)
        opt.zero_grad()
    before = weights(params)
    loss().backward()
    if when == "step":
        opt.perturb()
        loss().backward()
    MISFITS[misfit](params[-1])
    with pytest.raises(ValueError, match=misfit):
        (opt.step if when == "step" else opt.perturb)()
    assert not opt.perturbed
    if MISFITS[misfit] is misfit_grad_dtype:
        assert_same(weights(params), before)
    assert_same(weights(params[:-1]), before[:-1])


@both_backends
@pytest.mark.parametrize("place", [0, 1])
def test_a_parameter_that_no_longer_fits_its_state_is_refused(backend: str, place: int) -> None:
    params = [parameter(1.0, 2.0, 3.0), parameter(4.0, 5.0, 6.0)]
    opt = Sassha(params, backend=backend)
    opt.step(lambda: (params[0] ** 4).sum() + (params[1] ** 4).sum())
    opt.zero_grad()
    params[place].data = torch.ones(500)
    before = weights(params)
    with pytest.raises(ValueError, match=r"parameter.*shape.*\(500,\)"):
        opt.step(lambda: (params[0] ** 4).sum() + (params[1] ** 4).sum())
    assert_same(weights(params), before)


@pytest.mark.parametrize(
    "misfit, grad",
    [
        ("device meta", torch.ones(3, device="meta")),
        ("dtype torch.float64", torch.ones(3, dtype=torch.float64)),
        ("shape torch.Size([4])", torch.ones(4)),
        ("shape torch.Size([1, 3])", torch.ones(1, 3)),
        ("sparse (torch.sparse_coo)", torch.ones(3).to_sparse()),
    ],
)
def test_the_check_of_gradients_names_the_parameter_and_the_misfit(misfit: str, grad: Tensor) -> None:
    params = [torch.zeros(2), torch.zeros(3)]
    with pytest.raises(ValueError, match=rf"parameter 1.*{re.escape(misfit)}"):
        check_gradients(params, [torch.ones(2), grad])
    check_gradients(params, [torch.ones(2), torch.ones(3)])


# ---------------------------------------------------------------------------------------------------------------------
# Order of calls


@both_backends
@pytest.mark.parametrize("steps", [0, 1])
def test_a_second_step_after_one_perturb_is_refused(backend: str, steps: int) -> None:
    problem = Problem(backend).train(steps)
    problem.step("phase")
    with refused(problem, ValueError, r"step\(\) called twice after one perturb"):
        problem.opt.step()


@both_backends
def test_a_second_step_is_refused_after_an_early_restore_a_skip_and_a_closure(backend: str) -> None:
    problem = Problem(backend)
    problem.loss().backward()
    problem.opt.perturb()
    backward(problem.loss(), create_graph=True)
    problem.opt.restore()
    problem.opt.step()
    problem.steps += 1
    with refused(problem, ValueError, "twice"):
        problem.opt.step()
    problem.step()
    with refused(problem, ValueError, "twice"):
        problem.opt.step()
    problem.opt.step(lambda: problem.loss() * NAN)
    before = problem.snapshot()
    with pytest.raises(ValueError, match="twice"):
        problem.opt.step()
    assert_same(problem.snapshot(), before)


@both_backends
def test_a_step_without_gradients_after_a_step_is_no_error(backend: str) -> None:
    problem = Problem(backend)
    problem.step("phase")
    before = problem.snapshot()
    problem.opt.zero_grad()
    problem.opt.step()
    assert_same(problem.snapshot(), before)


@both_backends
@pytest.mark.parametrize("steps", [0, 1])
def test_a_second_perturb_is_refused_and_the_step_goes_on(backend: str, steps: int) -> None:
    problem, undisturbed = Problem(backend).train(steps), Problem(backend).train(steps + 1)
    problem.perturb()
    there = weights(problem.params)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"perturb\(\) called twice"):
            problem.opt.perturb()
        assert_same(weights(problem.params), there)
        problem.opt.zero_grad()
        backward(problem.loss(), create_graph=problem.opt.hessian_due)
    problem.opt.step()
    assert_same(problem.snapshot(), undisturbed.snapshot())


# ---------------------------------------------------------------------------------------------------------------------
# Closures

BAD_RESULTS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "nothing": (lambda loss: None, TypeError, "closure must return.*None"),
    "a float": (lambda loss: loss.item(), TypeError, r"closure must return.*\d\.\d"),
    "a tuple": (lambda loss: (loss, loss), TypeError, r"closure must return.*\(tensor"),
    "a vector": (lambda loss: loss.expand(3), ValueError, r"scalar.*\(3,\)"),
    "an empty tensor": (lambda loss: loss.expand(0), ValueError, r"scalar.*\(0,\)"),
    "a detached loss": (lambda loss: loss.detach(), ValueError, "requires grad"),
}


@both_backends
@pytest.mark.parametrize("bad_pass", [0, 1])
@pytest.mark.parametrize("result", BAD_RESULTS)
def test_a_closure_that_returns_no_loss_is_refused(backend: str, bad_pass: int, result: str) -> None:
    spoil, error, message = BAD_RESULTS[result]
    passes = iter(range(2))
    problem = Problem(backend).train(3)
    with refused(problem, error, message):
        problem.opt.step(lambda: spoil(problem.loss()) if next(passes) == bad_pass else problem.loss())


@pytest.mark.parametrize("closure", [3, "loss", torch.tensor(1.0)])
def test_a_closure_that_cannot_be_called_is_refused(closure: Any) -> None:
    problem = Problem().train(2)
    with refused(problem, TypeError, naming("closure", closure)):
        problem.opt.step(closure)


@both_backends
def test_a_loss_of_one_element_and_any_shape_is_a_scalar(backend: str) -> None:
    problem = Problem(backend)
    for _ in range(4):
        assert problem.opt.step(lambda: problem.loss().reshape(1, 1)).numel() == 1
        problem.steps += 1
    assert_same(problem.snapshot(), undisturbed(Problem, backend, 4))


@both_backends
@pytest.mark.parametrize("dtype", [torch.int64, torch.float16])
def test_what_a_standard_closure_returns_may_have_any_dtype(backend: str, dtype: torch.dtype) -> None:
    problem = Problem(backend)

    def closure() -> Tensor:
        loss = problem.loss()
        backward(loss, create_graph=problem.opt.hessian_due)
        return (1000 * loss).to(dtype)

    for _ in range(4):
        assert problem.opt.step(closure).dtype == dtype
        problem.steps += 1
    assert_same(problem.snapshot(), undisturbed(Problem, backend, 4))


NO_GRAPH = r"(?s)create_graph=opt\.hessian_due.*closure"  # the ways out


@both_backends
@pytest.mark.parametrize("steps", [0, 3])
def test_a_closure_that_builds_no_graph_in_a_hessian_step_is_told_the_ways_out(backend: str, steps: int) -> None:
    problem = Problem(backend).train(steps)

    def closure() -> Tensor:
        loss = problem.loss()
        loss.backward()
        return loss

    before = weights(problem.params)
    with pytest.raises(ValueError, match=NO_GRAPH):
        problem.opt.step(closure)
    assert_same(weights(problem.params), before)
    assert_same(problem.train(4, "standard").snapshot(), undisturbed(Problem, backend, steps + 4))


@both_backends
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("heal", ["restore", "step", "state_dict"])
def test_a_backward_that_builds_no_graph_in_a_hessian_step_is_told_the_ways_out_and_healed(
    backend: str, steps: int, heal: str
) -> None:
    problem = Problem(backend).train(steps)
    problem.opt.zero_grad()
    before = weights(problem.params)
    problem.loss().backward()
    problem.opt.perturb()
    problem.loss().backward()
    with pytest.raises(ValueError, match=NO_GRAPH):
        problem.opt.step()
    with suppress(ValueError) if heal == "step" else nullcontext():  # a second step may say it again
        getattr(problem.opt, heal)()
    assert_same(weights(problem.params), before)
    assert_same(problem.train(4, "phase").snapshot(), undisturbed(Problem, backend, steps + 4))


# ---------------------------------------------------------------------------------------------------------------------
# Losses, gradients and products that are not finite


class SpoiledProduct(torch.autograd.Function):
    """x -> 0 with gradient 0, whose own gradient is not finite: a product Hz that is not, while gradients are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.zeros((), dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return SpoiledGradient.apply(*ctx.saved_tensors, gradient)


class SpoiledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, z: Tensor) -> tuple[Tensor, None]:
        product = torch.zeros_like(z)
        product.view(-1)[-1] = NAN
        return product, None


class SpoiledElement(torch.autograd.Function):
    """x -> 0 with gradient 0 but for one element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: float) -> Tensor:
        ctx.value, ctx.like = value, x
        return torch.zeros((), dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        gradient = torch.zeros_like(ctx.like)
        gradient.view(-1)[-1] = ctx.value
        return gradient, None


SPOILERS: dict[str, Callable[[Problem, Tensor], Tensor]] = {
    "loss and gradients NaN": lambda problem, loss: loss * NAN,
    "loss alone NaN": lambda problem, loss: loss + NAN,
    "loss alone inf": lambda problem, loss: loss + INF,
    "one NaN in the last gradient": lambda problem, loss: loss + SpoiledElement.apply(problem.params[-1], NAN),
    "one -inf in the first gradient": lambda problem, loss: loss + SpoiledElement.apply(problem.params[0], -INF),
    "one NaN in the last product": lambda problem, loss: loss + SpoiledProduct.apply(problem.params[-1]),
    "one NaN in the first product": lambda problem, loss: loss + SpoiledProduct.apply(problem.params[0]),
}


class Mixed(Problem):
    """Parameters of three dtypes in two groups: four buckets."""

    def __init__(self, backend: str) -> None:
        super().__init__(backend, hessian_samples=2)
        self.double = nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
        self.bfloat = nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.bfloat16))
        self.opt.add_param_group({"params": [self.double, self.bfloat], "weight_decay": 0.1})
        self.params += [self.double, self.bfloat]

    def loss(self) -> Tensor:
        return super().loss() + (self.double**4).mean().float() + (self.bfloat**2).mean().float()


class Alone(Problem):
    """All parameters in one group: one bucket, for which the operators measure and check by themselves."""

    def __init__(self, backend: str) -> None:
        super().__init__(backend)
        self.opt = Sassha(self.params, lr=0.05, hessian_interval=3, backend=backend)


CASES = [
    (kind, spoiler, style, steps, bad_pass)
    for kind in (Mixed, Alone)
    for spoiler in SPOILERS
    for style in ("closure", "phase")
    for steps in (0, 1, 3)
    for bad_pass in (0, 1)
    # In phase style the optimizer does not see the loss; products are taken in the second pass of Hessian steps.
    if not (spoiler.startswith("loss alone") and style == "phase")
    and not (spoiler.endswith("product") and (bad_pass == 0 or steps == 1))
]


@both_backends
@pytest.mark.parametrize("kind, spoiler, style, steps, bad_pass", CASES)
def test_a_step_that_is_not_finite_leaves_no_trace(
    backend: str, kind: type[Problem], spoiler: str, style: str, steps: int, bad_pass: int
) -> None:
    problem = kind(backend).train(steps, style)
    before, after = (undisturbed(kind, backend, count) for count in (steps, steps + 4))
    passes = iter(range(2))

    def loss() -> Tensor:
        value = problem.loss()
        return SPOILERS[spoiler](problem, value) if next(passes) == bad_pass else value

    STYLES[style](problem.opt, loss)
    assert next(passes, None) is None
    assert not problem.opt.perturbed
    assert_same(weights(problem.params), before["weights"])
    assert problem.opt.skipped_steps == 1
    assert problem.opt.hessian_due == (steps % 3 == 0)
    if steps:
        assert_same(problem.snapshot()["state"], before["state"])
    result = problem.train(4, style).snapshot()
    for group in result["param_groups"]:
        assert group.pop("skipped_steps") == 1
    assert_same(result, without_skips(after))


@both_backends
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("kind", [Mixed, Alone])
def test_a_learning_rate_tensor_that_is_not_finite_skips_the_step(
    backend: str, kind: type[Problem], value: float
) -> None:
    problem = kind(backend).train(1)
    good, before = problem.opt.param_groups[-1]["lr"], weights(problem.params)
    problem.opt.param_groups[-1]["lr"] = torch.tensor([value])
    problem.step()
    assert_same(weights(problem.params), before)
    assert problem.opt.skipped_steps == 1
    problem.opt.param_groups[-1]["lr"] = good
    problem.step()
    assert problem.opt.skipped_steps == 1


def without_skips(snapshot: dict[str, Any]) -> dict[str, Any]:
    groups = [{k: v for k, v in group.items() if k != "skipped_steps"} for group in snapshot["param_groups"]]
    return {**snapshot, "param_groups": groups}


@both_backends
@pytest.mark.parametrize("adaptive", [False, True])
def test_skipped_steps_are_counted_one_by_one(backend: str, adaptive: bool) -> None:
    problem = Problem(backend, adaptive=adaptive).train(2)
    before = problem.snapshot()
    for count in range(1, 6):
        problem.opt.step(lambda: problem.loss() * NAN)
        assert problem.opt.skipped_steps == count
    assert_same(problem.snapshot()["state"], before["state"])
    assert_same(weights(problem.params), before["weights"])


@both_backends
def test_a_skip_without_perturb_leaves_no_trace(backend: str) -> None:
    problem = Problem(backend).train(2)
    before = problem.snapshot()
    problem.opt.zero_grad()
    (problem.loss() * NAN).backward()
    problem.opt.step()
    assert_same(weights(problem.params), before["weights"])
    assert problem.opt.skipped_steps == 1
    assert_same(problem.snapshot()["state"], before["state"])


@both_backends
def test_a_skip_after_an_early_restore_leaves_no_trace(backend: str) -> None:
    problem = Problem(backend).train(3)
    before = problem.snapshot()
    problem.perturb()
    backward(problem.loss() + SpoiledProduct.apply(problem.params[1]), create_graph=True)
    problem.opt.restore()
    problem.opt.step()
    assert_same(weights(problem.params), before["weights"])
    assert problem.opt.skipped_steps == 1
    assert_same(problem.snapshot()["state"], before["state"])


@both_backends
def test_an_overflowing_perturbation_is_skipped(backend: str) -> None:
    w = nn.Parameter(torch.tensor([6e4, 1.0], dtype=torch.float16))
    opt = Sassha([w], rho=1e4, backend=backend)
    before = weights([w])
    opt.step(lambda: (w.float() ** 2).sum())
    assert opt.skipped_steps == 1
    assert_same(weights([w]), before)


@both_backends
def test_a_restart_from_the_state_after_a_skip_goes_on_as_if_it_had_not_been(backend: str) -> None:
    problem, undisturbed = (Problem(backend).train(2) for _ in range(2))
    problem.opt.step(lambda: problem.loss() * NAN)
    other = Problem(backend)
    other.model.load_state_dict(problem.model.state_dict())
    other.opt.load_state_dict(problem.opt.state_dict())
    other.steps = problem.steps
    assert other.opt.skipped_steps == 1
    other.train(4)
    undisturbed.train(4)
    assert_same(weights(other.params), weights(undisturbed.params))
    assert_same(other.snapshot()["state"], undisturbed.snapshot()["state"])


def test_no_warning_is_shown_in_a_skipped_step() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem = Problem()
        problem.opt.step(lambda: problem.loss() * NAN)
    assert problem.opt.skipped_steps == 1
