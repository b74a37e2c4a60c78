"""What is kept and computed in which dtype, and that training and sampling agree on it."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax.batches import Prompts
from rlhf_jax.data.tokens import join, pad_sequences
from rlhf_jax.models import (
    BFLOAT16,
    FLOAT32,
    MIXED,
    ModelConfig,
    ScalarModel,
    Transformer,
    head_kernel,
    init_cache,
    load_hf,
    load_hf_reward_model,
    save_hf,
    save_hf_reward_model,
)  # fmt: skip
from rlhf_jax.models.weights import flat
from rlhf_jax.sampling import generate
from rlhf_jax.scoring import hidden_states, response_logprobs, sft_objective, token_scores

CONFIG = ModelConfig(
    vocab_size=24, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=32, rope_theta=10_000.0,
    norm_eps=1e-5, tie_embeddings=False, max_length=32, family="qwen2", qkv_bias=True,
)  # fmt: skip
TOKENS = jnp.asarray([[3, 1, 4, 1, 5, 9, 2]])


def shapes_of(model):
    return flat(jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"])


def params_of(config):
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), leaf.dtype), shapes)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("change", [{}, {"norm": "layer", "learned_positions": True}])
@pytest.mark.parametrize("precision", [FLOAT32, MIXED, BFLOAT16])
def test_parameters_cache_and_hidden_states_have_their_dtypes(precision, change, scan):
    config = replace(CONFIG, precision=precision, scan_layers=scan, **change)
    model = ScalarModel(config)
    for name, leaf in (shapes_of(Transformer(config)) | shapes_of(model)).items():
        small = name.startswith("head/") or name.rpartition("/")[2] in ("scale", "bias")
        assert leaf.dtype == (jnp.float32 if small else precision.parameters), name
    cache = jax.eval_shape(lambda: init_cache(config, 1, 4))
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.keys)} == {jnp.dtype(precision.compute)}
    hidden, _ = jax.eval_shape(
        partial(Transformer(config).init_with_output, method="hidden_states"), jax.random.key(0), TOKENS
    )
    logits, _ = jax.eval_shape(Transformer(config).init_with_output, jax.random.key(0), TOKENS)
    assert hidden.dtype == precision.head and logits.dtype == jnp.float32


@pytest.mark.parametrize("precision", [FLOAT32, MIXED, BFLOAT16])
def test_a_checkpoint_is_loaded_in_the_dtypes_of_an_initialisation(precision, tmp_path):
    params = params_of(CONFIG)
    save_hf(tmp_path / "policy", CONFIG, params)
    config, loaded = load_hf(tmp_path / "policy", precision=precision)
    assert config.precision == precision
    expected = shapes_of(Transformer(config))
    for name, leaf in flat(loaded).items():
        assert leaf.dtype == expected[name].dtype, name
        assert_array_equal(leaf, flat(params)[name].astype(leaf.dtype), name)

    trunk = {name: value for name, value in params.items() if name != "head"}
    head = {"kernel": jnp.linspace(-1.0, 1.0, 16), "bias": jnp.zeros(())}
    save_hf_reward_model(tmp_path / "reward_model", CONFIG, {"trunk": trunk, "head": head})
    config, loaded = load_hf_reward_model(tmp_path / "reward_model", precision=precision)
    expected = shapes_of(ScalarModel(config))
    assert {name: leaf.dtype for name, leaf in flat(loaded).items()} == {n: x.dtype for n, x in expected.items()}
    assert_array_equal(loaded["head"]["kernel"], head["kernel"])


def test_a_loaded_checkpoint_is_cast_slice_by_slice(tmp_path):
    params = params_of(CONFIG)
    save_hf(tmp_path, CONFIG, params)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    _, loaded = load_hf(tmp_path, shardings=lambda name: sharding, precision=BFLOAT16)
    for name, leaf in flat(loaded).items():
        assert leaf.devices() == {jax.devices()[3]}
        assert_array_equal(leaf, flat(params)[name].astype(shapes_of_low()[name].dtype), name)


def shapes_of_low():
    return shapes_of(Transformer(replace(CONFIG, precision=BFLOAT16)))


def some_prompts():
    mask = np.arange(6) >= np.array([[0], [2], [4], [5]])
    tokens = np.random.default_rng(1).integers(3, 24, (4, 6))
    return Prompts(jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(4))


def some_tokens():
    rng = np.random.default_rng(2)
    documents = [([3, 5], rng.integers(3, 24, n).tolist()) for n in (1, 7, 4)]
    return jax.tree.map(jnp.asarray, pad_sequences(documents, length=10, pad_id=0))


def sampled(config, params, prompts):
    return generate(
        Transformer(config), params, prompts.tokens, prompts.mask, jax.random.key(1),
        max_new_tokens=8, temperature=1.0, eos_id=2, pad_id=0,
    )  # fmt: skip


@pytest.mark.parametrize("precision", [FLOAT32, MIXED, BFLOAT16])
def test_sampler_and_trainer_give_a_token_the_same_probability(precision):
    config = replace(CONFIG, precision=precision)
    params, prompts = params_of(config), some_prompts()

    @jax.jit
    def scored(tokens):
        return response_logprobs(Transformer(config), params, tokens)[:, prompts.tokens.shape[1] - 1 :][:, :8]

    completions = sampled(config, params, prompts)
    assert_allclose(scored(join(prompts, completions, pad_id=0)), completions.logprobs, atol=1e-5)
    if precision is MIXED:  # this model is such that another precision would show
        other = sampled(replace(config, precision=FLOAT32), params, prompts)
        assert np.abs(scored(join(prompts, other, pad_id=0)) - other.logprobs).max() > 1e-3


def test_the_head_of_mixed_precision_reads_and_multiplies_float32():
    """Logits are the float64 product of what the head reads, not of anything rounded to bfloat16."""
    config = replace(CONFIG, precision=MIXED)
    model, params, tokens = Transformer(config), params_of(config), some_tokens()
    hidden = np.asarray(jax.jit(partial(hidden_states, model))(params, tokens), np.float64)
    assert (hidden != hidden.astype(jnp.bfloat16)).any()
    logits = hidden @ np.asarray(head_kernel(params), np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(logprobs, np.asarray(tokens.targets)[..., None], -1)[..., 0]
    got = jax.jit(partial(response_logprobs, model))(params, tokens)
    assert_allclose(np.asarray(got)[tokens.mask], expected[tokens.mask], atol=1e-5)


def equations(jaxpr):
    """Those of a jaxpr, and of whatever is called in it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)):
            if isinstance(value, Jaxpr | ClosedJaxpr):
                yield from equations(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


@pytest.mark.parametrize("precision", [MIXED, BFLOAT16])
def test_softmax_norms_and_losses_are_float32(precision):
    """No exponential, logarithm, root, angle or maximum has bfloat16 operands, forward or backward."""
    config = replace(CONFIG, precision=precision, activation="gelu_tanh")  # a silu is an exponential itself
    model, params, tokens = Transformer(config), params_of(config), some_tokens()

    def loss(params):
        logprobs, entropy = token_scores(model, params, tokens)
        return logprobs.sum() + entropy.sum() + sft_objective(model, params, tokens)[0]

    seen = set()
    for eqn in equations(jax.make_jaxpr(jax.value_and_grad(loss))(params).jaxpr):
        name = eqn.primitive.name
        if name in ("exp", "log", "log1p", "rsqrt", "sqrt", "cos", "sin", "reduce_max"):
            seen.add(name)
            assert all(v.aval.dtype != jnp.bfloat16 for v in eqn.invars), eqn
    assert {"exp", "log", "rsqrt", "cos", "sin", "reduce_max"} <= seen
    assert jax.eval_shape(loss, params).dtype == jnp.float32
