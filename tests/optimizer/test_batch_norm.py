"""Defect 14: running statistics follow the first pass of each step, and only that."""

import copy
import gc
import io
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sassha_fused import Sassha, running_stats_once
from sassha_fused.bucket import Bucket
from tests.support.problems import BACKENDS, STYLES, assert_same, backward, single_threaded

one_thread = pytest.fixture(autouse=True)(single_threaded)
all_styles = pytest.mark.parametrize("style", STYLES)
INPUTS = torch.randn(8, 6, 3, generator=torch.Generator().manual_seed(0))


def network(norm: Callable[[int], nn.Module] = nn.BatchNorm1d) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), norm(4), nn.Tanh(), nn.Linear(4, 2))


class Recorder:
    """The statistics that one training forward per batch, at the weights of the first pass, would have left."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.expected = copy.deepcopy(model)

    def forward_once(self, inputs: Tensor) -> None:
        with torch.no_grad():
            for mine, theirs in zip(self.expected.parameters(), self.model.parameters(), strict=True):
                mine.copy_(theirs)
            self.expected(inputs)

    def check(self) -> None:
        assert_same(dict(self.model.named_buffers()), dict(self.expected.named_buffers()))


@all_styles
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("calls", [1, 2])
def test_14_running_statistics_see_each_batch_once(style: str, backend: str, calls: int) -> None:
    model = network()
    opt = Sassha(model.parameters(), hessian_interval=3, backend=backend)
    recorder = Recorder(model)
    for _ in range(calls):  # a second call changes nothing more
        running_stats_once(model, opt)
    for inputs in INPUTS:
        recorder.forward_once(inputs)
        STYLES[style](opt, lambda: model(inputs).square().mean())
        recorder.check()


def test_without_the_helper_they_see_it_twice() -> None:
    model = network()
    opt = Sassha(model.parameters())
    opt.step(lambda: model(INPUTS[0]).square().mean())
    assert int(model[1].num_batches_tracked) == 2


@all_styles
def test_the_helper_does_not_change_what_is_computed(style: str) -> None:
    models = [network(), network()]
    opts = [Sassha(model.parameters(), hessian_interval=3) for model in models]
    running_stats_once(models[0], opts[0])
    for inputs in INPUTS:
        losses = [STYLES[style](opt, lambda: m(inputs).square().mean()) for opt, m in zip(opts, models)]
        assert_same(losses[0], losses[1])
    assert_same(dict(models[0].named_parameters()), dict(models[1].named_parameters()))


def test_remove_and_the_end_of_a_with_block_take_the_hooks_off() -> None:
    model = network()
    opt = Sassha(model.parameters())
    counts = []

    def step() -> None:
        opt.step(lambda: model(INPUTS[0]).square().mean())
        counts.append(int(model[1].num_batches_tracked))

    with running_stats_once(model, opt):
        step()
    step()
    handle = running_stats_once(model, opt)
    step()
    handle.remove()
    handle.remove()
    step()
    assert counts == [1, 3, 4, 6]
    assert not model[1]._forward_hooks and not model[1]._forward_pre_hooks


def test_removing_one_of_two_handles_leaves_the_other_at_work() -> None:
    model = network()
    opt = Sassha(model.parameters())
    running_stats_once(model, opt)
    running_stats_once(model, opt).remove()
    opt.step(lambda: model(INPUTS[0]).square().mean())
    assert int(model[1].num_batches_tracked) == 1


def test_a_forward_pass_that_raises_at_the_perturbed_weights_leaves_the_statistics_tracked() -> None:
    model = network()
    opt = Sassha(model.parameters())
    running_stats_once(model, opt)
    opt.step(lambda: model(INPUTS[0]).square().mean())
    passes = iter(range(2))
    with pytest.raises((RuntimeError, ValueError)):
        opt.step(lambda: model(INPUTS[1] if next(passes) == 0 else torch.zeros(1, 2, 3, 4)).square().mean())
    with pytest.raises(ValueError, match="more than 1 value"):  # raised inside batch norm itself
        passes = iter(range(2))
        opt.step(lambda: model(INPUTS[1] if next(passes) == 0 else INPUTS[1][:1]).square().mean())
    assert model[1].track_running_stats
    before = int(model[1].num_batches_tracked)
    model(INPUTS[0])
    assert int(model[1].num_batches_tracked) == before + 1


def test_evaluation_mode_is_left_as_it_is() -> None:
    model = network()
    opt = Sassha(model.parameters())
    running_stats_once(model, opt)
    opt.step(lambda: model(INPUTS[0]).square().mean())
    model.eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    perturbed = []

    def loss() -> Tensor:
        perturbed.append(model(INPUTS[1]).detach())
        return model(INPUTS[1]).square().mean()

    opt.step(loss)
    assert_same(dict(model.named_buffers()), before)
    assert not torch.equal(*perturbed)
    plain = nn.functional.batch_norm(torch.ones(2, 4), before["1.running_mean"], before["1.running_var"])
    model[1].weight.data.fill_(1.0)
    model[1].bias.data.fill_(0.0)
    torch.testing.assert_close(model[1](torch.ones(2, 4)), plain)


def test_a_forward_at_restored_weights_counts_again() -> None:
    model = network()
    opt = Sassha(model.parameters())
    running_stats_once(model, opt)
    model(INPUTS[0]).square().mean().backward()
    opt.perturb()
    backward(model(INPUTS[0]).square().mean(), create_graph=True)
    opt.restore()
    model(INPUTS[1])
    assert int(model[1].num_batches_tracked) == 2


@pytest.mark.parametrize(
    "norm",
    [
        lambda n: nn.BatchNorm1d(n, momentum=None),
        lambda n: nn.BatchNorm1d(n, track_running_stats=False),
        lambda n: nn.BatchNorm1d(n, affine=False),
        lambda n: nn.Sequential(nn.Unflatten(1, (n, 1, 1)), nn.BatchNorm2d(n), nn.Flatten()),
        lambda n: nn.Sequential(nn.Unflatten(1, (n, 1, 1, 1)), nn.BatchNorm3d(n), nn.Flatten()),
    ],
    ids=["cumulative", "untracked", "no affine", "2d", "3d"],
)
def test_every_kind_of_batch_norm_is_served(norm: Callable[[int], nn.Module]) -> None:
    model = network(norm)
    opt = Sassha(model.parameters(), hessian_interval=3)
    recorder = Recorder(model)
    running_stats_once(model, opt)
    for inputs in INPUTS[:4]:
        recorder.forward_once(inputs)
        opt.step(lambda: model(inputs).square().mean())
        recorder.check()


@all_styles
@pytest.mark.parametrize("bad_pass", [0, 1])
def test_a_step_that_is_not_finite_leaves_no_nan_in_the_statistics(style: str, bad_pass: int) -> None:
    # The first norm is not finite, and w' = w; or the second pass is not, whose statistics are not taken.
    model = network()
    opt = Sassha(model.parameters(), hessian_interval=3)
    running_stats_once(model, opt)
    recorder = Recorder(model)
    passes = iter(range(2))
    recorder.forward_once(INPUTS[0])
    before = [param.detach().clone() for param in model.parameters()]
    STYLES[style](opt, lambda: model(INPUTS[0]).square().mean() * (torch.inf if next(passes) == bad_pass else 1.0))
    assert opt.skipped_steps == 1
    assert_same([param.detach() for param in model.parameters()], before)
    recorder.check()
    for inputs in INPUTS[1:3]:
        recorder.forward_once(inputs)
        STYLES[style](opt, lambda: model(inputs).square().mean())
        recorder.check()


@pytest.mark.parametrize("style", ["closure", "standard"])
def test_without_the_helper_a_step_that_is_not_finite_leaves_no_nan_either(style: str) -> None:
    model = network()
    opt = Sassha(model.parameters())
    STYLES[style](opt, lambda: model(INPUTS[0]).square().mean() * torch.inf)
    assert opt.skipped_steps == 1
    assert all(buffer.isfinite().all() for buffer in model.buffers())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_one_pass_counts_that_one(backend: str) -> None:
    model = network()
    opt = Sassha(model.parameters(), rho=0.0, hessian_interval=3, backend=backend)
    recorder = Recorder(model)
    running_stats_once(model, opt)
    for inputs in INPUTS:
        recorder.forward_once(inputs)
        opt.step(lambda: model(inputs).square().mean())
        recorder.check()


def through_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def averaged(model: nn.Module) -> nn.Module:
    module: nn.Module = torch.optim.swa_utils.AveragedModel(model).module
    return module


@pytest.mark.parametrize("copied", [copy.deepcopy, through_torch, averaged])
def test_copies_of_the_model_contain_nothing_of_the_optimizer(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = network()
    opt = Sassha(model.parameters())
    running_stats_once(model, opt)
    opt.step(lambda: model(INPUTS[0]).square().mean())
    before = weakref.WeakSet(found for found in gc.get_objects() if type(found) in (Sassha, Bucket))
    model(INPUTS[1]).square().mean().backward()
    opt.perturb()
    twin = copied(model)
    assert all(found in before for found in gc.get_objects() if type(found) in (Sassha, Bucket)), (
        "the copy has an optimizer of its own"
    )
    assert opt.perturbed  # copying the model does not ask the optimizer for its state
    counted = int(twin[1].num_batches_tracked)
    twin(INPUTS[2])  # the copy is in no second pass
    assert int(twin[1].num_batches_tracked) == counted + 1
    assert twin[1].track_running_stats


def test_the_model_does_not_keep_the_optimizer_alive() -> None:
    model = network()
    opt = Sassha(model.parameters())
    running_stats_once(model, opt)
    opt.step(lambda: model(INPUTS[0]).square().mean())
    dead, buckets = weakref.ref(opt), [weakref.ref(bucket) for bucket in opt._run.flat.buckets]
    opt.zero_grad()
    del opt
    assert dead() is None and [bucket() for bucket in buckets] == [None]
    before = int(model[1].num_batches_tracked)
    model(INPUTS[1])
    assert int(model[1].num_batches_tracked) == before + 1


class TwoPasses:
    """Somebody else's optimizer."""

    perturbed = False


class PassesAtPerturbed(TwoPasses):
    """One whose only pass is at w'."""

    perturbed = True
    second_pass = False


def test_another_optimizer_is_asked_whether_its_batch_comes_a_second_time() -> None:
    model, other = network(), TwoPasses()
    running_stats_once(model, other)
    for perturbed, expected in ((False, 1), (True, 1), (False, 2)):
        other.perturbed = perturbed
        model(INPUTS[0])
        assert int(model[1].num_batches_tracked) == expected
    model, other = network(), PassesAtPerturbed()
    running_stats_once(model, other)
    model(INPUTS[0])
    assert int(model[1].num_batches_tracked) == 1
