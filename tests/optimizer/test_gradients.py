"""Gradients: the user may change them before a step uses them, and those that do not fit are refused."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from sassha_fused import Sassha
from sassha_fused.checks import check_gradients
from tests.support.problems import (
    BACKENDS,
    STYLES,
    Problem,
    assert_same,
    backward,
    parameter,
    single_threaded,
    undisturbed,
    weights,
)

one_thread = pytest.fixture(autouse=True)(single_threaded)
both_backends = pytest.mark.parametrize("backend", BACKENDS)
all_styles = pytest.mark.parametrize("style", STYLES)


# ---------------------------------------------------------------------------------------------------------------------
# Changed by the user


@both_backends
def test_gradients_can_be_clipped_before_either_pass_is_used(backend: str) -> None:
    problem = Problem(backend).train(1)
    before = weights(problem.params)
    problem.opt.zero_grad()
    problem.loss().backward()
    direction = [param.grad.clone() for param in problem.params]
    clip_grad_norm_(problem.params, 1e-3)
    problem.opt.perturb()
    moved = torch.cat([(param.detach() - w).reshape(-1) for param, w in zip(problem.params, before)])
    flat = torch.cat([g.reshape(-1) for g in direction])
    torch.testing.assert_close(moved, 0.2 * flat / flat.norm(), rtol=1e-6, atol=1e-7)
    averages = [problem.opt.state[param]["exp_avg"].clone() for param in problem.params]
    problem.loss().backward()
    clip_grad_norm_(problem.params, 1e-3)
    clipped = [param.grad.clone() for param in problem.params]
    problem.opt.step()
    for param, average, gradient in zip(problem.params, averages, clipped):
        expected = 0.9 * average + 0.1 * gradient
        torch.testing.assert_close(problem.opt.state[param]["exp_avg"], expected)


@both_backends
def test_clipping_in_a_hessian_step_leaves_the_product_whole(backend: str) -> None:
    clipped, plain = Problem(backend), Problem(backend)
    for problem in (clipped, plain):
        problem.loss().backward()
        problem.opt.perturb()
        backward(problem.loss(), create_graph=True)
        if problem is clipped:
            clip_grad_norm_(problem.params, 1e-3)
        problem.opt.step()
    for a, b in zip(clipped.params, plain.params):
        assert_same(clipped.opt.state[a]["exp_hessian"], plain.opt.state[b]["exp_hessian"])
        assert clipped.opt.state[a]["exp_avg"].norm() < 0.01 * plain.opt.state[b]["exp_avg"].norm()


@both_backends
def test_gradients_may_lie_in_other_strides_than_their_parameters(backend: str) -> None:
    w, plain = (nn.Parameter(torch.arange(12.0).reshape(3, 4) / 10) for _ in range(2))
    opts = [Sassha([p], hessian_interval=100, backend=backend) for p in (w, plain)]
    for t in range(3):
        for opt, p in zip(opts, (w, plain)):
            opt.zero_grad()
            if t == 0:
                opt.step(lambda: (p**3).sum())
                continue
            for phase in (opt.perturb, opt.step):
                p.grad = 3 * p.detach() ** 2
                if p is w:
                    p.grad = p.grad.t().contiguous().t()
                    assert not p.grad.is_contiguous()
                phase()
    assert_same(w.detach(), plain.detach())
    assert_same(opts[0].state[w], opts[1].state[plain])


# ---------------------------------------------------------------------------------------------------------------------
# Refused


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
