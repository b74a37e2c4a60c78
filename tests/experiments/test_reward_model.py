"""The reward model's step: margins and doubts that people gave are in its loss."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.reward_model import RewardModel, make_step
from rlhf_jax.batches import RankedAnswers
from rlhf_jax.data.preferences import pack_rankings, pad_rankings
from rlhf_jax.losses import bradley_terry_loss
from rlhf_jax.models import ModelConfig, ScalarModel
from rlhf_jax.scoring import ranking_rewards
from rlhf_jax.train import make_state


def test_margins_and_doubts_are_in_the_loss():
    config = ModelConfig(
        vocab_size=16, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=16, rope_theta=1e4,
        norm_eps=1e-5, tie_embeddings=True, max_length=32,
    )  # fmt: skip
    model, cfg = ScalarModel(config), RewardModel(learning_rate=1e-3, lora_rank=0, epochs=1)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    rankings = [RankedAnswers([1, 2], [[3, 4], [5]], (0, 1), margin) for margin in (0.0, 2.0)]
    rankings.append(RankedAnswers([6], [[7], [8, 9]], (1, 0), 0.5, 0.25))
    batch = jax.tree.map(jnp.asarray, pack_rankings(rankings, length=16, pad_id=0))
    rewards = jax.jit(partial(ranking_rewards, model))(params, batch)
    chosen, rejected = (rewards[np.arange(3), np.asarray(side)] for side in ([0, 0, 1], [1, 1, 0]))
    doubt = jnp.asarray([0.0, 0.0, 0.25])
    expected, _ = bradley_terry_loss(chosen, rejected, margin=jnp.asarray([0.0, 2.0, 0.5]), label_smoothing=doubt)
    without, _ = bradley_terry_loss(chosen, rejected)
    frozen, trainable = cfg.split_trainable(params, jax.random.key(1))
    state = make_state(model, trainable, cfg.make_optimizer(1))
    _, metrics = make_step(cfg, config)(state, batch, frozen, 0, jax.random.key(2))
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert abs(expected - without) > 0.1
    # One answer to a row there are no margins, and the same doubts.
    apart = jax.tree.map(jnp.asarray, pad_rankings(rankings, length=16, pad_id=0))
    state = make_state(model, trainable, cfg.make_optimizer(1))
    _, metrics = make_step(cfg, config)(state, apart, frozen, 0, jax.random.key(2))
    expected, _ = bradley_terry_loss(chosen, rejected, label_smoothing=doubt)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert abs(expected - without) > 1e-3
