from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax.models import MIXED, ModelConfig, ScalarModel, Transformer, from_language_model, last_token_rewards

CONFIG = ModelConfig(
    vocab_size=11,
    d_model=8,
    n_layers=1,
    n_heads=2,
    n_kv_heads=1,
    head_dim=4,
    d_ff=12,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
    max_length=16,
)
TOKENS = jnp.asarray([[3, 1, 4, 1, 5]])


def test_the_reward_is_read_at_the_last_token_of_the_response():
    values = jnp.arange(24.0).reshape(4, 6)
    mask = jnp.asarray(
        [
            [0, 1, 1, 0, 0, 0],  # right-padded: targets 1 and 2, the last of which is input 3
            [0, 0, 0, 1, 1, 0],  # left-padded, up to the padding column: input 5
            [1, 0, 0, 0, 0, 0],  # one token: input 1
            [0, 1, 0, 1, 0, 0],  # a gap: still the last one
        ],
        bool,
    )
    assert_array_equal(last_token_rewards(values, mask), [3, 11, 13, 22])


def test_an_empty_response_has_reward_0_and_padding_is_not_read():
    values = jnp.asarray([[jnp.nan, jnp.inf, 1.0], [jnp.nan, 5.0, jnp.nan]])
    mask = jnp.asarray([[False, False, False], [True, False, False]])
    assert_array_equal(last_token_rewards(values, mask), [0, 5])
    gradient = jax.grad(lambda v: last_token_rewards(v, mask).sum())(values)
    assert_array_equal(gradient, [[0, 0, 0], [0, 1, 0]])


def test_a_response_in_the_last_column_is_refused_or_nan():
    values, mask = jnp.ones((2, 3)), jnp.asarray([[False, True, False], [False, False, True]])
    with pytest.raises(ValueError, match="True in the last column"):
        last_token_rewards(values, mask)
    assert_array_equal(jax.jit(last_token_rewards)(values, mask), [1, jnp.nan])


@pytest.mark.parametrize("seed", range(5))
def test_rewards_equal_those_of_a_loop(seed):
    rng = np.random.default_rng(seed)
    values, mask = rng.normal(size=(8, 9)).astype(np.float32), rng.random((8, 9)) < 0.3
    mask[:, -1] = False
    expected = [row[np.flatnonzero(m)[-1] + 1] if m.any() else 0 for row, m in zip(values, mask, strict=True)]
    assert_array_equal(last_token_rewards(jnp.asarray(values), jnp.asarray(mask)), expected)


def test_the_head_starts_with_std_1_over_sqrt_of_width_plus_1():
    width = 4095
    config = replace(CONFIG, d_model=width)
    head = from_language_model({}, jax.random.key(0), config)["head"]
    assert head["kernel"].shape == (width,) and head["bias"].shape == ()
    assert float(head["bias"]) == 0
    assert_allclose(head["kernel"].std(), 1 / 64, rtol=0.05)
    assert_allclose(head["kernel"].mean(), 0, atol=4 / 4096)


@pytest.mark.parametrize("tied", [True, False])
def test_from_language_model_copies_the_trunk_and_drops_the_language_head(tied):
    config = replace(CONFIG, tie_embeddings=tied)
    language = jax.jit(Transformer(config).init)(jax.random.key(0), TOKENS)["params"]
    params = from_language_model(language, jax.random.key(1), config)
    assert ("head" in language) == (not tied) and "head" not in params["trunk"]
    chex.assert_trees_all_equal(params["trunk"], {k: v for k, v in language.items() if k != "head"})
    for ours, theirs in zip(
        jax.tree.leaves(params["trunk"]),
        jax.tree.leaves({k: v for k, v in language.items() if k != "head"}),
        strict=True,
    ):
        assert ours is not theirs  # donating the one leaves the other alive
    model = ScalarModel(config)
    chex.assert_trees_all_equal_shapes(params, jax.eval_shape(model.init, jax.random.key(2), TOKENS)["params"])

    values = jax.jit(model.apply)({"params": params}, TOKENS)
    read = jax.jit(partial(Transformer(config).apply, method="hidden_states"))
    hidden = read({"params": language}, TOKENS)
    expected = np.asarray(hidden) @ np.asarray(params["head"]["kernel"])
    assert values.shape == (1, 5) and values.dtype == jnp.float32
    assert_allclose(values, expected, atol=1e-5)


def test_values_are_float32_in_a_bfloat16_model():
    model = ScalarModel(replace(CONFIG, precision=MIXED))
    values, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), TOKENS)
    assert values.dtype == jnp.float32
