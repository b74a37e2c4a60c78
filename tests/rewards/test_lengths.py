import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose

from rlhf_jax.rewards.lengths import overlong_penalty


def test_by_hand():
    # L_max 20, buffer 5: nothing up to 15, then a fifth a token, −1 at the limit and beyond.
    found = overlong_penalty(jnp.asarray([0, 15, 16, 19, 20, 30]), max_length=20, buffer=5)
    assert_allclose(found, [0, 0, -0.2, -0.8, -1, -1], rtol=1e-6)


@pytest.mark.parametrize("buffer", [0, 21])
def test_a_buffer_that_cannot_be(buffer):
    with pytest.raises(ValueError, match=f"a buffer of {buffer} tokens does not fit into 20"):
        overlong_penalty(jnp.asarray([1]), max_length=20, buffer=buffer)
