"""Which parameters take part in a step: those with a gradient in both of its passes, each once."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import AdaHessian, Sassha, SophiaH
from tests.support.problems import (
    BACKENDS,
    STYLES,
    Problem,
    assert_same,
    parameter,
    single_threaded,
    undisturbed,
    weights,
)
from tests.support.reference_family import ReferenceMember

one_thread = pytest.fixture(autouse=True)(single_threaded)
both_backends = pytest.mark.parametrize("backend", BACKENDS)
all_styles = pytest.mark.parametrize("style", STYLES)


@both_backends
@all_styles
@pytest.mark.parametrize("present", [0, 1])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("groups", [[[0, 1]], [[0], [1]], [[0, 1], [2]], [[2], [0, 1]]], ids=str)
def test_a_parameter_with_a_gradient_in_one_pass_only_is_untouched(
    backend: str, style: str, present: int, steps: int, groups: list[list[int]]
) -> None:
    params = [parameter(1.0, 2.0), parameter(3.0, 4.0), parameter(5.0)]
    chosen = [{"params": [params[i] for i in group]} for group in groups]
    opt = Sassha(chosen, hessian_interval=3, backend=backend)

    def one() -> Tensor:
        return (params[0] ** 3).sum() + (params[2] ** 3).sum()

    def both() -> Tensor:
        return one() + (params[1] ** 3).sum()

    for _ in range(steps):
        STYLES[style](opt, both)
    before = [*weights(params), *(value.clone() for value in opt.state[params[1]].values())]
    passes = iter(range(2))
    STYLES[style](opt, lambda: both() if next(passes) == present else one())
    assert not torch.equal(params[0], before[0])
    assert_same(params[1].detach(), before[1])
    assert [int(opt.state[param].get("step", 0)) for param in params[:2]] == [steps + 1, steps]
    if steps:
        assert_same(list(opt.state[params[1]].values()), before[3:])
    STYLES[style](opt, both)
    assert [int(opt.state[param]["step"]) for param in params[:2]] == [steps + 2, steps + 1]


@both_backends
@pytest.mark.parametrize("style", ["closure", "phase"])
@pytest.mark.parametrize("empty_pass", [0, 1])
def test_a_pass_without_any_gradient_is_no_step(backend: str, style: str, empty_pass: int) -> None:
    problem = Problem(backend).train(2)
    before = problem.snapshot()
    passes = iter(range(2))

    def loss() -> Tensor:
        return torch.ones((), requires_grad=True) * 1 if next(passes) == empty_pass else problem.loss()

    # Where the first pass gives no gradient, a closure's step ends there; a hand-written loop has moved nothing.
    lacks = r"without perturb\(\)" if empty_pass == 0 else "no parameter with a gradient in both passes"
    is_error = (style, empty_pass) != ("closure", 0)
    with pytest.raises(ValueError, match=lacks) if is_error else nullcontext():
        STYLES[style](problem.opt, loss)
    assert_same(problem.snapshot(), before)
    assert not problem.opt.perturbed


@both_backends
@all_styles
def test_a_frozen_parameter_rests_and_goes_on_where_it_stood(backend: str, style: str) -> None:
    problem = Problem(backend).train(2, style)
    frozen = problem.params[2]
    frozen.requires_grad_(False)
    before = [frozen.detach().clone(), {name: value.clone() for name, value in problem.opt.state[frozen].items()}]
    problem.train(3, style)
    assert_same([frozen.detach(), problem.opt.state[frozen]], before)
    frozen.requires_grad_(True)
    problem.train(3, style)
    assert int(problem.opt.state[frozen]["step"]) == 5
    assert int(problem.opt.state[problem.params[0]]["step"]) == 8


@both_backends
@all_styles
def test_everything_may_be_frozen(backend: str, style: str) -> None:
    problem = Problem(backend).train(1)
    before = problem.snapshot()
    problem.model.requires_grad_(False)
    outside = torch.ones((), requires_grad=True)
    STYLES[style](problem.opt, lambda: problem.loss() * outside)
    assert_same(problem.snapshot(), before)


@both_backends
def test_a_graph_that_is_gone_is_an_error_and_no_step(backend: str) -> None:
    problem = Problem(backend).train(1)
    before = problem.snapshot()
    once = problem.loss()
    with pytest.raises(RuntimeError, match="a second time"):
        problem.opt.step(lambda: once)
    assert_same(problem.snapshot(), before)


@both_backends
def test_backward_reaches_parameters_of_others_where_all_of_ours_are_frozen(backend: str) -> None:
    problem = Problem(backend)
    problem.model.requires_grad_(False)
    outside = torch.ones((), requires_grad=True)
    problem.opt.step(lambda: outside**2)
    assert outside.grad == 2


@both_backends
@all_styles
def test_a_parameter_listed_twice_is_stepped_once(backend: str, style: str) -> None:
    once, twice = parameter(1.0, 2.0), parameter(1.0, 2.0)
    opts = [Sassha([once], backend=backend)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opts.append(Sassha([twice, twice], backend=backend))
    for _ in range(4):
        for opt, w in zip(opts, (once, twice)):
            STYLES[style](opt, lambda: (w**3).sum())
    assert_same(twice.detach(), once.detach())
    assert int(opts[1].state[twice]["step"]) == 4


@both_backends
def test_tied_weights_are_one_parameter(backend: str) -> None:
    table, head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    head.weight = table.weight
    model = nn.Sequential(table, nn.Tanh(), head)
    opt = Sassha(model.parameters(), hessian_interval=2, backend=backend)
    words = torch.tensor([0, 1, 2, 3])
    losses = [opt.step(lambda: nn.functional.cross_entropy(model(words), words + 1)).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert len(opt.state) == 1
    assert head.weight is table.weight


@both_backends
@all_styles
def test_zero_dimensional_and_empty_parameters_take_part(backend: str, style: str) -> None:
    scalar, empty, vector = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.empty(0, 3)), parameter(2.0, 2.0)
    opt = Sassha([scalar, empty, vector], rho=0.0, hessian_interval=2, backend=backend)
    for _ in range(4):
        STYLES[style](opt, lambda: scalar**4 + (empty**2).sum() + (vector**4).sum())
    assert [int(state["step"]) for state in opt.state.values()] == [4, 4, 4]
    assert scalar.shape == () and scalar < 2
    assert_same(vector.detach(), scalar.detach().expand(2))


@both_backends
def test_only_empty_parameters_make_a_step_that_does_nothing(backend: str) -> None:
    empty = nn.Parameter(torch.empty(0))
    opt = Sassha([empty], backend=backend)
    for _ in range(3):
        opt.step(lambda: empty.sum() * 2)
    assert opt.skipped_steps == 0
    assert int(opt.state[empty]["step"]) == 3


@both_backends
def test_a_group_without_parameters_is_no_hindrance(backend: str) -> None:
    problem = Problem(backend)
    problem.opt.add_param_group({"params": []})
    assert_same(problem.train(4).snapshot()["weights"], undisturbed(Problem, backend, 4)["weights"])


@pytest.mark.parametrize("by_hand", [False, True], ids=["hessian_pass", "create_graph"])
@pytest.mark.parametrize("kind", [AdaHessian, SophiaH], ids=lambda kind: kind.__name__)
def test_a_gradient_cleared_in_place_that_no_backward_reaches_is_0_and_so_is_its_hessian(
    kind: type[AdaHessian] | type[SophiaH], by_hand: bool
) -> None:
    first, second = torch.rand(2, 2, 3, dtype=torch.float64) + 0.5
    params, others = ([nn.Parameter(first.clone()), nn.Parameter(second.clone())] for _ in range(2))
    opt = kind(params, lr=0.01, hessian_interval=2)
    reference = ReferenceMember(others, kind.__name__, lr=0.01, hessian_interval=2)
    for uses in (True, True, False, False, True):  # Hessian steps are the first, the third and the last
        opt.zero_grad(set_to_none=False)
        loss = sum((param**3).sum() for param in (params if uses else params[:1]))
        if by_hand:
            loss.backward(create_graph=opt.hessian_due)
        else:
            with opt.hessian_pass():
                loss.backward()
        opt.step()
        reference.step(lambda: (others[0] ** 3).sum() + (others[1] ** 3 if uses else 0 * others[1]).sum())
    for param, other in zip(params, others, strict=True):
        # A few roundings of each of five steps.
        torch.testing.assert_close(param.detach(), other.detach(), rtol=1e-13, atol=0)
        for name, expected in reference.state[other].items():
            torch.testing.assert_close(
                torch.as_tensor(opt.state[param][name], dtype=torch.float64),
                torch.as_tensor(expected, dtype=torch.float64),
                rtol=1e-13,
                atol=0,
            )
