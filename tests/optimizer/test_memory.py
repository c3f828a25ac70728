"""What stays in memory after a step: 12 bytes per float32 parameter, and nothing of the step itself."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import Sassha
from sassha_fused.curvature import exact
from tests.support.memory import allocated
from tests.support.problems import BACKENDS, STYLES, Problem, backward, single_threaded

one_thread = pytest.fixture(autouse=True)(single_threaded)
both_backends = pytest.mark.parametrize("backend", BACKENDS)
all_styles = pytest.mark.parametrize("style", STYLES)
HESSIAN_AND_LAZY = pytest.mark.parametrize("steps", [0, 1], ids=["Hessian step", "lazy step"])


@pytest.fixture(autouse=True)
def no_cycle_is_collected() -> Iterator[None]:
    """Whatever only the garbage collector would free stays, and shows."""
    gc.disable()
    yield
    gc.enable()


def test_the_measure_sees_what_is_kept_and_what_is_freed() -> None:
    kept = []

    def action() -> None:
        torch.zeros(1000)
        kept.append(torch.zeros(500))

    assert allocated(action) == (2000, 4000)


# ---------------------------------------------------------------------------------------------------------------------
# Nothing of a step outlives it


class Tracked:
    """Something that a closure holds on to."""


@both_backends
@all_styles
@HESSIAN_AND_LAZY
def test_closure_loss_and_graph_die_with_the_step(backend: str, style: str, steps: int) -> None:
    problem = Problem(backend).train(steps, style)
    alive: list[weakref.ref[Any]] = []

    def step() -> None:
        tracked = Tracked()

        def loss() -> Tensor:
            assert tracked
            inputs = problem.inputs[0].clone()  # saved by the graph
            hidden = problem.model(inputs)
            value = (hidden * hidden.clone()).mean()
            alive.extend(weakref.ref(thing) for thing in (inputs, hidden, value))
            return value

        alive.extend((weakref.ref(tracked), weakref.ref(loss)))
        STYLES[style](problem.opt, loss)

    step()
    assert len(alive) == 8
    assert sum(ref() is not None for ref in alive) == 0


@both_backends
@all_styles
@HESSIAN_AND_LAZY
def test_no_gradient_keeps_a_graph(backend: str, style: str, steps: int) -> None:
    problem = Problem(backend).train(steps + 1, style)
    for param in problem.params:
        assert param.grad is None or (param.grad.grad_fn is None and not param.grad.requires_grad)


@both_backends
@all_styles
@HESSIAN_AND_LAZY
def test_gradients_die_with_zero_grad(backend: str, style: str, steps: int) -> None:
    problem = Problem(backend).train(steps + 1, style)
    alive = [weakref.ref(param.grad) for param in problem.params if param.grad is not None]
    assert len(alive) == 4
    problem.opt.zero_grad()
    assert sum(ref() is not None for ref in alive) == 0


@both_backends
@all_styles
@pytest.mark.parametrize("samples", [1, 3])
def test_probes_and_products_die_with_the_step(backend: str, style: str, samples: int) -> None:
    problem = Problem(backend, hessian_samples=samples)
    alive: list[weakref.ref[Tensor]] = []

    def products(*args: Any) -> Any:
        found = exact.autograd_products(*args)
        alive.extend(weakref.ref(tensor) for tensor in (*args[1], *args[2], *found))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(exact.SOURCES, "autograd", exact.HessianSource(products, needs_graph=True))
        problem.step(style)
    problem.opt.zero_grad()
    assert len(alive) == 12 * samples
    assert sum(ref() is not None for ref in alive) == 0


@all_styles
def test_parameters_carry_no_hooks_after_a_step(style: str) -> None:
    problem = Problem().train(4, style)
    assert [len(param._backward_hooks or {}) for param in problem.params] == [0, 0, 0, 0]


@pytest.mark.parametrize("ending", ["restore", "state_dict", "perturb again", "closure"])
def test_parameters_carry_no_hooks_after_a_step_that_was_given_up(ending: str) -> None:
    problem = Problem()
    for _ in range(3):
        problem.perturb()
        if ending == "state_dict":
            problem.opt.state_dict()
        elif ending == "closure":
            with pytest.raises(KeyError):
                problem.opt.step(lambda: {}["no loss"])
        else:
            problem.opt.restore()
    if ending == "perturb again":
        problem.train(4, "phase")
    assert [len(param._backward_hooks or {}) for param in problem.params] == [0, 0, 0, 0]


@all_styles
def test_a_gradient_of_the_second_pass_alone_keeps_no_graph_either(style: str) -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = Sassha([first, second])
    alive: list[weakref.ref[Tensor]] = []
    passes = iter(range(2))

    def loss() -> Tensor:
        value = (first**3).sum()
        if next(passes) == 1:
            saved = second.exp()
            alive.append(weakref.ref(saved))
            value = value + saved.square().sum()
        return value

    STYLES[style](opt, loss)
    assert len(alive) == 1
    assert second.grad is None or not second.grad.requires_grad
    assert alive[0]() is None


@all_styles
def test_a_lazy_gradient_keeps_no_graph_where_its_neighbours_are_linear(style: str) -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(4)]
    opt = Sassha(params, hessian_interval=10)

    def loss(
        joined: bool,
    ) -> Tensor:  # the last parameter joins late, and has a graph built in a lazy step of the others
        value = params[0].sum() + (params[1] ** 3).sum() + params[2].sum()
        return value + (params[3] ** 3).sum() if joined else value

    for joined in (False, True):
        STYLES[style](opt, lambda: loss(joined))
    assert not any(param.grad.requires_grad for param in params)


@all_styles
def test_a_step_that_raises_keeps_nothing(style: str) -> None:
    problem = Problem().train(1, style)
    alive: list[weakref.ref[Tensor]] = []
    passes = iter(range(2))

    def loss() -> Tensor:
        inputs = problem.inputs[0].clone()
        value = problem.model(inputs).square().mean()
        alive.extend((weakref.ref(inputs), weakref.ref(value)))
        if next(passes) == 1:
            raise KeyError
        return value

    try:
        STYLES[style](problem.opt, loss)
    except KeyError as error:
        error.__traceback__ = None
    assert len(alive) == 4
    problem.opt.restore()
    problem.opt.zero_grad()
    assert sum(ref() is not None for ref in alive) == 0


@both_backends
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("at", ["w", "w'", "the end of the second pass"])
def test_an_optimizer_dies_with_its_last_reference_wherever_its_weights_are(backend: str, steps: int, at: str) -> None:
    problem = Problem(backend).train(steps)
    if at != "w":
        problem.perturb()
    if at == "the end of the second pass":
        backward(problem.loss(), create_graph=problem.opt.hessian_due)
    # The flat buffers themselves, not only the views of them.
    buckets = [weakref.ref(bucket) for bucket in problem.opt._run.flat.buckets]
    average = weakref.ref(problem.opt.state[problem.params[0]]["exp_avg"])
    dead = weakref.ref(problem.opt)
    del problem.opt
    assert dead() is None
    assert average() is None
    assert [bucket() for bucket in buckets] == [None]


# ---------------------------------------------------------------------------------------------------------------------
# Bytes

SIZES = (50_000, 10_007, 3)
PADDED = sum(-(-size // 128) * 128 for size in SIZES)
SLACK = 2048  # counts, scalars


def separate(backend: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[list[Tensor], Sassha]:
    params: list[Tensor] = [nn.Parameter(torch.ones(size, dtype=dtype)) for size in SIZES]
    return params, Sassha(params, lr=0.001, hessian_interval=2, backend=backend, **options)


def loss_of(params: list[Tensor]) -> Tensor:
    return torch.stack([(param.double() ** 2).sum() for param in params]).sum()


@both_backends
@pytest.mark.parametrize("style", ["closure", "phase"])
@pytest.mark.parametrize(
    "dtype, bytes_each", [(torch.float32, 12), (torch.float64, 24), (torch.bfloat16, 10), (torch.float16, 10)]
)
def test_beyond_parameters_and_gradients_a_run_keeps_two_averages_and_a_backup(
    backend: str, style: str, dtype: torch.dtype, bytes_each: int
) -> None:
    params, opt = separate(backend, dtype)
    for expected in (bytes_each * PADDED, 0, 0, 0):  # Hessian, lazy, Hessian, lazy

        def step() -> None:
            STYLES[style](opt, lambda: loss_of(params))
            opt.zero_grad()

        left, _ = allocated(step)
        assert abs(left - expected) <= SLACK


class Doubled(torch.autograd.Function):
    """w -> 2 w; its backward, the Hessian product of sum(w^2), holds nothing."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return 2 * w

    @staticmethod
    def backward(ctx: Any, z: Tensor) -> Tensor:
        return 2 * z


@pytest.mark.parametrize("samples, buffers", [(1, 2), (3, 3)])
def test_a_hessian_step_takes_a_probe_and_a_product_more_and_for_several_samples_their_mean(
    samples: int, buffers: int
) -> None:
    params, opt = separate("cpu", hessian_samples=samples)
    opt.step(lambda: loss_of(params))
    opt.step(lambda: loss_of(params))
    opt.zero_grad()
    loss_of(params).backward()
    opt.perturb()
    for param in params:
        param.grad = Doubled.apply(param)
    left, peak = allocated(opt.step)
    assert peak <= buffers * 4 * PADDED + SLACK
    assert left <= SLACK


@both_backends
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("by", ["list", "accumulate"])
def test_a_hessian_step_of_micro_batches_takes_the_memory_of_one_and_one_sum_of_products(
    by: str, samples: int, backend: str
) -> None:
    def peak_of(parts: int) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4)))
        opt = Sassha(model.parameters(), lr=1e-3, hessian_interval=1, hessian_samples=samples, backend=backend)
        closures = [lambda rows=rows: model(rows).square().sum() for rows in torch.randn(parts, 64, 64)]

        def step() -> None:
            opt.zero_grad()
            for closure in closures[:-1] if by == "accumulate" else ():
                opt.accumulate(closure)
            opt.step(closures[-1] if by == "accumulate" else closures)

        step()
        return min(allocated(step)[1] for _ in range(3))  # what others have left may be collected meanwhile

    one, few, many = map(peak_of, (1, 2, 8))
    assert few <= one + 4 * 4 * (64 * 64 + 64) + SLACK
    assert many <= few + SLACK


@both_backends
def test_a_parameter_that_joins_leaves_no_old_buffers_behind(backend: str) -> None:
    late = nn.Parameter(torch.ones(1280))
    runs = []

    def run() -> None:
        params, opt = separate(backend)
        opt.step(lambda: loss_of(params))
        opt.add_param_group({"params": [late]})
        opt.step(lambda: loss_of([*params, late]))
        opt.zero_grad()
        runs.append((params, opt))

    left, _ = allocated(run)
    assert abs(left - 4 * sum(SIZES) - 12 * (PADDED + 1280)) <= SLACK


def test_backward_through_the_graph_is_not_kept_by_a_restore() -> None:
    problem = Problem()
    problem.loss().backward()
    problem.opt.perturb()
    value = problem.loss()
    alive = weakref.ref(value)
    backward(value, create_graph=True)
    del value
    problem.opt.restore()
    assert alive() is None
    assert not any(param.grad.requires_grad for param in problem.params)
