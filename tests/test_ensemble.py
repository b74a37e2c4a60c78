"""Ensembles of reward models: their equations, one pass for all members, averaged weights, and one update of PPO."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from experiments import ppo
from rlhf_jax.actor_critic import own_part
from rlhf_jax.adapters import is_complete
from rlhf_jax.batches import RankedAnswers
from rlhf_jax.data.preferences import pad_rankings
from rlhf_jax.data.tokens import pad_prompts, pad_sequences
from rlhf_jax.ensemble import (
    average_params,
    combination,
    ensemble_metrics,
    ensemble_reward,
    ensemble_spread,
    member_scores,
    stack_params,
)
from rlhf_jax.models import ModelConfig, ScalarModel, Transformer, init_lora, merge_lora, with_lora
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.rewards.model import model_reward
from rlhf_jax.scoring import response_rewards
from rlhf_jax.simulation.world import make_tokenizer

CONFIG = ModelConfig(
    vocab_size=12, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=16, rope_theta=1e4,
    norm_eps=1e-5, tie_embeddings=True, max_length=16,
)  # fmt: skip
SCORES = np.array([[0.5, -2.0, 1.0, 0.0], [1.5, -2.0, -3.0, 0.25], [1.0, -2.0, 2.0, 7.0]])
COMBINATIONS = ("mean", "min", "lower", "uwo")
TOKENS = pad_sequences([([3, 4], [5, 6, 2]), ([7], [8, 2]), ([9, 10, 11], [2])], length=8, pad_id=0)


@cache
def member(seed):
    """A reward model with random numbers: those that a model starts from are so small that all answers score alike."""
    shapes = jax.eval_shape(ScalarModel(CONFIG).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), shapes)


alone = jax.jit(partial(response_rewards, ScalarModel(CONFIG)))


def reward_of(*members, combine="mean", lam=1.0):
    return ensemble_reward(CONFIG, members, combine=combine, lam=lam, name="ensemble", weight=1.0)


def scored(reward, tokens=TOKENS):
    return jax.jit(reward.on_tokens)(reward.params, tokens)


@pytest.mark.parametrize("combine", COMBINATIONS)
@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_each_combination_is_its_equation(combine, lam):
    found = combination(combine, lam)(jnp.asarray(SCORES, jnp.float32))
    assert_allclose(found, oracles.ensemble(SCORES, combine, lam), rtol=1e-6, atol=1e-7)
    assert found.dtype == jnp.float32
    if lam == 0:
        expected = "min" if combine == "min" else "mean"
        assert_allclose(found, combination(expected, 1.0)(jnp.asarray(SCORES, jnp.float32)), rtol=1e-6)


def test_by_hand():
    """1 and 3: mean 2, variance 1, std 1; 0 and 4: mean 2, variance 4, std 2."""
    scores = jnp.asarray([[1.0, 0.0], [3.0, 4.0]])
    assert_array_equal(combination("min", 0.5)(scores), [1.0, 0.0])
    assert_array_equal(combination("lower", 0.5)(scores), [1.5, 1.0])
    assert_array_equal(combination("uwo", 0.5)(scores), [1.5, 0.0])
    assert_array_equal(ensemble_spread(scores), [1.0, 2.0])
    with pytest.raises(ValueError, match="weights are averaged"):
        combination("weights", 1.0)


def test_gradients_reach_every_member_and_are_finite_where_all_agree():
    """d(mean − λ std)/dRᵢ = 1/k − λ (Rᵢ − mean) / (k std); 1/k where the members are equal."""
    scores = jnp.asarray(SCORES, jnp.float32)
    found = jax.grad(lambda x: combination("lower", 0.5)(x).sum())(scores)
    mu, std = SCORES.mean(axis=0), SCORES.std(axis=0)
    assert std[1] == 0
    expected = 1 / 3 - 0.5 * (SCORES - mu) / (3 * np.where(std > 0, std, 1.0))
    assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    least = jax.grad(lambda x: combination("min", 1.0)(x)[0])(scores)
    assert_array_equal(least, np.eye(3, 4) * [1, 0, 0, 0])


def test_all_members_are_scored_in_one_pass_as_one_by_one():
    members = [member(seed) for seed in range(3)]
    found = jax.jit(partial(member_scores, ScalarModel(CONFIG)))(stack_params(members), TOKENS)
    each = np.stack([alone(params, TOKENS) for params in members])
    assert_allclose(found, each, rtol=1e-5, atol=1e-6)
    assert np.ptp(each, axis=0).min() > 0.01
    assert_allclose(scored(reward_of(*members, combine="lower")), oracles.ensemble(each, "lower", 1.0), atol=1e-5)


@pytest.mark.parametrize("combine", [*COMBINATIONS, "weights"])
def test_an_ensemble_of_one_is_the_model(combine):
    assert_allclose(scored(reward_of(member(0), combine=combine)), alone(member(0), TOKENS), rtol=1e-5, atol=1e-6)


def test_averaged_weights_are_one_model():
    """In a head alone, over one trunk, the score is linear: the averaged head gives the mean score."""
    first, second = member(0), {"trunk": member(0)["trunk"], "head": member(1)["head"]}
    averaged = average_params([first, second])
    assert_allclose(averaged["head"]["kernel"], (first["head"]["kernel"] + second["head"]["kernel"]) / 2, rtol=1e-6)
    assert_allclose(
        scored(reward_of(first, second, combine="weights")), scored(reward_of(first, second)), rtol=1e-5, atol=1e-6
    )
    assert reward_of(first, second, combine="weights").params["head"]["kernel"].shape == (16,)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), first)
    assert {leaf.dtype for leaf in jax.tree.leaves(average_params([half, half]))} == {jnp.dtype(jnp.bfloat16)}


def test_with_adapters_over_one_trunk_members_stay_whole():
    reward = reward_of(member(0), member(1))
    own = own_part(reward.params, adapters=True)
    assert is_complete(own)
    jax.tree.map(assert_array_equal, own, reward.params)


@pytest.mark.parametrize("combine", ["mean", "weights"])
def test_adapters_are_merged_first(combine):
    """Each member is a whole model: the mean of products of adapters is not the product of their means."""
    rng = np.random.default_rng(0)
    adapters = [
        jax.tree.map(
            lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32),
            init_lora(jax.random.key(seed), member(0)["trunk"], rank=2, alpha=4.0, targets="query/kernel"),
        )
        for seed in range(2)
    ]
    members = [with_lora(member(0), {"trunk": own, "head": member(n)["head"]}) for n, own in enumerate(adapters)]
    found = scored(reward_of(*members, combine=combine))
    whole = [merge_lora(one) for one in members]
    expected = np.mean([alone(one, TOKENS) for one in whole], axis=0)
    if combine == "weights":
        expected = alone(average_params(whole), TOKENS)
    assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_members_of_other_shapes_are_refused():
    shorter = {"trunk": member(0)["trunk"], "head": {"kernel": jnp.zeros(15), "bias": jnp.zeros(())}}
    for function in (stack_params, average_params):
        with pytest.raises(ValueError, match="member 2 has another shape than the first"):
            function([member(0), shorter])
        with pytest.raises(ValueError, match="needs at least one member"):
            function([])


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_one_member_that_has_diverged_is_not_hidden_by_the_others(combine):
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, member(1))
    assert_array_equal(scored(reward_of(member(0), broken, combine=combine)), [np.inf] * 3)


def test_disagreement_by_hand():
    """Three pairs and three members; the preferred answer is the second of the last pair."""
    rankings = [RankedAnswers([3], [[4, 2], [5, 2]], ranks) for ranks in ((0, 1), (0, 1), (1, 0))]
    heldout = pad_rankings(rankings, length=8, pad_id=0)
    margins = np.array([[1.0, 2.0, 3.0], [2.0, -2.0, 3.0], [3.0, 0.0, 3.0]])
    scores = np.zeros((3, 6))
    scores[:, [0, 2, 5]] = margins
    found = ensemble_metrics(scores, heldout)
    # All agree on the first and third pair; on the second they are +, − and a tie: each two differ.
    assert_allclose(found["disagreement"], 1 / 3)
    assert_allclose(found["spread"], (np.std([1, 2, 3]) + np.std([2, -2, 0]) + 0) / 3)
    assert ensemble_metrics(scores[:1], heldout) == {"disagreement": 0.0, "spread": 0.0}


def test_an_update_of_ppo_is_one_program_whose_scores_are_the_ensembles(monkeypatch):
    def comes_to_the_host(values):
        raise AssertionError("an iteration in one program has nothing on the host")

    monkeypatch.setattr(ppo, "to_host", comes_to_the_host)
    params = jax.jit(Transformer(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    base = Pretrained(CONFIG, params, make_tokenizer())
    cfg = ppo.PPO(steps=1, learning_rate=5e-4, responses=8, epochs=1, minibatches=1, lora_rank=0)
    prompts = jax.tree.map(jnp.asarray, pad_prompts([[3, 4], [5, 6, 7]] * 4, length=4, pad_id=0))

    def iterated(*rewards):
        setup, state, frozen = ppo.prepare(
            cfg, base, rewards, jax.random.key(4), max_new_tokens=4, critic=(CONFIG, member(0))
        )
        iteration = ppo.make_iteration(cfg, setup._replace(eos_id=(2,), pad_id=0), base, print)
        return iteration(state, frozen, prompts, jax.random.key(0))

    _, together, *_ = iterated(reward_of(member(0), member(1)))
    half = [model_reward(CONFIG, member(n), name=f"rm-{n}", weight=0.5) for n in range(2)]
    _, apart, *_ = iterated(*half)
    for name in ("score", "kl_k1", "value_loss", "grad_norm"):
        assert_allclose(together[name], apart[name], rtol=1e-3, atol=1e-5, err_msg=name)
    assert_allclose(
        together["reward/ensemble/mean"], (apart["reward/rm-0/mean"] + apart["reward/rm-1/mean"]) / 2, 1e-4
    )
