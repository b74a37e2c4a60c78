"""A frozen trunk in int8: how far it is from the weights, and that all that reads it reads the same numbers."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file
from test_lora import EVERYTHING, PAIR, forward, new_adapter
from tiny import TOKENS, new_params

from rlhf_jax.losses import sft_loss
from rlhf_jax.models import (
    MIXED,
    Transformer,
    init_lora,
    merge_lora,
    quantize_frozen,
    save,
    save_hf,
    split_lora,
    with_lora,
)
from rlhf_jax.models.transformer import Linear
from rlhf_jax.models.weights import flat, nested
from rlhf_jax.scoring import token_scores

CONFIG = replace(tiny.CONFIG, tie_embeddings=False, qkv_bias=True, learned_positions=True)
BY_HAND = {"up": {"kernel": jnp.asarray([[1.27, 0.0, -254.0], [-0.634, 0.0, 3.1]])}}
"""Columns whose largest are 1.27, 0 and 254: s is 0.01, 1 (as there is nothing to divide) and 2."""


def test_a_kernel_by_hand():
    up = quantize_frozen(BY_HAND)["up"]
    assert up["kernel"].dtype == jnp.int8 and up["kernel_scale"].dtype == jnp.float32
    assert_array_equal(up["kernel"], [[127, 0, -127], [-63, 0, 2]])
    assert_allclose(up["kernel_scale"], [0.01, 1.0, 2.0], rtol=1e-6)
    assert_allclose(merge_lora({"up": up})["up"]["kernel"], [[1.27, 0, -254], [-0.63, 0, 4]], rtol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_number_is_further_off_than_half_a_step(scan, dtype):
    """Rounding to the nearest multiple of s_j = max_i |W_ij| / 127 errs by s_j / 2 at most; in each layer its own."""
    params = new_params(replace(CONFIG, scan_layers=scan, precision=MIXED._replace(parameters=dtype)))
    before, after = flat(params), flat(quantize_frozen(params))
    kernels = {name for name in before if name.endswith("/kernel")}
    assert len(kernels) == (7 if scan else 14)
    assert {name for name, leaf in after.items() if leaf.dtype == jnp.int8} == kernels
    assert set(after) - set(before) == {f"{name}_scale" for name in kernels}
    # Embeddings, language head, norms, biases: the very arrays.
    assert all(after[name] is before[name] for name in set(before) - kernels)
    for name in kernels:
        weights = np.asarray(before[name], np.float64)
        steps = np.abs(weights).max(axis=-2, keepdims=True) / 127
        assert_allclose(after[f"{name}_scale"], steps.squeeze(-2), rtol=1e-6)
        error = np.abs(weights - np.asarray(after[name], np.float64) * steps) / steps
        assert 0.4 < error.max() <= 0.5 + 1e-4


@pytest.mark.parametrize("scan", [False, True])
def test_the_model_and_its_merged_parameters_compute_with_q_times_s(scan):
    config = replace(CONFIG, scan_layers=scan)
    params = new_params(config)
    adapter = new_adapter(params)
    both = with_lora(quantize_frozen(params), adapter)
    merged = merge_lora(both)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, params)
    name = "layers" if scan else "layer_1"
    q, s, a, b, r = (np.asarray(both[name]["down"][leaf], np.float64)
                     for leaf in ("kernel", "kernel_scale", "lora_a", "lora_b", "lora_scale"))  # fmt: skip
    expected = q * s[..., None, :] + r[..., None, None] * (a @ b)
    assert_allclose(merged[name]["down"]["kernel"], expected, atol=1e-5)
    assert_allclose(forward(config, both), forward(config, merged), atol=1e-5)
    # Another model than that of the weights, and near it.
    gap = np.abs(forward(config, both) - forward(config, with_lora(params, adapter))).max()
    assert 1e-4 < gap < 0.2
    trunk, own = split_lora(both)
    chex.assert_trees_all_equal(trunk, quantize_frozen(params))
    chex.assert_trees_all_equal(own, adapter)


def test_a_merged_trunk_is_rounded_to_itself():
    """What an exported base/ gives when it is read and frozen again."""
    params = quantize_frozen(new_params(CONFIG))
    again = quantize_frozen(merge_lora(params))
    chex.assert_trees_all_close(again, params, rtol=1e-6)


def test_in_bfloat16_the_scale_is_not_rounded():
    params = quantize_frozen({"up": {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}})["up"]
    linear = Linear(replace(CONFIG, precision=MIXED), 8)
    # Each input picks a row of W, which is rounded once, at the end.
    out = linear.apply({"params": params}, jnp.eye(16, dtype=jnp.bfloat16)[None])[0]
    assert out.dtype == jnp.bfloat16
    assert_array_equal(out, merge_lora({"up": params})["up"]["kernel"].astype(jnp.bfloat16))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_adapters_and_int8_are_merged_as_they_are_saved_one_kernel_at_a_time(tmp_path, monkeypatch, scan_layers):
    config = replace(CONFIG, family="qwen2", learned_positions=False, scan_layers=scan_layers)
    plain = new_params(config)
    own = init_lora(jax.random.key(1), plain, rank=2, alpha=3.0, targets="up|query")
    own = nested({name: leaf + 0.1 for name, leaf in flat(own).items()})
    both = with_lora(quantize_frozen(plain), own)
    made = []
    merge = save._Merged.__array__
    monkeypatch.setattr(save._Merged, "__array__", lambda self, *more, **k: made.append(self.shape) or merge(self))
    save_hf(tmp_path / "as_it_is", config, both)
    kernels = [name for name in flat(plain) if name.startswith("layer") and name.endswith("/kernel")]
    assert len(made) >= len(kernels) * (config.n_layers if scan_layers else 1)
    assert all(len(shape) == 2 for shape in made)  # a layer's, of scanned ones
    save_hf(tmp_path / "merged", config, merge_lora(both))
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("as_it_is", "merged"))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert_allclose(tensor, expected[name], rtol=1e-6, atol=1e-7, err_msg=name)


def test_merging_what_is_written_starts_nothing_on_the_mesh(tmp_path):
    """One of many processes writes: a program on the devices of all would wait for the others."""
    config = replace(CONFIG, family="qwen2", learned_positions=False)
    plain = new_params(config)
    own = init_lora(jax.random.key(1), plain, rank=2, alpha=3.0, targets="up")
    both = jax.tree.map(np.asarray, with_lora(quantize_frozen(plain), own))
    with jax.transfer_guard_host_to_device("disallow"):
        save_hf(tmp_path, config, both)


def test_an_adapter_alone_is_no_model(tmp_path):
    config = replace(CONFIG, family="qwen2", learned_positions=False)
    own = init_lora(jax.random.key(1), new_params(config), rank=2, alpha=3.0, targets="up")
    with pytest.raises(ValueError, match="parameters are not those of this config"):
        save_hf(tmp_path, config, own)


def test_one_layer_at_a_time_is_converted():
    """Where layers are scanned, neither they nor the backward pass keep a trunk of floats."""
    config = replace(CONFIG, vocab_size=64, d_model=128, d_ff=512, n_layers=8, scan_layers=True)
    trunk = jax.eval_shape(Transformer(config).init, jax.random.key(0), TOKENS)["params"]
    own = jax.eval_shape(partial(init_lora, rank=2, alpha=1.0, targets=EVERYTHING), jax.random.key(0), trunk)
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(trunk))

    def loss(own, trunk):
        return sft_loss(token_scores(Transformer(config), with_lora(trunk, own), PAIR[0])[0], PAIR[0].mask)[0]

    compiled = jax.jit(jax.grad(loss)).lower(own, jax.eval_shape(quantize_frozen, trunk)).compile()
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes < 0.35 * size and memory.temp_size_in_bytes < 0.7 * size
