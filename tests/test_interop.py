"""The equations under JAX's transformations, and under the model libraries people use."""

import re
from functools import partial

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

from rlhf_jax.advantages import gae, group_advantages, leave_one_out_advantages
from rlhf_jax.kl import kl_exact, kl_shaped_rewards
from rlhf_jax.logprobs import chunked_logprobs, chunked_logprobs_and_entropy, token_logprobs
from rlhf_jax.losses import dpo_loss, ppo_clip_loss
from rlhf_jax.masking import masked_whiten

RNG = np.random.default_rng(0)
B, T, D, V = 8, 4, 3, 7
LOGPROBS, OLD, ADVANTAGES = jnp.asarray(RNG.normal(size=(3, B, T)), jnp.float32)
MASK = jnp.asarray(RNG.random((B, T)) < 0.7)
INPUTS, TARGETS = jnp.asarray(RNG.integers(0, V, (2, B, T)))
EMBEDDING = jnp.asarray(RNG.normal(size=(V, D)), jnp.float32)
KERNEL = jnp.asarray(RNG.normal(size=(D, V)), jnp.float32)
HIDDEN = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
TABLE = jnp.asarray(RNG.normal(size=(B, T, V)), jnp.float32)


def assert_same(actual, expected):
    jax.tree.map(lambda a, e: assert_allclose(a, e, rtol=1e-4, atol=1e-6), actual, expected)


def loss(logprobs, old, advantages, mask, clip_eps=0.2):
    return ppo_clip_loss(logprobs, old, advantages, mask, clip_eps=clip_eps)[0]


def test_jit_and_grad():
    args = LOGPROBS, OLD, ADVANTAGES, MASK
    assert_same(jax.jit(jax.value_and_grad(loss))(*args), jax.value_and_grad(loss)(*args))


def test_vmap_over_hyperparameters():
    clips = jnp.asarray([0.1, 0.2, 0.4])
    several = jax.vmap(lambda eps: loss(LOGPROBS, OLD, ADVANTAGES, MASK, eps))(clips)
    assert_same(several, jnp.stack([loss(LOGPROBS, OLD, ADVANTAGES, MASK, float(eps)) for eps in clips]))

    rows = OLD[:, :4].T
    several = jax.vmap(lambda beta: dpo_loss(*rows, beta=beta)[0])(clips)
    assert_same(several, jnp.stack([dpo_loss(*rows, beta=float(beta))[0] for beta in clips]))

    def advantages(lam):
        return gae(LOGPROBS, OLD, MASK, gamma=1.0, lam=lam)[0]

    assert_same(jax.vmap(advantages)(clips), jnp.stack([advantages(float(lam)) for lam in clips]))


def test_pmap():
    args = [x[:, None] for x in (LOGPROBS, OLD, ADVANTAGES, MASK)]
    several = jax.pmap(jax.value_and_grad(loss), devices=jax.devices("cpu"))(*args)
    rows = [jax.value_and_grad(loss)(*(x[i] for x in args)) for i in range(B)]
    assert_same(several, jax.tree.map(lambda *xs: jnp.stack(xs), *rows))


def test_sharded_jit():
    mesh = jax.make_mesh((4, 2), ("data", "time"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu"))
    args = LOGPROBS, OLD, ADVANTAGES, MASK
    sharded = jax.device_put(args, NamedSharding(mesh, P("data", "time")))
    assert_same(jax.jit(jax.value_and_grad(loss))(*sharded), jax.value_and_grad(loss)(*args))


ESTIMATORS = {
    "masked_whiten": (masked_whiten, (LOGPROBS, MASK)),
    "kl_exact": (kl_exact, (TABLE, 2 * TABLE)),
    "kl_shaped_rewards": (partial(kl_shaped_rewards, beta=0.1), (OLD[:, 0], LOGPROBS, OLD, MASK)),
    "group_advantages": (partial(group_advantages, group_size=2, scale_by_std=True), (OLD[:, 0],)),
    "groups_across_devices": (partial(group_advantages, group_size=4, scale_by_std=False), (OLD[:, 0],)),
    "leave_one_out": (partial(leave_one_out_advantages, group_size=4), (OLD[:, 0],)),
    "chunked": (partial(chunked_logprobs_and_entropy, chunk_size=3), (HIDDEN, KERNEL, TARGETS)),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_sharded_over_eight_devices_as_on_one(name):
    f, args = ESTIMATORS[name]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu"))
    sharded = [jax.device_put(x, NamedSharding(mesh, P() if x is KERNEL else P("data"))) for x in args]
    assert_same(jax.jit(f)(*sharded), f(*args))


def test_chunks_of_sharded_rows_are_not_gathered():
    """Each device scores its own rows: only the kernel's gradient is summed over devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu"))
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def total(hidden, kernel):
        return chunked_logprobs(hidden, kernel, TARGETS, chunk_size=3).sum()

    grad = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    args = jax.device_put(HIDDEN, rows), jax.device_put(KERNEL, everywhere)
    assert_same(grad(*args), grad(HIDDEN, KERNEL))
    assert not re.search("all-gather|all-to-all", grad.lower(*args).compile().as_text())


def score(logits):
    return loss(token_logprobs(logits, TARGETS), OLD, ADVANTAGES, MASK)


def plain():
    """The loss and the gradients into embedding and kernel, with no library."""
    return jax.value_and_grad(lambda weights: score(weights[0][INPUTS] @ weights[1]))((EMBEDDING, KERNEL))


def test_linen():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(V, D, name="embed")(tokens)
            return nn.Dense(V, use_bias=False, name="head")(x)

    params = {"embed": {"embedding": EMBEDDING}, "head": {"kernel": KERNEL}}
    value, grads = jax.value_and_grad(lambda p: score(Model().apply({"params": p}, INPUTS)))(params)
    assert_same((value, (grads["embed"]["embedding"], grads["head"]["kernel"])), plain())


def test_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(V, D, rngs=rngs)
            self.head = nnx.Linear(D, V, use_bias=False, rngs=rngs)

        def __call__(self, tokens):
            return self.head(self.embed(tokens))

    model = Model(nnx.Rngs(0))
    model.embed.embedding[...], model.head.kernel[...] = EMBEDDING, KERNEL
    value, grads = nnx.value_and_grad(lambda m: score(m(INPUTS)))(model)
    assert_same((value, (grads["embed"]["embedding"][...], grads["head"]["kernel"][...])), plain())


def test_equinox():
    class Model(eqx.Module):
        embed: eqx.nn.Embedding
        head: eqx.nn.Linear

        def __call__(self, tokens):
            return jax.vmap(jax.vmap(lambda token: self.head(self.embed(token))))(tokens)

    embed = eqx.nn.Embedding(weight=EMBEDDING)
    head = eqx.nn.Linear(D, V, use_bias=False, key=jax.random.key(0))
    model = Model(embed, eqx.tree_at(lambda layer: layer.weight, head, KERNEL.T))
    value, grads = eqx.filter_value_and_grad(lambda m: score(m(INPUTS)))(model)
    assert_same((value, (grads.embed.weight, grads.head.weight.T)), plain())
