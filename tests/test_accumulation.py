"""A step over microbatches is the step of the whole batch: values, gradients, metrics, and in the experiments."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from numpy.testing import assert_allclose

from experiments import ppo
from experiments.bench.programs import ppo_setup
from rlhf_jax.actor_critic import Frozen, init_state
from rlhf_jax.batches import Experience, RankedAnswers, Tokens
from rlhf_jax.data.preferences import pack_rankings, packed_rewards, stack_packed
from rlhf_jax.data.tokens import pad_sequences
from rlhf_jax.losses import ppo_clip_loss, ranking_loss, sft_loss, value_clip_loss
from rlhf_jax.losses.reward_model import ranking_counts
from rlhf_jax.models import ModelConfig, ScalarModel, Transformer, from_language_model
from rlhf_jax.scoring import sft_objective, token_values
from rlhf_jax.train import make_train_step, microbatches

# Tokens that count in each of 8 rows: the first of four microbatches is wholly masked.
LENGTHS = np.array([0, 0, 9, 1, 2, 12, 0, 3])


def rows(*shape):
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


MASK = jnp.asarray(np.arange(12) < LENGTHS[:, None])
RANKED = jnp.asarray(np.arange(5) < np.array([0, 1, 5, 2, 2, 5, 1, 3])[:, None])
RANKS = jnp.asarray(np.argsort(np.random.default_rng(0).random((8, 5)), axis=1))
OTHER = jnp.asarray(np.arange(12) < LENGTHS[::-1, None])


def sft(params, batch):
    features, mask = batch
    return sft_loss(features @ params["w"], mask)


def reward_model(params, batch):
    features, ranks, mask = batch
    return ranking_loss(features @ params["w"], ranks, mask)


def policy(params, batch):
    """PPO-ptx: two means over different tokens."""
    features, mask, demonstrations = batch
    clip, metrics = ppo_clip_loss(features @ params["w"], features[..., 0], features[..., 1], mask, clip_eps=0.2)
    ptx, _ = sft(params, demonstrations)
    return {"loss": clip, "ptx_loss": 0.7 * ptx}, metrics | {"ptx_loss": ptx}


def critic(params, batch):
    features, mask = batch
    return value_clip_loss(features @ params["w"], features[..., 0], features[..., 1], mask, clip_eps=0.2)


LOSSES = {
    "sft": (sft, (rows(8, 12, 4), MASK), lambda b: {"loss": b[1].sum()}),
    "reward_model": (reward_model, (rows(8, 5, 4), RANKS, RANKED), lambda b: ranking_counts(b[1], b[2])),
    "policy": (
        policy,
        (rows(8, 12, 4), MASK, (rows(8, 12, 4) * 2, OTHER)),
        lambda b: {"loss": b[1].sum(), "ptx_loss": b[2][1].sum()},
    ),
    "critic": (critic, (rows(8, 12, 4), MASK), lambda b: {"loss": b[1].sum()}),
}


def stepped(loss_fn, batch, counts=None):
    """(gradient, metrics): plain gradient descent moves by the gradient."""
    w = jnp.array([0.5, -0.3, 0.2, 0.1])
    state = TrainState.create(apply_fn=None, params={"w": w.copy()}, tx=optax.sgd(1.0))
    state, metrics = make_train_step(loss_fn, counts=counts)(state, batch)
    return w - state.params["w"], metrics


@pytest.mark.parametrize("name", LOSSES)
def test_any_microbatches_are_the_whole_batch(name):
    loss_fn, batch, counts = LOSSES[name]
    expected = stepped(loss_fn, batch)
    assert np.abs(expected[0]).max() > 1e-2
    for number in (1, 2, 4, 8):
        found = stepped(loss_fn, microbatches(batch, number), counts)
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_mean_of_means_would_not_be(name):
    loss_fn, batch, counts = LOSSES[name]
    gradient, metrics = stepped(loss_fn, batch)

    def alike(batch):
        return {name: jnp.ones(()) for name in counts(batch)}

    naive, naive_metrics = stepped(loss_fn, microbatches(batch, 4), alike)
    assert np.abs(naive - gradient).max() > 1e-2
    assert abs(naive_metrics["loss"] - metrics["loss"]) > 1e-3


def test_nothing_counted_is_no_step_and_no_nan():
    features, mask = LOSSES["sft"][1]
    gradient, metrics = stepped(sft, microbatches((features, mask & False), 4), LOSSES["sft"][2])
    assert not gradient.any() and metrics["loss"] == 0 and metrics["tokens"] == 0


def test_sums_of_bfloat16_gradients_are_float32():
    """Of 1024 equal microbatches: in bfloat16 the sum would stop growing before its end."""

    def loss_fn(params, x):
        return (params["w"] * x).mean().astype(jnp.float32), {}

    state = TrainState.create(apply_fn=None, params={"w": jnp.zeros((), jnp.bfloat16)}, tx=optax.identity())
    step = make_train_step(loss_fn, counts=lambda x: {"loss": jnp.float32(x.size)})
    _, metrics = step(state, jnp.ones((1024, 1), jnp.bfloat16))
    assert metrics["grad_norm"].dtype == jnp.float32
    assert_allclose(metrics["grad_norm"], 1.0, rtol=1e-4)


def test_metrics_of_rows_are_those_of_the_whole_batch():
    def loss(params, x):
        return (x @ params["w"]).mean(), {"rows": x, "first": x[:, 0]}

    x = rows(8, 3)
    step = make_train_step(loss, counts=lambda x: {"loss": jnp.asarray(len(x))})
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(3)}, tx=optax.sgd(0.1))
    _, metrics = step(state, microbatches(x, 4))
    np.testing.assert_array_equal(metrics["rows"], x)
    np.testing.assert_array_equal(metrics["first"], x[:, 0])


def test_rows_that_do_not_divide_are_an_error():
    with pytest.raises(ValueError, match="8 rows do not divide into 3 microbatches"):
        microbatches((MASK,), 3)


CONFIG = ModelConfig(
    vocab_size=24, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, d_ff=16, rope_theta=1e4,
    norm_eps=1e-5, tie_embeddings=True, max_length=32,
)  # fmt: skip
PARAMS = jax.jit(Transformer(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
CRITIC = from_language_model(PARAMS, jax.random.key(1), CONFIG)


def moved(loss_fn, params, batch, counts=None):
    state = TrainState.create(apply_fn=None, params=jax.tree.map(jnp.copy, params), tx=optax.sgd(1.0))
    state, metrics = make_train_step(loss_fn, counts=counts)(state, batch)
    return state.params, metrics


def some_tokens(seed):
    rng = np.random.default_rng(seed)
    documents = [([3], rng.integers(3, 24, n).tolist()) for n in LENGTHS]
    return jax.tree.map(jnp.asarray, pad_sequences(documents, length=14, pad_id=0))


def test_a_models_sft_step():
    """The gradient that comes with the logits, too."""
    tokens, loss_fn = some_tokens(0), partial(sft_objective, Transformer(CONFIG))
    found = moved(loss_fn, PARAMS, microbatches(tokens, 4), lambda batch: {"loss": batch.mask.sum()})
    chex.assert_trees_all_close(found, moved(loss_fn, PARAMS, tokens), rtol=1e-4, atol=1e-6)


def test_packed_rankings_of_unequal_length():
    """Packed apart they fill different numbers of rows; some prompts have more answers than others."""
    rng = np.random.default_rng(0)
    rankings = [
        RankedAnswers(
            [3, 4],
            [rng.integers(3, 24, n).tolist() for n in lengths],
            tuple(range(len(lengths))),
            0.0,
            len(lengths) / 8,
        )
        for lengths in ([1, 2], [9, 10, 11], [2, 1], [3, 1, 1])
    ]
    pack = partial(pack_rankings, length=14, pad_id=0, answers=3)
    parts = [pack(rankings[:2]), pack(rankings[2:])]
    assert len(parts[0].owner) != len(parts[1].owner)
    stacked = stack_packed(parts)
    assert (stacked.owner[~stacked.tokens.mask] == 6).all()  # nobody's
    model = ScalarModel(CONFIG)

    def loss_fn(params, batch):
        rewards = packed_rewards(token_values(model, params, batch.tokens), batch)
        return ranking_loss(rewards, batch.ranks, batch.mask, label_smoothing=batch.doubt)

    found = moved(loss_fn, CRITIC, stacked, lambda b: ranking_counts(b.ranks, b.mask))
    expected = moved(loss_fn, CRITIC, jax.tree.map(jnp.asarray, pack(rankings)))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)


def test_ppos_update():
    """Policy, value and pretraining terms of the experiment itself, with all their metrics."""
    tokens, demonstrations = some_tokens(1), some_tokens(2)
    noise = [rows(8, tokens.mask.shape[1] + i)[:, i:] for i in range(4)]
    experience = Experience(tokens, noise[0] - 3, noise[0] - 3, noise[1], noise[2], noise[2], noise[3])
    frozen = Frozen(PARAMS, {"reward_model": CRITIC}, Tokens(*demonstrations))
    setup = ppo_setup(CONFIG, max_new_tokens=4, eos_id=2, pad_id=0)

    def updated(accumulate):
        cfg = ppo.PPO(
            responses=8, minibatches=1, epochs=1, ptx_coef=0.5, entropy_coef=0.1, accumulate=accumulate
        )  # fmt: skip
        state = init_state(setup, PARAMS, CRITIC, optax.sgd(1.0), cfg.beta)
        update = jax.jit(partial(ppo.update, cfg, setup))
        state, metrics = update(state, frozen, experience, jax.random.key(3))
        return state.policy.params, state.critic.params, metrics

    chex.assert_trees_all_close(updated(4), updated(1), rtol=1e-4, atol=1e-5)
