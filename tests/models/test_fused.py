"""Attention by kernels is attention; which platform takes which; what is lowered for platforms that are not here."""

import re
from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from numpy.testing import assert_allclose

from rlhf_jax.axes import MESH_AXES
from rlhf_jax.models import MIXED, Transformer
from rlhf_jax.models import fused as kernels
from rlhf_jax.models.attention import attend
from rlhf_jax.models.fused import attention_kernel, cudnn, fused, splash
from rlhf_jax.sharding import make_mesh, shard_batch, shard_params

CONFIG = replace(tiny.CONFIG, head_dim=8, max_length=512)
HALF = replace(CONFIG, precision=MIXED)
RNG = np.random.default_rng(0)
LENGTH = 201
"""Two of splash attention's smallest blocks, the second not full; odd."""
SLOTS = np.arange(LENGTH)
LEFT_PADDED = np.stack([SLOTS >= 140, SLOTS >= 0]).astype(np.int32)
PACKED = np.stack([1 + (SLOTS >= 70) + (SLOTS >= 150), (SLOTS < 190)]).astype(np.int32)
CASES = {
    "causal": ({"attention_scale": 0.2}, None, None),
    "left padding": ({}, LEFT_PADDED, None),
    "documents in a window": ({}, PACKED, 60),
}


@pytest.fixture
def in_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 128)


def attention_and_gradients(f, queries, keys, values):
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, LENGTH, 32)), jnp.float32)

    def loss(*args):
        out = f(*args)
        return (out * weights).sum(), out

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(queries, keys, values)


def check(config, segments, window, kernel):
    """Values and gradients at every token, those of padding too: four query heads, two of keys."""
    queries = jnp.asarray(RNG.normal(0, 2, (2, LENGTH, 4, 8)), jnp.float32)
    keys, values = jnp.asarray(RNG.normal(0, 2, (2, 2, 2, LENGTH, 8)), jnp.float32)
    segments = None if segments is None else jnp.asarray(segments)
    visible = (SLOTS[:, None] >= SLOTS) & (SLOTS[:, None] - SLOTS < (window or LENGTH))
    visible = jnp.asarray(visible[None])
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None, :])
    found = attention_and_gradients(
        lambda *args: fused(config, *args, segments, window, kernel=kernel), queries, keys, values
    )
    expected = attention_and_gradients(lambda *args: attend(config, *args, visible), queries, keys, values)
    jax.tree.map(lambda a, e: assert_allclose(a, e, atol=1e-4), found, expected)


@pytest.mark.parametrize("case", CASES)
def test_splash_attention_is_attention(case, in_blocks):
    """Soft caps are of every case."""
    changes, segments, window = CASES[case]
    check(replace(CONFIG, attention_softcap=3.0, **changes), segments, window, partial(splash, interpret=True))


@pytest.mark.parametrize("case", CASES)
def test_what_cudnn_is_asked_for_is_attention(case):
    """By the same function's XLA implementation."""
    changes, segments, window = CASES[case]
    check(replace(CONFIG, **changes), segments, window, partial(cudnn, implementation="xla"))


def test_a_model_with_splash_attention_on_a_mesh_is_that_with_ours_on_one_device(in_blocks, monkeypatch):
    """Layers scanned and rematerialised, one with a window and one without; values and gradients."""
    monkeypatch.setattr("rlhf_jax.models.transformer.splash", partial(splash, interpret=True))
    config = replace(CONFIG, windows=(50, None), scan_layers=True, remat=True)
    tokens = jnp.asarray(RNG.integers(0, 13, (4, LENGTH)))
    segments = jnp.asarray(np.concatenate([PACKED, LEFT_PADDED]))
    positions = jnp.asarray([np.arange(LENGTH) - np.searchsorted(row, row) for row in np.asarray(segments[:1])])
    positions = jnp.concatenate([positions, jnp.asarray(SLOTS)[None].repeat(3, 0)])
    params = tiny.new_params(config)

    def run(attention, params, tokens, positions, segments):
        def loss(params):
            model = Transformer(replace(config, attention=attention))
            hidden = model.apply({"params": params}, tokens, positions, segments, method="hidden_states")
            return jnp.square(hidden[:, :, 0]).sum(), hidden

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    expected = run("reference", params, tokens, positions, segments)
    with jax.set_mesh(make_mesh("data=2,fsdp=2,tensor=2")):
        found = run("splash", shard_params(params), *shard_batch((tokens, positions, segments)))
    chex.assert_trees_all_close(found, expected, rtol=2e-4, atol=2e-3)


def tpu_mesh(**sizes):
    """Of TPUs that are not there."""
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    shape = tuple(sizes.get(name, 1) for name in MESH_AXES)
    return jax.sharding.use_abstract_mesh(
        AbstractMesh(shape, MESH_AXES, (AxisType.Auto,) * len(MESH_AXES), abstract_device=device)
    )


def test_the_platform_chooses(monkeypatch):
    assert attention_kernel(HALF, 4096) == "reference"  # a CPU
    with tpu_mesh(fsdp=2):
        assert attention_kernel(HALF, 4096) == "splash"
        assert attention_kernel(HALF, 127) == "reference"
        assert attention_kernel(replace(HALF, attention="reference"), 4096) == "reference"
    monkeypatch.setattr(kernels, "_platform", lambda: "gpu")
    monkeypatch.setattr(kernels, "_has_flash_attention", lambda: True)
    assert attention_kernel(HALF, 4096) == "cudnn"
    for refused in ({"attention_softcap": 3.0}, {"head_dim": 256}, {"head_dim": 12}, {"precision": CONFIG.precision}):
        assert attention_kernel(replace(HALF, **refused), 4096) == "reference"
        with pytest.raises(ValueError, match=r"attention 'cudnn' (has no|is for)"):
            attention_kernel(replace(HALF, attention="cudnn", **refused), 4096)


def calls(config, platform, length=LENGTH):
    """Names of the custom calls in the program of a gradient, lowered for a platform."""
    model, tokens = Transformer(config), jnp.ones((2, length), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens[:, :1]))

    def loss(params):
        return model.apply(params, tokens, None, tokens, method="hidden_states").sum()

    program = jax.jit(jax.grad(loss)).trace(params).lower(lowering_platforms=(platform,)).as_text()
    return set(re.findall(r"custom_call @([\w$]+)", program))


def test_what_is_lowered():
    with tpu_mesh():
        assert "tpu_custom_call" in calls(HALF, "tpu")
        assert calls(HALF, "tpu", length=64) == set()
    assert calls(HALF, "cpu") == set()


def test_what_is_lowered_for_gpus(monkeypatch):
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91900)
    config = replace(HALF, attention="cudnn")
    assert {"__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"} <= calls(config, "cuda")
