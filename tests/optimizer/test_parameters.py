"""Parameters: those that are refused, and the kinds, dtypes and layouts of those that train."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import Sassha
from tests.support.problems import (
    BACKENDS,
    STYLES,
    Problem,
    assert_same,
    backward,
    parameter,
    refused,
    single_threaded,
    undisturbed,
    weights,
)

one_thread = pytest.fixture(autouse=True)(single_threaded)
both_backends = pytest.mark.parametrize("backend", BACKENDS)
all_styles = pytest.mark.parametrize("style", STYLES)


# ---------------------------------------------------------------------------------------------------------------------
# Refused


def test_no_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        Sassha([])


def test_a_single_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="iterable"):
        Sassha(parameter(1.0))


BAD_PARAMETERS = {
    "complex": (lambda: nn.Parameter(torch.ones(2, dtype=torch.complex64)), r"complex.*torch\.complex64"),
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


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_frozen_parameters_may_have_any_dtype(dtype: torch.dtype) -> None:
    problem = Problem()
    frozen = [torch.ones(2).to(dtype) for _ in range(2)]
    problem.opt.add_param_group({"params": [frozen[0]]})
    problem.opt.add_param_group({"params": [nn.Parameter(frozen[1], requires_grad=False)]})
    assert_same(weights(problem.train(4).params), undisturbed(Problem, "cpu", 4)["weights"])
    assert_same(frozen, [torch.ones(2).to(dtype)] * 2)
    assert len(problem.opt.state) == len(problem.params)


def test_a_parameter_in_two_groups_is_refused() -> None:
    problem = Problem().train(2)
    with refused(problem, ValueError, "more than one parameter group"):
        problem.opt.add_param_group({"params": [problem.params[0]]})


# ---------------------------------------------------------------------------------------------------------------------
# Dtypes and layouts


@both_backends
@all_styles
def test_parameters_of_several_dtypes_train_together(backend: str, style: str) -> None:
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    params = [parameter(1.0, -2.0, 3.0, dtype=dtype) for dtype in dtypes]
    opt = Sassha(params, lr=0.01, hessian_interval=2, hessian_samples=2, backend=backend)
    for _ in range(5):
        STYLES[style](opt, lambda: sum((p.double() ** 4).sum() for p in params))
    assert opt.skipped_steps == 0
    for param in params[1:]:
        state = opt.state[param]
        assert (state["exp_avg"].dtype, state["exp_hessian"].dtype) == (torch.float32, torch.float32)
        # Each step rounds the weights once, by half an eps, and not always to the same side.
        torch.testing.assert_close(param.double(), params[0], rtol=2 * torch.finfo(param.dtype).eps, atol=0)
    assert opt.state[params[0]]["exp_avg"].dtype == torch.float64


@both_backends
def test_the_default_dtype_has_no_influence(backend: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        snapshot = Problem(backend, hessian_samples=2).train(4).snapshot()
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(snapshot["state"], Problem(backend, hessian_samples=2).train(4).snapshot()["state"])


def convolution(backend: str, memory_format: torch.memory_format) -> tuple[nn.Module, Sassha, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3)).double().to(memory_format=memory_format)
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    opt = Sassha(model.parameters(), lr=0.01, hessian_interval=2, backend=backend)
    return model, opt, lambda: model(images).square().mean()


@both_backends
@all_styles
def test_channels_last_takes_the_same_steps_but_for_the_signs(backend: str, style: str) -> None:
    # Without the Hessian's random signs (their order is that of memory) both layouts compute the same numbers.
    runs = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model, opt, loss = convolution(backend, memory_format)
        opt.param_groups[0].update(betas=(0.9, 0.0), hessian_power=1e-9)
        for _ in range(5):
            STYLES[style](opt, loss)
        assert all(opt.state[p]["exp_avg"].stride() == p.stride() for p in model.parameters())
        assert model[2].weight.is_contiguous(memory_format=memory_format)
        runs.append(weights(model.parameters()))
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-9)


@both_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_converted_before_the_first_step_is_as_if_made_so(backend: str, dtype: torch.dtype) -> None:
    converted = Problem(backend)
    converted.model.to(dtype)
    converted.inputs, converted.targets = converted.inputs.to(dtype), converted.targets.to(dtype)
    assert_same(converted.train(4).snapshot(), Problem(backend, dtype=dtype).train(4).snapshot())


@both_backends
@all_styles
def test_a_model_converted_between_steps_keeps_its_state(backend: str, style: str) -> None:
    problem, single = Problem(backend).train(2), Problem(backend).train(4)
    problem.model.double()
    problem.inputs, problem.targets = problem.inputs.double(), problem.targets.double()
    problem.train(2, style)
    for param, other in zip(problem.params, single.params):
        state, other_state = problem.opt.state[param], single.opt.state[other]
        assert param.dtype == state["exp_avg"].dtype == torch.float64
        assert int(state["step"]) == 4
        assert_same(state["hessian_step"], other_state["hessian_step"])
        torch.testing.assert_close(param.float(), other, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(state["exp_hessian"].float(), other_state["exp_hessian"])


@both_backends
def test_a_part_of_a_model_may_be_converted_between_steps(backend: str) -> None:
    params = [parameter(1.0, -2.0, dtype=torch.bfloat16), parameter(0.1, 0.2, dtype=torch.bfloat16)]
    opt = Sassha(params, lr=0.01, backend=backend)

    def loss() -> Tensor:
        return sum((p.double() ** 4).sum() for p in params)

    opt.step(loss)
    params[1].data = params[1].data.double() + 1e-9  # what bfloat16 cannot hold
    before = weights(params)
    opt.zero_grad()
    loss().backward()
    opt.perturb()
    opt.restore()
    assert_same(weights(params), before)
    opt.step(loss)
    assert [int(opt.state[param]["step"]) for param in params] == [2, 2]
    assert opt.state[params[1]]["exp_avg"].dtype == torch.float64


@both_backends
@pytest.mark.parametrize("perturbed", [True, False])
def test_a_part_of_a_model_may_be_converted_while_the_rest_is_frozen(backend: str, perturbed: bool) -> None:
    large, small = parameter(*range(1, 9), dtype=torch.float32), parameter(1.0, 2.0, dtype=torch.float32)
    opt = Sassha([large, small], lr=0.01, rho=0.2 if perturbed else 0.0, backend=backend)

    def loss() -> Tensor:
        return (large**4).sum() + (small**4).sum()

    opt.step(loss)
    large.requires_grad_(False)
    small.data = small.data.double() + 1e-12
    before = weights([small])
    for steps in (2, 3):
        opt.zero_grad()
        backward(loss(), create_graph=opt.hessian_due)
        if perturbed:
            opt.perturb()
            backward(loss(), create_graph=opt.hessian_due)
            opt.restore()
            assert_same(weights([small]), before)
        opt.step()
        assert int(opt.state[small]["step"]) == steps
        assert opt.state[small]["exp_avg"].dtype == torch.float64
        before = weights([small])


@both_backends
@pytest.mark.parametrize("part", [slice(None), slice(0, 1)], ids=["all", "largest"])
def test_a_model_or_part_of_it_may_change_its_memory_format_between_steps(backend: str, part: slice) -> None:
    moved_model, moved, moved_loss = convolution(backend, torch.contiguous_format)
    model, opt, loss = convolution(backend, torch.contiguous_format)
    opt.step(loss)
    moved.step(moved_loss)
    moved_model[part].to(memory_format=torch.channels_last)
    opt.step(loss)  # a lazy step, which needs no signs
    moved.step(moved_loss)
    for param, other in zip(moved_model.parameters(), model.parameters()):
        torch.testing.assert_close(param, other, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(moved.state[param]["exp_avg"], opt.state[other]["exp_avg"], rtol=1e-9, atol=1e-12)


@both_backends
def test_other_numbers_put_into_param_data_are_taken_over(backend: str) -> None:
    problem, other = Problem(backend).train(2), Problem(backend).train(2)
    for param, same in zip(problem.params, other.params):
        param.data = torch.full_like(param, 0.1)
        same.detach().fill_(0.1)
    assert_same(problem.train(2).snapshot(), other.train(2).snapshot())
