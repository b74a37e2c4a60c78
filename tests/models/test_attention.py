"""Attention in blocks of queries is attention, at lengths that need several of them."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose

from rlhf_jax.models import Transformer, init_cache
from rlhf_jax.models.attention import LEAST_BLOCK, attend, attend_causally

CONFIG = replace(tiny.CONFIG, max_length=512)
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("length", [LEAST_BLOCK, LEAST_BLOCK + 1, 3 * LEAST_BLOCK, 4 * LEAST_BLOCK + 7])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_blocks_of_queries_are_exact(length, softcap):
    """Values and gradients, two documents to a row."""
    config = replace(CONFIG, attention_softcap=softcap)
    queries = jnp.asarray(RNG.normal(size=(2, length, 4, 6)), jnp.float32)
    keys, values = jnp.asarray(RNG.normal(size=(2, 2, 2, length, 6)), jnp.float32)
    weights = jnp.asarray(RNG.normal(size=(2, length, 24)), jnp.float32)
    documents = jnp.arange(length)[None] >= jnp.asarray([[length // 3], [length - 2]])
    visible = jnp.tri(length, dtype=bool)[None] & (documents[:, :, None] == documents[:, None, :])

    def run(f):
        def loss(*args):
            out = f(config, *args, visible)
            return (out * weights).sum(), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(queries, keys, values)

    jax.tree.map(lambda a, e: assert_allclose(a, e, atol=2e-5), run(attend_causally), run(attend))


@pytest.mark.parametrize("length, before", [(2 * LEAST_BLOCK + 3, 5), (3, 70)])
def test_blocks_of_queries_read_what_came_before_them(length, before):
    queries = jnp.asarray(RNG.normal(size=(2, length, 4, 6)), jnp.float32)
    keys, values = jnp.asarray(RNG.normal(size=(2, 2, 2, before + length, 6)), jnp.float32)
    visible = jnp.tri(length, before + length, before, dtype=bool)[None]
    blocks, whole = (jax.jit(partial(f, CONFIG))(queries, keys, values, visible) for f in (attend_causally, attend))
    assert_allclose(blocks, whole, atol=2e-5)


@pytest.mark.parametrize("windows", [(), (70, None)])
def test_a_long_sequence_in_blocks_is_what_decoding_reads(windows):
    config = replace(CONFIG, windows=windows)
    model, tokens = Transformer(config), jnp.asarray(RNG.integers(0, 13, (2, 150)))
    params = jax.jit(model.init)(jax.random.key(0), tokens[:, :1])["params"]
    whole = jax.jit(lambda t: model.apply({"params": params}, t, method="hidden_states"))(tokens)
    positions = jnp.broadcast_to(jnp.arange(150)[None], tokens.shape)
    cache = init_cache(config, 2, 150)
    decode = jax.jit(partial(model.apply, method="decode"))
    decoded, _ = decode({"params": params}, tokens, positions, jnp.ones_like(tokens), cache)
    assert_allclose(whole, decoded, atol=2e-5)
