"""A rank that is lost ends the step of the others in an error, within the time-out, with their weights at w."""

import pytest

from tests.support import mishaps
from tests.support.ranks import ranks

pytestmark = pytest.mark.slow

TIMEOUT = 4.0


@pytest.mark.parametrize("way, at", [("by_closure", 0), ("by_phases", 1)])
def test_a_rank_that_dies_in_a_hessian_step_ends_it_on_the_others(way, at):
    with ranks(2) as pair:
        pair.send(mishaps.lost, way, at, "dies", TIMEOUT)
        (fine, (error, moved, seconds)), (other_fine, _) = (pair.answer(rank) for rank in range(2))
    assert fine and not other_fine
    assert (error, moved) == ("RuntimeError", 0)
    assert seconds < 3 * TIMEOUT


@pytest.mark.parametrize("at", [0, 1], ids=["first pass", "second pass"])
@pytest.mark.parametrize("after", [3, 4], ids=["Hessian step", "lazy step"])
def test_a_closure_that_raises_on_one_rank_ends_the_step_on_the_others(two, at, after):
    (error, moved, seconds), (own_error, own_moved, _) = two.run(
        mishaps.lost, "by_closure", at, "raises", TIMEOUT, after
    )
    assert (error, own_error) == ("RuntimeError", "IndexError")
    assert moved == own_moved == 0
    assert seconds < 3 * TIMEOUT
