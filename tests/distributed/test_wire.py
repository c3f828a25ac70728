"""Steps of replicas put on the wire what the method needs, and no byte more."""

import pytest

from bench import wire

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", wire.CONTENDERS)
def test_a_step_reduces_its_gradients_one_scalar_and_every_k_steps_the_products(two, name):
    expected = [wire.floor(name, step) for step in range(wire.STEPS)]
    assert two.run(wire.bytes_of_steps, name) == [expected] * 2
