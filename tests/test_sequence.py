"""The mesh's axis "sequence": parts of each sequence on devices of their own are the whole on one."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench.meshes import collectives
from rlhf_jax.errors import UserError
from rlhf_jax.logprobs import chunked_logprobs, chunked_logprobs_and_entropy, chunked_weighted_logprobs
from rlhf_jax.models import ModelConfig, Transformer, init_lora, quantize_frozen, with_lora
from rlhf_jax.models import fused as kernels
from rlhf_jax.models.fused import splash
from rlhf_jax.sharding import make_mesh, shard_batch, shard_params

CONFIG = ModelConfig(
    vocab_size=13, d_model=16, n_layers=2, n_heads=8, n_kv_heads=2, head_dim=8, d_ff=24, rope_theta=10_000.0,
    norm_eps=1e-5, tie_embeddings=True, max_length=512, scan_layers=True,
)  # fmt: skip
EVERYWHERE = {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "qk_norm": "projection"}
LENGTH = 200
RNG = np.random.default_rng(0)


def documents():
    """Four rows of two or three documents, with padding at the end, of lengths that no device has whole."""
    slots = np.arange(LENGTH)
    segments = np.stack([(1 + (slots >= 70) + (slots >= 150 - row)) * (slots < 190 + row) for row in range(4)])
    positions = np.stack([slots - np.argmax(row[:, None] == row, axis=0) for row in segments])
    return jnp.asarray(RNG.integers(0, 13, (4, LENGTH))), jnp.asarray(positions), jnp.asarray(segments)


def weights(config):
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(0, 0.5, leaf.shape), leaf.dtype), shapes)


def run(config, frozen, trained, batch):
    """Hidden states, and gradients of what is trained: all weights, or an adapter on frozen ones."""
    tokens, positions, segments = batch

    def loss(trained):
        params = trained if frozen is None else with_lora(frozen, trained)
        hidden = Transformer(config).apply({"params": params}, tokens, positions, segments, method="hidden_states")
        hidden = jnp.where(segments[:, :, None] > 0, hidden, 0.0)
        return jnp.sin(hidden).sum(), hidden

    return jax.jit(jax.grad(loss, has_aux=True))(trained)


@pytest.mark.parametrize("mesh", ["fsdp=2,sequence=4", "sequence=8", "sequence=2,tensor=4"])
@pytest.mark.parametrize("attention", ["reference", "splash"])
def test_a_model_whose_sequences_are_cut_is_that_of_one_device(attention, mesh, monkeypatch):
    """Values and gradients, with documents, a window in one layer, and fewer heads of keys than parts."""
    monkeypatch.setattr(kernels, "BLOCK", 128)
    monkeypatch.setattr("rlhf_jax.models.transformer.splash", partial(splash, interpret=True))
    config = replace(CONFIG, windows=(50, None), remat=True)
    params, batch = weights(config), documents()
    expected = run(replace(config, attention="reference"), None, params, batch)
    with jax.set_mesh(make_mesh(mesh)):
        found = run(replace(config, attention=attention), None, shard_params(params), shard_batch(batch))
    chex.assert_trees_all_close(found, expected, rtol=2e-4, atol=2e-3)


def test_so_is_one_with_biases_a_norm_of_projections_and_an_adapter_on_an_int8_trunk():
    config = replace(CONFIG, scan_layers=False, attention="reference", **EVERYWHERE)
    params, batch = weights(config), documents()
    adapter = init_lora(jax.random.key(2), params, rank=2, alpha=4.0, targets="query|down|output")
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    frozen = quantize_frozen(params)
    expected = run(config, frozen, adapter, batch)
    with jax.set_mesh(make_mesh("data=2,sequence=4")):
        found = run(config, shard_params(frozen), shard_params(adapter), shard_batch(batch))
    chex.assert_trees_all_close(found, expected, rtol=2e-4, atol=2e-3)


@pytest.mark.parametrize("n_kv_heads", [2, 4])  # fewer than parts, and as many
def test_no_device_holds_a_layers_tokens_of_whole_sequences_but_in_attention(n_kv_heads):
    """By the compiled program: heads are exchanged for times, and of whole sequences only numbers are gathered."""
    config = replace(CONFIG, n_kv_heads=n_kv_heads)
    params, batch = weights(config), documents()
    with jax.set_mesh(make_mesh("fsdp=2,sequence=4")):
        args = shard_params(params), shard_batch(batch)
        text = jax.jit(lambda p, b: run(config, None, p, b)).lower(*args).compile().as_text()
    found = collectives(text)
    assert any(kind == "all-to-all" for kind, *_ in found)
    gathered = [shape for kind, shapes, _ in found for shape in shapes if kind == "all-gather"]
    assert gathered and all(LENGTH not in shape or np.prod(shape) <= 4 * LENGTH for shape in gathered)


def head_scores(hidden, kernel, targets, mask, values):
    """Every function of the head, and gradients of a sum of each."""

    def total(hidden, kernel):
        first = chunked_logprobs(hidden, kernel, targets, chunk_size=3, softcap=5.0, temperature=0.7)
        second, entropy = chunked_logprobs_and_entropy(hidden, kernel, targets, chunk_size=3, mask=mask)
        third = chunked_weighted_logprobs(hidden, kernel, targets, values, mask, chunk_size=3)
        at_once = chunked_logprobs(hidden, kernel, targets, chunk_size=64, mask=mask)
        everything = first, second, entropy, at_once
        return sum((jnp.sin(x) * values).sum() for x in everything) + third, (*everything, third)

    return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(hidden, kernel)


@pytest.mark.parametrize("mesh", ["fsdp=2,sequence=4", "sequence=8", "data=2,sequence=2,tensor=2"])
def test_the_heads_scores_of_cut_sequences_are_those_of_one_device(mesh):
    """Values and gradients; the masks leave one device nothing, and another everything."""
    rows, length = 4, 16
    slots, starts = np.arange(length), np.array([15, 0, 9, 6])
    mask = (slots >= starts[:, None]) & (slots < starts[:, None] + 9)
    hidden, values = RNG.normal(size=(rows, length, 8)), RNG.normal(size=(rows, length))
    targets, kernel = RNG.integers(0, 12, (rows, length)), RNG.normal(size=(8, 12))
    arrays = [jnp.asarray(x, jnp.float32) for x in (hidden, kernel)]
    batch = jnp.asarray(targets), jnp.asarray(mask), jnp.asarray(values, jnp.float32)
    expected = head_scores(*arrays, *batch)
    with jax.set_mesh(make_mesh(mesh)):
        found = head_scores(*arrays, *shard_batch(batch))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


def test_heads_that_cannot_be_cut_are_one_line():
    config = replace(CONFIG, n_heads=4)
    with jax.set_mesh(make_mesh("sequence=4,tensor=2")), pytest.raises(UserError) as error:
        jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))
    assert str(error.value) == "4 heads do not divide over sequence × tensor = 8 parts of the mesh"


@pytest.mark.parametrize("length", [1, 30, 197])
def test_a_length_that_does_not_divide_is_padded(length):
    """Values and gradients, also of the head's scores."""
    params = weights(CONFIG)
    batch = jax.tree.map(lambda x: x[:, :length], documents())
    targets, mask = batch[0], batch[2] > 0

    def scores(params, batch, targets, mask):
        def total(params):
            hidden = Transformer(CONFIG).apply({"params": params}, *batch, method="hidden_states")
            found = chunked_logprobs(hidden, params["embedding"].T, targets, chunk_size=16, mask=mask)
            return jnp.sin(found).sum(), found

        return jax.jit(jax.grad(total, has_aux=True))(params)

    expected = scores(params, batch, targets, mask)
    with jax.set_mesh(make_mesh("fsdp=2,sequence=4")):
        found = scores(shard_params(params), *shard_batch((batch, targets, mask)))
    chex.assert_trees_all_close(found, expected, rtol=5e-4, atol=5e-3)
