"""Where each of torch's generic tests (its test/test_optim.py) has its like here; each row is held to what there is.

Steps are taken by closure, since those of two passes need one; without a radius (rho = 0) one pass is enough, and
torch's loop serves as it is (test_without_a_radius_all_of_torchs_inputs_give_torchs_steps).
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[2]

# By torch's name: the files that have its like, and the tests there.
TABLE: dict[str, tuple[str, ...]] = {
    "test_optim_infos_do_not_specify_global_cliquey_kwargs": (
        "test_torch_generic::test_inputs_are_those_with_global_flags",
    ),
    "test_errors": (
        "test_torch_generic::test_errors",
        "test_hyperparameters::test_a_bad_hyperparameter_is_named_with_its_value",
        "test_inherited::test_a_hyperparameter_that_is_wrong_is_named",
    ),
    "test_forloop_goes_right_direction": (
        "test_directions::test_it_goes_in_the_right_direction",
        "test_directions::test_no_scheduler_of_torch_is_missing",
        "test_directions::test_strides_with_gaps_change_no_number",
    ),
    "test_param_group_with_lrscheduler_goes_right_direction": (
        "test_torch_generic::test_schedulers_of_sgd_and_adam",
        "test_directions::test_a_scheduler_sets_what_it_sets_of_torchs_sgd",
    ),
    "test_tensor_lr": (
        "test_directions::test_a_learning_rate_in_a_tensor_of_one_element_is_that_number",
        "test_groups::test_a_scheduler_moves_a_tensor_learning_rate_as_it_moves_a_float",
    ),
    "test_rosenbrock_sparse": (
        "test_complex_and_sparse::test_a_sparse_gradient_is_refused_and_the_step_can_be_taken_again",
        "test_torch_optim::test_rosenbrocks_valley_is_descended",
    ),
    "test_complex": ("test_complex_and_sparse::test_a_parameter_of_another_kind_is_refused_at_once",),
    "test_complex_2d": ("test_complex_and_sparse::test_a_parameter_of_another_kind_is_refused_at_once",),
    "test_foreach_matches_forloop": ("test_seven_steps::test_seven_steps_are_those_of_the_per_tensor_loop",),
    "test_fused_matches_forloop": (
        "test_seven_steps::test_seven_steps_are_those_of_the_per_tensor_loop",
        "test_seven_steps::test_the_backends_agree_bit_for_bit_in_every_dtype",
        "test_torch_generic::test_fused_matches_forloop",
        "test_torch_generic::test_without_a_radius_all_of_torchs_inputs_give_torchs_steps",
    ),
    "test_fused_cpu_matches_cuda": ("test_seven_steps::test_the_backends_agree_bit_for_bit_in_every_dtype",),
    "test_mixed_device_dtype": (
        "test_seven_steps::test_the_backends_agree_bit_for_bit_in_every_dtype",
        "test_fake_tensors::test_every_member_steps_parameters_on_cpu_and_gpu_of_two_dtypes_and_reads_no_value",
    ),
    "test_set_default_dtype_works_with_foreach": ("test_seven_steps::test_the_default_dtype_has_no_influence",),
    "test_foreach_large_tensor": ("test_seven_steps::test_the_backends_agree_bit_for_bit_on_a_large_tensor",),
    "test_fused_large_tensor": (
        "test_seven_steps::test_the_backends_agree_bit_for_bit_on_a_large_tensor",
        "test_torch_optim::test_a_large_tensor_is_stepped_as_its_pieces_are",
    ),
    "test_peak_memory_foreach": (
        "test_seven_steps::test_a_lazy_step_of_the_fused_kernels_takes_no_memory",
        "test_inherited::test_no_member_keeps_more_than_it_needs",
    ),
    # Refused by torch's fused optimizers, taken here.
    "test_fused_error_on_params_on_meta": (
        "test_seven_steps::test_meta_parameters_go_through_every_step_without_numbers",
    ),
    "test_cpu_load_state_dict": ("test_saved::test_a_state_saved_on_the_cpu_moves_to_the_parameters_of_any_backend",),
    "test_state_dict_with_cuda_params": (
        "test_saved::test_a_state_saved_on_the_cpu_moves_to_the_parameters_of_any_backend",
    ),
    "test_param_groups_weight_decay": (
        "test_directions::test_groups_are_optimizers_of_their_own_where_no_norm_is_shared",
        "test_torch_optim::test_weight_decay_acts_where_the_gradient_does_not",
    ),
    "test_param_groups_lr": ("test_directions::test_groups_are_optimizers_of_their_own_where_no_norm_is_shared",),
    "test_step_is_noop_when_params_have_no_grad": (
        "test_directions::test_without_gradients_nothing_moves_and_nothing_counts",
    ),
    "test_step_is_noop_for_zero_grads": ("test_directions::test_zero_gradients_move_nothing_and_count",),
    "test_second_order_optims_return_consistent_types": (
        "test_directions::test_a_step_returns_the_loss_of_its_first_pass",
    ),
    "test_optimizer_can_be_printed": ("test_saved::test_it_prints_every_entry_of_every_group",),
    "test_state_dict_deterministic": ("test_saved::test_a_state_is_the_same_in_every_run_with_names_or_without",),
    "test_can_load_from_to_named_state_dict": (
        "test_saved::test_a_state_is_the_same_in_every_run_with_names_or_without",
    ),
    "test_can_load_older_state_dict": (
        "test_saved::test_a_state_of_an_older_version_takes_what_it_lacks_from_the_constructor",
    ),
    "test_save_load_equality_with_weights_only": ("test_saved::test_torch_load_reads_the_same_with_weights_only",),
    "test_load_nontensor_step": ("test_saved::test_counts_may_be_numbers_or_other_tensors",),
    "test_deepcopy_copies_all_public_attrs": (
        "test_saved::test_a_copy_has_all_public_attributes",
        "test_inherited::test_a_copy_goes_on_bit_for_bit",
    ),
    "test_non_empty_state": ("test_seven_steps::test_seven_steps_are_those_of_the_per_tensor_loop",),
    "test_step_pre_hook": ("test_hooks::test_step_hooks_run_once_a_step_and_in_order_around_it",),
    "test_step_post_hook": ("test_hooks::test_step_hooks_run_once_a_step_and_in_order_around_it",),
    "test_step_all_hooks": ("test_hooks::test_step_hooks_run_once_a_step_and_in_order_around_it",),
    "test_state_dict_pre_hook": ("test_hooks::test_what_a_hook_puts_into_the_state_under_a_key_of_its_own_is_kept",),
    "test_state_dict_post_hook": ("test_hooks::test_state_dict_hooks_run_around_it_and_see_each_others_work",),
    "test_state_dict_pre_post_hook": ("test_hooks::test_state_dict_hooks_run_around_it_and_see_each_others_work",),
    "test_load_state_dict_pre_hook_and_prepend": (
        "test_hooks::test_load_hooks_run_in_order_and_the_last_word_is_that_of_the_last",
    ),
    "test_load_state_dict_post_hook": (
        "test_hooks::test_load_hooks_run_in_order_and_the_last_word_is_that_of_the_last",
    ),
    "test_load_state_dict_pre_post_hook": (
        "test_hooks::test_load_hooks_run_in_order_and_the_last_word_is_that_of_the_last",
    ),
}

# What has no like here, and why.
WITHOUT = {
    "test_forloop_goes_right_direction_multigpu": "one process steps parameters of one GPU and of the CPU",
    "test_defaults_changed_to_foreach": "there is no loop over the tensors to be changed from",
    "test_fused_does_not_step_if_foundinf": "what a GradScaler finds is asked in test_accumulated_and_scaled.py",
}


def functions(file: Path) -> set[str]:
    """The names of a file's functions, those in classes among them."""
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", TABLE)
def test_each_row_names_tests_that_there_are(name: str) -> None:
    assert TABLE[name] and name not in WITHOUT
    for place in TABLE[name]:
        module, test = place.split("::")
        (file,) = TESTS.rglob(f"{module}.py")
        assert test in functions(file), place


def test_each_test_of_this_folder_is_named() -> None:
    named = {place for places in TABLE.values() for place in places}
    files = [file for file in Path(__file__).parent.glob("test_*.py") if file != Path(__file__)]
    assert files
    for file in files:
        assert {f"{file.stem}::{name}" for name in functions(file) if name.startswith("test_")} - named == set()
