"""A soak: thousands of steps of every member among whatever happens in training, with the reference beside them.

Steps in every style and in micro-batches, with a loss scale and without, batches of any size, layers frozen and thawed,
groups added and edited, saves, loads and copies, exceptions in any pass, numbers that are not finite: never apart from
the reference, nothing counted wrongly, nothing left in memory. A failure says which few events bring it about.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest

from sassha_fused.step import Step
from tests.support.events import Event, schedule, shrunk
from tests.support.members import MEMBERS, each_member
from tests.support.memory import allocated
from tests.support.problems import single_threaded
from tests.support.soak import Soak

one_thread = pytest.fixture(autouse=True)(single_threaded)

STEPS, PROFILED = 2000, 50
OPTIONS: list[tuple[str, int, dict[str, Any]]] = [
    *((member, 1, {}) for member in MEMBERS),
    *(("Sassha by blocks", seed, {"hessian_batches": 2}) for seed in (2, 3)),
    ("Sassha by blocks", 4, {"backend": "eager", "adaptive": True}),
    ("MSassha", 5, {"hessian_batches": 1, "hessian_samples": 2}),
    ("AdaHessian", 6, {"hessian_batches": 2}),
]


def run(events: Sequence[Event], member: str, **options: Any) -> Soak:
    """A soak of these events; where they fail, says by how few they do so again."""
    try:
        return replay(events, member, **options)
    except Exception as error:
        kind = type(error)

        def fails(part: Sequence[Event]) -> bool:
            try:
                replay(part, member, **options)
            except Exception as other:
                return type(other) is kind
            return False

        few = shrunk(events, fails)
        soak = Soak(member, **options)
        with suppress(kind):
            soak.run(few)
        log, shown = "\n".join(soak.log), ",\n".join(map(repr, few))
        raise AssertionError(
            f"{error!r}\nEvents that are enough, of {len(events)}:\n{log}\n"
            f"Once more: Soak({member!r}, **{options!r}).run([\n{shown}])"
        ) from error


def replay(events: Sequence[Event], member: str, **options: Any) -> Soak:
    soak = Soak(member, **options)
    soak.run(events)
    return soak


@pytest.mark.slow
@each_member
def test_a_hundred_steps_are_those_of_the_reference(member: str) -> None:
    soak = run(schedule(7, 100), member)
    assert soak.reference.steps_taken > 50 and soak.reference.skipped_steps > 2


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("member, seed, options", OPTIONS, ids=str)
def test_thousands_of_steps_are_those_of_the_reference_and_memory_stays_flat(
    member: str, seed: int, options: dict[str, Any]
) -> None:
    soak = run(schedule(seed, STEPS), member, **options)
    assert soak.reference.steps_taken > STEPS / 2 and soak.memory is not None
    # What Python does not see, as graphs: what was allocated meanwhile and is left is what lives, copied or loaded.
    more = schedule(seed + 100, PROFILED)
    assert allocated(lambda: soak.run(more))[0] <= soak.memory[1]


def test_a_fault_is_found_and_told_by_few_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Step, "put_back", staticmethod(lambda moved: None))  # an exception leaves the weights at w'
    with pytest.raises(AssertionError, match=r"(?s)moved the weights.*Once more: Soak") as found:
        run(schedule(7, 60), "Sassha by blocks")
    assert 1 <= str(found.value).count("Event(") <= 3
