"""What each optimiser does to which parameter, clipping, decay, schedules, and float32 states."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from rlhf_jax.models import ModelConfig, ScalarModel, Transformer, init_lora
from rlhf_jax.models.weights import flat, nested
from rlhf_jax.optimizers import adafactor, adamw, constant, cosine_decay, linear_decay, muon

CONFIG = ModelConfig(
    vocab_size=20, d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32, rope_theta=1e4,
    norm_eps=1e-5, tie_embeddings=False, max_length=32, qkv_bias=True,
)  # fmt: skip
EVERY = pytest.mark.parametrize("optimizer", [adamw, adafactor, muon])


def some_params(scan_layers):
    """A language model's with adapters, and a scalar head."""
    config = replace(CONFIG, scan_layers=scan_layers)
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)["params"]
    scalar = jax.eval_shape(ScalarModel(config).init, jax.random.key(0), tokens)["params"]
    lora = jax.eval_shape(lambda: init_lora(jax.random.key(0), params, rank=2, alpha=1.0, targets="query"))
    leaves = flat(params) | flat(lora) | {f"scalar_{n}": x for n, x in flat(scalar["head"]).items()}
    return nested({name: jnp.ones(leaf.shape, leaf.dtype) for name, leaf in leaves.items()})


def step(optimizer, grads, params):
    """The first update."""
    return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(grads, params)[0]


@EVERY
@pytest.mark.parametrize("scan_layers", [False, True])
def test_weight_decay_spares_norms_and_biases_also_of_scanned_layers(optimizer, scan_layers):
    params = some_params(scan_layers)
    optimizer = optimizer(lambda step: 0.1, weight_decay=0.5, max_grad_norm=1.0)
    updates = flat(step(optimizer, jax.tree.map(jnp.zeros_like, params), params))
    decayed = set()
    for name, update in updates.items():
        last = name.rpartition("/")[2]
        whole = last in ("scale", "bias", "scalar_kernel", "scalar_bias", "lora_scale")
        assert_allclose(update, 0.0 if whole else -0.05, atol=1e-7, err_msg=name)
        decayed |= {last} - {"scale"} if not whole else set()
    assert decayed == {"embedding", "head", "kernel", "lora_a", "lora_b"}


@EVERY
def test_gradients_are_clipped_by_their_common_norm_before_a_step(optimizer):
    """A gradient ten times as long changes nothing once both are clipped, nor does the other's share of the norm."""
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.zeros((4, 6)), "bias": jnp.zeros(6)}
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
    optimizer = optimizer(0.1, weight_decay=0.0, max_grad_norm=0.5)

    @jax.jit
    def two_steps(scale):
        state = optimizer.init(params)
        _, state = optimizer.update(jax.tree.map(lambda g: g * scale, grads), state, params)
        return optimizer.update(jax.tree.map(lambda g: g[::-1] * 0.01, grads), state, params)[0]

    for a, b in zip(*map(jax.tree.leaves, (two_steps(10.0), two_steps(100.0))), strict=True):
        # Muon's small entries are sums of large ones: rounding is that of the largest.
        assert_allclose(a, b, rtol=1e-5, atol=1e-6 * float(abs(b).max()))
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (two_steps(0.01), two_steps(1.0))), strict=True))


def test_adamw_sees_the_clipped_gradient():
    optimizer = adamw(0.1, weight_decay=0.0, max_grad_norm=1.0)
    _, state = optimizer.update(jnp.array([[30.0], [40.0]]), optimizer.init(jnp.zeros((2, 1))), jnp.zeros((2, 1)))
    assert_allclose(state[1][0].mu, 0.1 * np.array([[0.6], [0.8]]), rtol=1e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_muon_orthogonalises_each_layers_kernels_and_nothing_else(scan_layers):
    """In a kernel's step all directions are of about one size, whatever their sizes in its gradient."""
    params = some_params(scan_layers)
    rng = np.random.default_rng(0)

    def gradient(p):
        """Of matrices, with singular values from 1 to 1e-2; each layer of another size."""
        if p.ndim < 2:
            return jnp.asarray(rng.normal(size=p.shape), p.dtype)
        count = min(p.shape[-2:])
        left, right = (np.linalg.qr(rng.normal(size=(*p.shape[:-2], n, count)))[0] for n in p.shape[-2:])
        sizes = np.array([1.0, 1e-3])[: p.shape[0], None, None] if p.ndim == 3 else 1.0
        return jnp.asarray(sizes * (left * np.geomspace(1, 1e-2, count)) @ right.swapaxes(-1, -2), p.dtype)

    grads = jax.tree.map(gradient, params)
    theirs = flat(step(muon(1.0, weight_decay=0.0, max_grad_norm=1e9), grads, params))
    adams = flat(step(adamw(1.0, weight_decay=0.0, max_grad_norm=1e9), grads, params))
    orthogonal = set()
    for name, update in theirs.items():
        last = name.rpartition("/")[2]
        if last == "kernel":
            values = np.linalg.svd(np.asarray(update), compute_uv=False) / (0.2 * max(update.shape[-2:]) ** 0.5)
            assert values.min() > 0.3 and values.max() < 1.5, name
            orthogonal.add(name)
        else:
            assert_allclose(update, adams[name], rtol=1e-5, err_msg=name)
    assert len(orthogonal) == (7 if scan_layers else 14)


def test_adafactors_step_by_hand():
    """First step: second moments are the squares, and what is divided by the root of them is ±1; factored or not."""
    for shape in [(3,), (128, 130)]:
        sizes = [jnp.linspace(1.0, 2.0, n) for n in shape]  # of rank 1, where the factors are exact
        g = sizes[0] if len(shape) == 1 else -sizes[0][:, None] * sizes[1][None]
        optimizer = adafactor(0.1, weight_decay=0.0, max_grad_norm=1e9)
        update, state = jax.jit(lambda g, o=optimizer: o.update(g, o.init(g), g))(g)
        assert_allclose(update, -0.1 * jnp.sign(g), rtol=1e-3)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert moments < 2 * (128 + 130)


@EVERY
def test_bfloat16_parameters_have_float32_states_and_are_not_left_where_they_are(optimizer):
    params = {"kernel": jnp.ones((4, 4), jnp.bfloat16), "bias": jnp.ones(4, jnp.bfloat16)}
    optimizer = optimizer(0.1, weight_decay=0.1, max_grad_norm=1.0)
    grads = jax.tree.map(jnp.ones_like, params)
    state = optimizer.init(params)
    updates, after = optimizer.update(grads, state, params)
    for leaf in jax.tree.leaves((state, after, updates)):
        assert leaf.dtype != jnp.bfloat16
    assert jax.tree.structure(state) == jax.tree.structure(after)


def test_schedules_warm_up_and_end():
    at = (0, 4, 9, 10, 55, 100)
    for schedule, expected in [
        (cosine_decay, [0.2, 1.0, 2.0, 2.0, 1.0, 0.0]),
        (linear_decay, [0.2, 1.0, 2.0, 2.0, 1.0, 0.0]),
        (constant, [0.2, 1.0, 2.0, 2.0, 2.0, 2.0]),
    ]:
        values = schedule(2.0, 100, warmup=0.1)
        assert_allclose([values(i) for i in at], expected, atol=1e-6)
        assert_allclose(schedule(2.0, 100, warmup=0.0)(0), 2.0)
        assert_allclose(schedule(2.0, 1, warmup=0.5)(0), 2.0)
    a_quarter = 2.0 * 0.5 * (1 + np.cos(np.pi / 4))
    assert_allclose(cosine_decay(2.0, 100, warmup=0.0)(25), a_quarter, rtol=1e-6)
    assert_allclose(linear_decay(2.0, 100, warmup=0.0)(25), 1.5, rtol=1e-6)
