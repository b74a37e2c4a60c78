"""The equations under JAX's transformations, and under the model libraries people use."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

from rlhf_jax.advantages import gae
from rlhf_jax.logprobs import token_logprobs
from rlhf_jax.losses import dpo_loss, ppo_clip_loss

RNG = np.random.default_rng(0)
B, T, D, V = 8, 4, 3, 7
LOGPROBS, OLD, ADVANTAGES = jnp.asarray(RNG.normal(size=(3, B, T)), jnp.float32)
MASK = jnp.asarray(RNG.random((B, T)) < 0.7)
INPUTS, TARGETS = jnp.asarray(RNG.integers(0, V, (2, B, T)))
EMBEDDING = jnp.asarray(RNG.normal(size=(V, D)), jnp.float32)
KERNEL = jnp.asarray(RNG.normal(size=(D, V)), jnp.float32)


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
