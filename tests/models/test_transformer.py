from dataclasses import replace
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from tiny import CONFIG, TOKENS, new_params

from rlhf_jax.models import FLOAT32, MIXED, LongRope, Transformer, head_kernel, init_cache


@cache
def compiled(config):
    return jax.jit(Transformer(config).apply)


def forward(config, params, *args):
    return compiled(config)({"params": params}, *args)


def stacked(params, n_layers):
    """The parameters of loop layers, as those of scanned ones."""
    rest = {name: value for name, value in params.items() if not name.startswith("layer_")}
    layers = [params[f"layer_{i}"] for i in range(n_layers)]
    return rest | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


@pytest.fixture(scope="module")
def params():
    return new_params(CONFIG)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, not 0"),
        ({"n_layers": -1}, "n_layers must be at least 1"),
        ({"n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"rotary_fraction": 0.5}, "head_dim must be even for rotary positions, not 6·rotary_fraction 0.5"),
        ({"rotary_fraction": 2.0}, "rotary_fraction 2.0"),
        ({"rope_scaling": LongRope((1.0,), (1.0,) * 3, 1.0, 8)}, "long rope needs 3 short and long factors"),
        ({"windows": (4,)}, "1 windows for 2 layers"),
        ({"windows": (4, 0)}, "a window must be at least 1"),
        ({"nope_layers": (2,)}, r"nope_layers \(2,\) are not all among 2 layers"),
    ],
)
def test_a_shape_that_cannot_be_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_shapes(params):
    logits = forward(CONFIG, params, TOKENS)
    assert logits.shape == (2, 7, 13) and logits.dtype == jnp.float32
    assert head_kernel(params).shape == (12, 13)

    untied = new_params(replace(CONFIG, tie_embeddings=False))
    assert head_kernel(untied) is untied["head"]


def test_bfloat16_is_close_to_float32(params):
    low = forward(replace(CONFIG, precision=MIXED), params, TOKENS)
    assert_allclose(low, forward(CONFIG, params, TOKENS), atol=0.1)


def test_no_token_depends_on_a_later_one(params):
    """The gradient of hidden state t with respect to embedding row s is 0 exactly where s comes after t."""
    tokens = jnp.arange(7)[None]  # each token once, so that an embedding row stands for one place

    def hidden(embedding):
        variables = {"params": params | {"embedding": embedding}}
        return Transformer(CONFIG).apply(variables, tokens, method="hidden_states")[0]

    jacobian = jax.jit(jax.jacrev(hidden))(params["embedding"])[:, :, :7]
    reached = np.abs(jacobian).max(axis=(1, 3)) > 0
    assert_array_equal(reached, np.tri(7, dtype=bool))


@pytest.mark.parametrize("scan", [False, True])
def test_left_padding_equals_separate_runs(params, scan):
    config = replace(CONFIG, scan_layers=scan)
    params = stacked(params, 2) if scan else params
    lengths = np.array([2, 5, 7])
    mask = np.arange(7)[None] >= 7 - lengths[:, None]
    rows = np.random.default_rng(0).integers(1, 13, (3, 7))
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    logits = forward(config, params, jnp.asarray(rows), jnp.asarray(positions), jnp.asarray(mask.astype(np.int32)))
    assert np.isfinite(logits).all()
    for row, n, ours in zip(rows, lengths, logits, strict=True):
        alone = forward(config, params, jnp.asarray(row[None, -n:]))[0]
        assert_allclose(ours[-n:], alone, atol=1e-5)


@pytest.mark.parametrize("windows", [(), (2, None)])
def test_packed_documents_equal_separate_runs(params, windows):
    config = replace(CONFIG, windows=windows)
    lengths = [3, 1, 4]
    row = np.random.default_rng(1).integers(0, 13, (1, 10))
    segments = np.array([[1, 1, 1, 2, 3, 3, 3, 3, 0, 0]])
    positions = np.array([[0, 1, 2, 0, 0, 1, 2, 3, 0, 0]])
    row, segments, positions = map(jnp.asarray, (row, segments, positions))
    packed = forward(config, params, row, positions, segments)[0]
    assert np.isfinite(packed).all()
    start = 0
    for n in lengths:
        alone = forward(config, params, row[:, start : start + n])[0]
        assert_allclose(packed[start : start + n], alone, atol=1e-5)
        start += n


def test_scanned_layers_equal_loop_layers(params):
    scanned = replace(CONFIG, scan_layers=True)
    assert_allclose(
        forward(scanned, stacked(params, 2), TOKENS), forward(CONFIG, params, TOKENS), rtol=1e-5, atol=1e-5
    )
    chex.assert_trees_all_equal_shapes(new_params(scanned), stacked(params, 2))


def test_scanned_layers_start_differently():
    init = jax.jit(Transformer(replace(CONFIG, scan_layers=True)).init)
    kernels = init(jax.random.key(0), TOKENS)["params"]["layers"]["query"]["kernel"]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1


KEEP_PRODUCTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


@pytest.mark.parametrize("scan", [False, True])
def test_remat_changes_neither_values_nor_gradients(params, scan):
    params = stacked(params, 2) if scan else params

    def loss_and_gradient(remat):
        model = Transformer(replace(CONFIG, scan_layers=scan, remat=remat))

        def loss(params):
            return jnp.square(model.apply({"params": params}, TOKENS)).mean()

        text = str(jax.make_jaxpr(jax.grad(loss))(params))
        assert ("remat" in text or "checkpoint" in text) == bool(remat)
        products.append(jax.jit(jax.grad(loss)).lower(params).as_text().count("dot_general"))
        return jax.jit(jax.value_and_grad(loss))(params)

    products = []
    everything, kept, nothing = map(loss_and_gradient, (True, KEEP_PRODUCTS, False))
    chex.assert_trees_all_close(everything, nothing, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(kept, nothing, rtol=1e-5, atol=1e-6)
    assert products[0] > products[1] > products[2]  # with weights, they are not computed again; attention's are


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("precision, tolerance", [(FLOAT32, 1e-5), (MIXED, 0.1)])
def test_decoding_with_a_cache_equals_one_full_pass(params, scan, precision, tolerance):
    """Ragged, left-padded prompts are read at once, then 4 tokens one by one."""
    config = replace(CONFIG, scan_layers=scan, precision=precision)
    params = stacked(params, 2) if scan else params
    model = Transformer(config)
    width, new = 5, 4
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 13, (3, width + new)))
    lengths = jnp.asarray([1, 3, 5])
    mask = jnp.arange(width + new)[None, :] >= width - lengths[:, None]
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    segments = mask.astype(jnp.int32)
    full = forward(config, params, tokens, positions, segments)

    @jax.jit
    def read(cache, *inputs):
        hidden, cache = model.apply({"params": params}, *inputs, cache, method="decode")
        return model.apply({"params": params}, hidden, method="logits"), cache

    logits, cache = read(
        init_cache(config, 3, width + new), tokens[:, :width], positions[:, :width], segments[:, :width]
    )
    parts = [logits]
    for t in range(width, width + new):
        at = slice(t, t + 1)
        logits, cache = read(cache, tokens[:, at], positions[:, at], segments[:, at])
        parts.append(logits)
    assert int(cache.used) == width + new
    decoded = np.concatenate(parts, axis=1)
    assert_allclose(decoded[mask], full[mask], atol=tolerance)


@pytest.mark.parametrize(
    "change",
    [{"learned_positions": True, "max_length": 8}, {"rope_scaling": LongRope((1.0,) * 3, (2.0,) * 3, 1.0, 8)}],
)
def test_what_cannot_be_read_at_once_is_refused(change):
    config = replace(CONFIG, **change)
    params = new_params(config)
    tokens = jnp.ones((1, 9), jnp.int32)
    forward(config, params, tokens[:, :8])
    with pytest.raises(ValueError, match="9 tokens is longer than the 8"):
        forward(config, params, tokens)
    with pytest.raises(ValueError, match="9 tokens is longer than the 8"):
        cache = init_cache(config, 1, 9)
        Transformer(config).apply(
            {"params": params}, tokens[:, :2], tokens[:, :2], tokens[:, :2], cache, method="decode"
        )


def test_two_windows_of_three_see_the_last_five():
    config = replace(CONFIG, windows=(3, 3), tie_embeddings=False)
    params = new_params(config)

    def last(embedding):
        hidden = Transformer(config).apply(
            {"params": params | {"embedding": embedding}}, jnp.arange(8)[None], method="hidden_states"
        )
        return jnp.square(hidden[0, -1] - 1.0).sum()

    grads = jax.jit(jax.grad(last))(params["embedding"])
    assert_array_equal(jnp.abs(grads).max(axis=1) > 0, [3 <= token < 8 for token in range(13)])
