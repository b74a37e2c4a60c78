"""The parameters that a stage trains, and roles that share a trunk."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.adapters import is_complete, merged_on_host, over_trunk, split_trainable
from rlhf_jax.errors import UserError
from rlhf_jax.models.weights import flat

TARGETS = dict(alpha=4.0, targets="up/kernel", rank_stabilized=False, frozen_dtype=None)
TRUNK = {"embedding": jnp.ones((5, 4)), "layer_0": {"up": {"kernel": jnp.full((4, 3), 2.0)}}}
SCALAR = {"trunk": TRUNK, "head": {"kernel": jnp.ones(4), "bias": jnp.zeros(())}}


def split(params, **changes):
    return split_trainable(params, jax.random.key(0), **{"rank": 2, **TARGETS, **changes})


def test_without_a_rank_all_weights_are_trained():
    frozen, trainable = split(SCALAR, rank=0)
    assert frozen == {} and trainable is SCALAR
    chex.assert_trees_all_equal(merged_on_host(frozen, trainable), jax.tree.map(np.asarray, SCALAR))


def test_with_one_adapters_and_the_scalar_head_are():
    frozen, trainable = split(SCALAR)
    assert set(flat(trainable)) == {
        "head/bias", "head/kernel", *(f"trunk/layer_0/up/lora_{x}" for x in ("a", "b", "scale"))
    }  # fmt: skip
    assert set(flat(frozen)) == {"trunk/embedding", "trunk/layer_0/up/kernel"}
    # A new adapter changes nothing.
    chex.assert_trees_all_equal(merged_on_host(frozen, trainable), jax.tree.map(np.asarray, SCALAR))


@pytest.mark.parametrize(("dtype", "kernel"), [("bfloat16", jnp.bfloat16), ("int8", jnp.int8)])
def test_frozen_weights_are_rounded(dtype, kernel):
    frozen, _ = split(TRUNK, frozen_dtype=dtype)
    assert frozen["layer_0"]["up"]["kernel"].dtype == kernel


def test_a_role_lies_over_the_trunk_or_is_complete():
    _, policy = split(TRUNK)
    _, critic = split(SCALAR)
    assert over_trunk(TRUNK, {}) == TRUNK  # the reference
    assert set(flat(over_trunk(TRUNK, policy))) == set(flat(TRUNK)) | set(flat(policy))
    assert set(flat(over_trunk(TRUNK, critic))) == set(flat(SCALAR)) | set(flat(critic))
    other = jax.tree.map(lambda x: x + 1, SCALAR)
    assert over_trunk(TRUNK, other) is other and is_complete(other) and not is_complete(critic)
    # Over an int8 trunk, too, a complete model keeps its own numbers.
    small, _ = split(TRUNK, frozen_dtype="int8")
    assert over_trunk(small, other) is other


@pytest.mark.parametrize("targets", ["q_proj", "(q"])
def test_targets_that_cannot_be_are_one_line(targets):
    with pytest.raises(UserError, match="lora-targets"):
        split(TRUNK, targets=targets)
