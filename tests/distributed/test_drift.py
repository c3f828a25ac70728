"""What would have replicas drift apart, wait for each other in vain, or lose the Hessian's graph, is refused."""

import pytest

from tests.support import mishaps
from tests.support.replicas import difference

pytestmark = pytest.mark.slow


def assert_refused(found, *parts):
    """Every rank gets an error with these parts, and has its weights back at w."""
    for message, moved in found:
        assert all(part in message for part in parts), message
        assert moved == 0


@pytest.mark.parametrize("way", ["by_closure", "by_standard_closure", "by_phases", "by hand", "no_sync"])
def test_a_hessian_step_without_data_parallel_is_refused_by_its_name(two, way):
    found = two.run(mishaps.refusal, mishaps.unknown_module, way, known=False)
    assert_refused(found, "ValueError", "sassha_fused.data_parallel(module, opt)")


@pytest.mark.parametrize("way", ["by_closure", "by_phases"])
def test_a_hessian_step_of_one_pass_without_data_parallel_is_refused_by_its_name(two, way):
    found = two.run(mishaps.refusal, mishaps.unknown_module, way, member="AdaHessian", known=False)
    assert_refused(found, "ValueError", "sassha_fused.data_parallel(module, opt)")


@pytest.mark.parametrize("way", ["closure", "phases"])
@pytest.mark.parametrize("after", [3, 4])  # a Hessian step and a lazy one
def test_a_pass_that_is_all_in_no_sync_is_refused(two, way, after):
    found = two.run(mishaps.refusal, mishaps.whole_pass_in_no_sync, way, after=after)
    assert_refused(found, "the gradient of parameter 0 of group 0", "within no_sync()")


@pytest.mark.parametrize("after", [3, 4])
def test_a_second_pass_that_is_all_in_no_sync_is_refused(two, after):
    found = two.run(mishaps.refusal, mishaps.second_pass_in_no_sync, after=after)
    assert_refused(found, "the gradient of parameter 0 of group 0", "within no_sync()")


@pytest.mark.parametrize("way", ["closure", "phases"])
@pytest.mark.parametrize("after", [3, 4])
def test_a_second_pass_around_the_module_is_refused(two, way, after):
    found = two.run(mishaps.refusal, mishaps.around_the_module, way, after=after)
    assert_refused(found, "call model(x), not model.module(x)")


@pytest.mark.parametrize("after", [3, 4])
def test_a_parameter_that_is_thawed_under_the_module_is_refused(two, after):
    found = two.run(mishaps.refusal, mishaps.thawed_on_the_way, after=after, frozen=True)
    assert_refused(found, "the gradient of parameter 0 of group 1", "was frozen when the module was made")


def test_a_parameter_that_was_thawed_before_data_parallel_is_refused(two):
    found = two.run(mishaps.refusal, mishaps.thawed_too_early, frozen=True, known=False)
    assert_refused(found, "must average all 7 parameters that require grad", "averages 5")


def test_a_parameter_that_the_module_ignores_is_refused(two):
    assert_refused(
        two.run(mishaps.refusal, mishaps.ignored_parameter, known=False), "parameter 0 of group 0", "is ignored by it"
    )


def test_a_parameter_outside_the_modules_is_refused(two):
    assert_refused(two.run(mishaps.refusal, mishaps.parameter_outside), "parameter 0 of group 2", "belongs to none")


def test_a_join_of_uneven_inputs_is_refused(two):
    assert_refused(two.run(mishaps.refusal, mishaps.joined), "ValueError", "join()")


@pytest.mark.parametrize("member", ["MSassha", "AdaHessian"])
def test_a_static_graph_that_would_learn_from_a_hessian_step_is_refused(two, member):
    found = two.run(mishaps.refusal, mishaps.first_step, member=member, ddp={"static_graph": True})
    assert_refused(found, "ValueError", "static_graph=True learns from the first backward")


@pytest.mark.parametrize(
    "options",
    [{"seed": [0, 1]}, {"lr": [0.05, 0.06]}, {"hessian_interval": [3, 4]}, {"betas": [(0.9, 0.9), (0.9, 0.8)]}],
)
def test_ranks_that_disagree_on_a_hyperparameter_are_refused(two, options):
    found = two.run(mishaps.refusal, mishaps.other_options, options)
    ((name, (first, second)),) = options.items()
    assert_refused(found, f"{name} of group 0 must be the same on all ranks, got")
    assert f"got {first!r} on this and {second!r} on rank 1" in found[0][0]


def test_ranks_that_have_taken_other_steps_are_refused(two):
    found = two.run(mishaps.refusal, mishaps.other_steps, known=False)
    assert "steps must be the same on all ranks, got 0 on this and 1 on rank 1" in found[0][0]
    assert "steps must be the same on all ranks, got 1 on this and 0 on rank 0" in found[1][0]


def test_a_module_or_an_optimizer_of_another_kind_is_refused(two):
    found = two.run(mishaps.refusal, mishaps.wrong_module)
    assert_refused(found, "TypeError: module must be a DistributedDataParallel, got Network")
    found = two.run(mishaps.refusal, mishaps.wrong_optimizer)
    assert_refused(found, "TypeError: optimizer must be one of sassha_fused, got SGD")


@pytest.mark.parametrize("way", ["by_closure", "by_phases", "by_list"])
@pytest.mark.parametrize("at", [0, 1], ids=["first pass", "second pass"])
@pytest.mark.parametrize("step", [3, 4], ids=["Hessian step", "lazy step"])
def test_gradients_that_are_not_finite_on_one_rank_skip_the_step_on_all(two, way, at, step):
    at *= 2 if way == "by_list" else 1
    (skipped, moved, first), (other_skipped, other_moved, second) = two.run(mishaps.poisoned, way, step, at, False)
    assert (skipped, moved) == (other_skipped, other_moved) == (1, 0)
    assert difference(first, second) == 0


@pytest.mark.parametrize("at", [0, 1], ids=["first pass", "second pass"])
@pytest.mark.parametrize("step", [3, 4], ids=["Hessian step", "lazy step"])
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(two, at, step):
    (skipped, moved, first), (other_skipped, other_moved, second) = two.run(
        mishaps.poisoned, "by_closure", step, at, True
    )
    assert (skipped, moved) == (other_skipped, other_moved) == (1, 0)
    assert difference(first, second) == 0
