"""PPO's four parts, each by itself and against its equation; one trunk; rewards of every kind; one program or two."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from experiments import ppo
from rlhf_jax.actor_critic import init_state
from rlhf_jax.batches import Completions
from rlhf_jax.data import tokens as data_tokens
from rlhf_jax.data.tokens import join, pad_prompts, pad_sequences, take
from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig, ScalarModel, Transformer, from_language_model, merge_lora, with_lora
from rlhf_jax.models.weights import flat
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.rewards.model import model_reward
from rlhf_jax.rewards.reward import HostScores, Reward
from rlhf_jax.scoring import token_scores, token_values
from rlhf_jax.simulation.world import make_tokenizer

CONFIG = ModelConfig(
    vocab_size=12, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=16, rope_theta=1e4,
    norm_eps=1e-5, tie_embeddings=True, max_length=16,
)  # fmt: skip
EOS = 2
ADAPTERS = dict(lora_rank=2, lora_alpha=4.0)
NUMBERS = dict(steps=2, learning_rate=5e-4)


@cache
def new_params():
    return jax.jit(Transformer(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def tiny_models():
    """A policy and a reward model of its shape, prompts, demonstrations."""
    params = new_params()
    rewards = from_language_model(params, jax.random.key(1), CONFIG)
    prompts = pad_prompts([[3, 4], [5, 6, 7]] * 4, length=4, pad_id=0)
    demonstrations = pad_sequences([([3, 4], [5, EOS])] * 4, length=8, pad_id=0)
    return params, rewards, *jax.tree.map(jnp.asarray, (prompts, demonstrations))


def tiny_base(params):
    """Not the world's words, but a tokenizer with its EOS."""
    tokenizer = make_tokenizer()
    assert tokenizer.eos_token_id == EOS or tokenizer.eos_token_id is not None
    return Pretrained(CONFIG, params, tokenizer)


def run(function, cfg, setup, *args):
    """One of the parts, compiled: op by op it would be hundreds of programs."""
    return jax.jit(partial(function, cfg, setup))(*args)


def drawn(cfg, key):
    """The prompts of an iteration."""
    prompts = tiny_models()[2]
    return take(jax.tree.map(np.asarray, prompts), np.asarray(ppo.draw(cfg, len(prompts.row), key)))


def asked_and_answered(cfg, setup, state, frozen, seed):
    """Prompts that were drawn, and their answers."""
    key = jax.random.key(seed)
    prompts = drawn(cfg, key)
    return prompts, run(ppo.rollout, cfg, setup, state, frozen, prompts, ppo.keys_of(key)[1])


scores_of, values_of = (jax.jit(function, static_argnums=0) for function in (token_scores, token_values))


def parts(**changes):
    """(cfg, setup, state, frozen): 8 answers in one minibatch, weights trained."""
    params, rewards, _, demonstrations = tiny_models()
    cfg = ppo.PPO(**{**NUMBERS, "responses": 8, "epochs": 1, "minibatches": 1, "lora_rank": 0, **changes})
    setup, state, frozen = ppo.prepare(
        cfg, tiny_base(params), [model_reward(CONFIG, rewards, name="model", weight=1.0)],
        jax.random.key(4), max_new_tokens=4, critic=(CONFIG, rewards), demonstrations=demonstrations,
    )  # fmt: skip
    return cfg, setup._replace(eos_id=EOS, pad_id=0), state, frozen


def test_rollout_draws_prompts_and_samples_from_the_policy():
    cfg, setup, state, frozen = parts()
    prompts, completions = asked_and_answered(cfg, setup, state, frozen, 0)
    again = asked_and_answered(cfg, setup, state, frozen, 0)
    other = asked_and_answered(cfg, setup, state, frozen, 1)
    assert prompts.tokens.shape == (8, 4) and completions.tokens.shape == (8, 4)
    chex.assert_trees_all_equal((prompts, completions), again)
    assert not np.array_equal(prompts.row, other[0].row)
    for row, ids in zip(prompts.row, prompts.tokens, strict=True):
        np.testing.assert_array_equal(ids, tiny_models()[2].tokens[row])
    # The sampled log-probabilities are the policy's.
    tokens = join(prompts, completions, pad_id=0)
    logprobs, _ = scores_of(setup.policy, state.policy.params, tokens)
    real = np.asarray(completions.mask)
    np.testing.assert_allclose(completions.logprobs[real], logprobs[:, 3:7][real], atol=1e-4)


def two_answers():
    """A prompt of two tokens with an answer that ends, and one that is cut at the limit."""
    prompts = pad_prompts([[3, 4], [5, 6]], length=4, pad_id=0)
    tokens = np.array([[7, EOS, 0, 0], [7, 8, 9, 10]], np.int32)
    completions = Completions(tokens, np.array([[True, True, False, False], [True] * 4]), np.zeros((2, 4), np.float32))
    return jax.tree.map(jnp.asarray, (prompts, completions))


def test_score_is_the_weighted_sum_and_the_rule_for_answers_without_an_end():
    cfg, setup, _, frozen = parts(no_end_score=-7.0)
    prompts, completions = two_answers()
    tokens = join(prompts, completions, pad_id=0)
    model = setup.rewards[0]._replace(weight=2.0)
    python = Reward("python", 0.5, on_texts=lambda *_: HostScores(np.zeros(2)))
    setup = setup._replace(rewards=(model, python))
    value = jax.jit(ScalarModel(CONFIG).apply)({"params": frozen.rewards["model"]}, jnp.array([[3, 4, 7, EOS]]))[0, -1]
    scores, metrics = run(ppo.score, cfg, setup, frozen, tokens, completions, {"python": jnp.array([3.0, jnp.nan])})
    np.testing.assert_allclose(scores, [2.0 * value + 0.5 * 3.0, -7.0], rtol=1e-5)
    np.testing.assert_allclose(metrics["score"], scores.mean(), rtol=1e-6)
    assert float(metrics["ended"]) == 0.5
    assert float(metrics["reward/python/mean"]) == 3.0 and float(metrics["reward/python/applies"]) == 0.5


@pytest.mark.parametrize("whiten", [True, False])
def test_shape_is_reward_minus_beta_kl_and_gae_of_it(whiten):
    cfg, setup, state, frozen = parts(gamma=0.9, lam=0.8, beta=0.5, whiten=whiten)
    # A reference that is not the policy, so that there is a KL.
    frozen = frozen._replace(reference=jax.tree.map(lambda x: 1.5 * x, frozen.reference))
    prompts, completions = two_answers()
    tokens, scores = join(prompts, completions, pad_id=0), jnp.array([1.5, -3.0])
    experience, metrics = run(ppo.shape, cfg, setup, state, frozen, tokens, scores)
    mask = np.asarray(tokens.mask)
    logprobs, reference = (
        np.asarray(scores_of(setup.policy, params, tokens)[0], np.float64)
        for params in (state.policy.params, frozen.reference)
    )
    rewards = np.where(mask, -0.5 * (logprobs - reference), 0.0)
    rewards[0, 4] += 1.5  # on the last token of each answer
    rewards[1, 6] += -3.0
    values = np.asarray(values_of(setup.critic, state.critic.params, tokens), np.float64)
    advantages, returns = oracles.gae(rewards, values, mask, gamma=0.9, lam=0.8)
    np.testing.assert_allclose(np.where(mask, experience.rewards, 0.0), rewards, atol=1e-4)
    np.testing.assert_allclose(np.where(mask, experience.returns, 0.0), np.where(mask, returns, 0.0), atol=1e-4)
    real = advantages[mask]
    expected = (real - real.mean()) / np.sqrt(real.var() + 1e-8) if whiten else real
    np.testing.assert_allclose(np.asarray(experience.advantages)[mask], expected, atol=1e-3)
    kl = np.where(mask, logprobs - reference, 0.0).sum(axis=1).mean()
    np.testing.assert_allclose(metrics["kl_k1"], kl, rtol=1e-3)
    assert abs(kl) > 0.01


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_ratio_is_one_and_the_rewards_are_those_of_the_parts(temperature):
    cfg, setup, state, frozen = parts(temperature=temperature)
    prompts, completions = asked_and_answered(cfg, setup, state, frozen, 0)
    tokens = join(prompts, completions, pad_id=0)
    scores, _ = run(ppo.score, cfg, setup, frozen, tokens, completions, {})
    experience, metrics = run(ppo.shape, cfg, setup, state, frozen, tokens, scores)
    _, update_metrics = run(ppo.update, cfg, setup, state, frozen, experience, jax.random.key(1))
    # Scoring and update are two programs, which round differently where XLA fuses them differently: a few units in
    # the last place of a log-probability of about 3. A temperature that one of them forgot would be 0.1 and more.
    np.testing.assert_allclose(update_metrics["ratio"], 1.0, rtol=2e-6)
    assert float(update_metrics["clip_fraction"]) == 0.0
    np.testing.assert_allclose(metrics["kl_k1"], 0.0, atol=1e-6)
    # By hand: the reward model's value at the last token, on that token, or the rule for answers without an end.
    values_at = jax.jit(ScalarModel(CONFIG).apply)
    for row in range(8):
        real = np.asarray(completions.mask[row])
        answer = np.asarray(completions.tokens[row])[real].tolist()
        question = np.asarray(prompts.tokens[row])[np.asarray(prompts.mask[row])].tolist()
        ids = question + answer
        # What comes after a token changes nothing before it: one shape for answers of all lengths.
        values = values_at({"params": frozen.rewards["model"]}, jnp.array([ids + [0] * (8 - len(ids))]))
        expected = values[0, len(ids) - 1] if answer[-1] == EOS else cfg.no_end_score
        rewards = np.asarray(experience.rewards[row])
        np.testing.assert_allclose(rewards.sum(), expected, atol=1e-4)
        np.testing.assert_allclose(rewards[3 + len(answer) - 1], expected, atol=1e-4)


def test_ptx_entropy_and_adaptive_beta_reach_the_update():
    _, experience, _ = experience_of(*parts())
    states = {}
    for name, changes in {
        "plain": {}, "ptx": {"ptx_coef": 1.0}, "entropy": {"entropy_coef": 0.5}, "adaptive": {"target_kl": 6.0},
    }.items():  # fmt: skip
        cfg, setup, state, frozen = parts(**changes)
        states[name], metrics = run(ppo.update, cfg, setup, state, frozen, experience, jax.random.key(0))
        assert ("ptx_loss" in metrics) == (name == "ptx")

    def same(a, b):
        return all(map(np.array_equal, *(jax.tree.leaves(states[name].policy.params) for name in (a, b))))

    assert not same("plain", "ptx") and not same("plain", "entropy") and same("plain", "adaptive")
    # KL is 0 at first, far below 6 nats: beta falls by 0.2 · 8 / 2000.
    np.testing.assert_allclose(states["adaptive"].beta, 0.1 * (1 - 0.2 * 8 / 2000), rtol=1e-6)
    assert float(states["plain"].beta) == np.float32(0.1)


def lora_parts(*, merged):
    """PPO on one trunk with adapters that have been trained, or on the four full models that they make."""
    params, rewards, _, demonstrations = tiny_models()
    cfg = ppo.PPO(**NUMBERS, responses=8, epochs=1, minibatches=2, ptx_coef=1.0, **ADAPTERS)

    def moved(own, seed):
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), own)

    _, own = cfg.split_trainable(rewards, jax.random.key(2))
    reward_own, critic_own = moved(own, 0), moved(own, 1)
    policy = moved(cfg.split_trainable(params, jax.random.key(3))[1], 2)
    reward, critic = (with_lora({"trunk": params}, own) for own in (reward_own, critic_own))
    if merged:
        cfg = ppo.PPO(**NUMBERS, responses=8, epochs=1, minibatches=2, ptx_coef=1.0, lora_rank=0)
    setup, state, frozen = ppo.prepare(
        cfg, tiny_base(params), [model_reward(CONFIG, reward, name="model", weight=1.0)], jax.random.key(4),
        max_new_tokens=4, critic=(CONFIG, critic), demonstrations=demonstrations,
    )  # fmt: skip
    policy = merge_lora(with_lora(params, policy)) if merged else policy
    state = init_state(setup, policy, state.critic.params, cfg.make_optimizer(8), cfg.beta)
    return cfg, setup._replace(eos_id=EOS, pad_id=0), state, frozen


def experience_of(cfg, setup, state, frozen):
    prompts, completions = asked_and_answered(cfg, setup, state, frozen, 0)
    tokens = join(prompts, completions, pad_id=0)
    scores, _ = run(ppo.score, cfg, setup, frozen, tokens, completions, {})
    return completions, *run(ppo.shape, cfg, setup, state, frozen, tokens, scores)


def test_ppo_on_one_trunk_samples_and_scores_as_four_full_models_do():
    answers = {merged: experience_of(*lora_parts(merged=merged)) for merged in (False, True)}
    np.testing.assert_array_equal(answers[False][0].tokens, answers[True][0].tokens)
    _, experience, metrics = answers[False]
    assert abs(float(metrics["kl_k1"])) > 0.01
    chex.assert_trees_all_close(answers[False], answers[True], atol=1e-4)
    # Each role by itself, from its full model.
    _, _, state, frozen = lora_parts(merged=True)
    roles = [
        (experience.old_values, values_of(ScalarModel(CONFIG), state.critic.params, experience.tokens)),
        (experience.old_logprobs, scores_of(Transformer(CONFIG), state.policy.params, experience.tokens)[0]),
        (experience.ref_logprobs, scores_of(Transformer(CONFIG), frozen.reference, experience.tokens)[0]),
    ]
    for ours, expected in roles:
        np.testing.assert_allclose(ours, expected, atol=1e-4)
    # One set of weights: what else is frozen has only adapters and heads.
    _, _, state, frozen = lora_parts(merged=False)
    for own in (frozen.reference, frozen.rewards, state.policy.params, state.critic.params):
        assert all("lora" in name or "head" in name for name in flat(own))


def test_ppo_on_one_trunk_moves_adapters_and_head_only():
    cfg, setup, state, frozen = lora_parts(merged=False)
    before = jax.tree.map(np.asarray, state)
    after, metrics, *_ = ppo.make_iteration(cfg, setup, tiny_base(None), print)(
        state, frozen, drawn(cfg, jax.random.key(0)), jax.random.key(0)
    )
    trained = {name for role in (after.policy, after.critic) for name in flat(role.params)}
    assert {name.rpartition("/")[2] for name in trained if name.startswith(("layer", "trunk"))} == {
        "lora_a", "lora_b", "lora_scale"
    }  # fmt: skip
    assert len(jax.tree.leaves(after.policy.opt_state)) <= 2 * len(flat(after.policy.params)) + 4
    for role in ("policy", "critic"):
        leaves, old = (flat(getattr(s, role).params) for s in (after, before))
        moved = {name for name in leaves if not np.array_equal(leaves[name], old[name])}
        assert moved == {name for name in leaves if not name.endswith("lora_scale")}
    assert float(metrics["ratio"]) > 0 and np.isfinite(metrics["ptx_loss"])


@pytest.mark.parametrize("adapters", [False, True])
def test_a_reward_model_and_critic_of_another_size(adapters):
    """InstructGPT's policy of 175B had a reward model of 6B. It has weights of its own; the critic starts there."""
    params, _, _, _ = tiny_models()
    small = ModelConfig(**{**vars(CONFIG), "d_model": 8, "n_layers": 2, "d_ff": 8})
    trunk = jax.jit(Transformer(small).init)(jax.random.key(5), jnp.zeros((1, 4), jnp.int32))["params"]
    rewards = from_language_model(trunk, jax.random.key(6), small)
    rewards["head"]["kernel"] += 1.0
    cfg = ppo.PPO(**NUMBERS, responses=8, epochs=1, minibatches=1, lora_rank=2 if adapters else 0)
    setup, state, frozen = ppo.prepare(
        cfg, tiny_base(params), [model_reward(small, rewards, name="small", weight=1.0)], jax.random.key(4),
        max_new_tokens=4, critic=(small, rewards),
    )  # fmt: skip
    setup = setup._replace(eos_id=EOS, pad_id=0)
    completions, experience, _ = experience_of(cfg, setup, state, frozen)
    # At first the critic says what the reward model says.
    np.testing.assert_allclose(
        experience.old_values, values_of(ScalarModel(small), rewards, experience.tokens), atol=1e-5
    )
    scores, _ = run(ppo.score, cfg, setup, frozen, experience.tokens, completions, {})
    assert np.isfinite(scores).all() and np.ptp(scores) > 0
    before = flat(jax.tree.map(np.asarray, state.critic.params))
    after, metrics = run(ppo.update, cfg, setup, state, frozen, experience, jax.random.key(0))
    moved = {name for name, leaf in flat(after.critic.params).items() if not np.array_equal(leaf, before[name])}
    assert moved and all(("lora" in name or "head" in name) == adapters or not adapters for name in moved)
    assert np.isfinite(metrics["value_loss"])


def test_host_rewards_cut_the_program_in_two_and_change_nothing_else():
    """A host reward that says what the reward model says gives the iteration of the reward model."""
    cfg, setup, state, frozen = parts()
    together, expected, *_ = ppo.make_iteration(cfg, setup, tiny_base(None), print)(
        state, frozen, drawn(cfg, jax.random.key(3)), jax.random.key(3)
    )
    cfg, setup, state, frozen = parts()
    model = frozen.rewards["model"]
    asked = []

    def score(prompts, completions, columns, part=None):
        asked.append((len(prompts), sorted(columns)))
        return HostScores(np.asarray(scored[-1]))

    scored = []

    def texts(base, rows, prompts, completions):
        tokens = join(*jax.tree.map(jnp.asarray, (prompts, completions)), pad_id=0)
        scored.append(jax.jit(partial(ppo.score_tokens, setup.rewards))({"model": model}, tokens)["model"])
        return ["p"] * 8, ["c"] * 8, {"answer": [1] * 8}

    host = setup._replace(rewards=(Reward("host", 1.0, on_texts=score),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "as_texts", texts)
        apart, metrics, *_ = ppo.make_iteration(cfg, host, tiny_base(None), print)(
            state, frozen._replace(rewards={}), drawn(cfg, jax.random.key(3)), jax.random.key(3)
        )
    assert asked == [(8, ["answer"])]
    np.testing.assert_allclose(metrics["score"], expected["score"], atol=1e-5)
    assert metrics["reward/host/errors"] == 0 and metrics["reward/host/timeouts"] == 0
    chex.assert_trees_all_close(apart.policy.params, together.policy.params, atol=2e-4)


def test_an_iteration_cut_in_two_learns_in_the_width_of_the_longest_answer(monkeypatch):
    """And what it learns is what `iterate` learns, in one program and in the width that answers may have."""
    key = jax.random.key(3)
    cfg, setup, state, frozen = parts(ptx_coef=0.5, entropy_coef=0.1)
    setup = setup._replace(max_new_tokens=10, eos_id=tuple(range(2, 10)))
    whole, expected, answers = ppo.make_iteration(cfg, setup, tiny_base(None), print)(
        state, frozen, drawn(cfg, key), key
    )
    longest = int(np.asarray(answers.mask).sum(axis=1).max())
    widths = []

    def narrow(completions):
        widths.append(data_tokens.trimmed(completions).mask.shape[1])
        return data_tokens.trimmed(completions)

    monkeypatch.setattr(data_tokens, "bucket", lambda needed, *, longest: min(needed, longest))
    monkeypatch.setattr(ppo, "SMALLEST_BUCKET", 2)
    monkeypatch.setattr(ppo, "trimmed", narrow)
    cfg, _, state, frozen = parts(ptx_coef=0.5, entropy_coef=0.1)
    cut, metrics, again = ppo.make_iteration(cfg, setup, tiny_base(None), print)(state, frozen, drawn(cfg, key), key)
    np.testing.assert_array_equal(answers.tokens, again.tokens)
    assert widths == [longest] and longest < 10
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    chex.assert_trees_all_close(cut.policy.params, whole.policy.params, atol=1e-4)
    chex.assert_trees_all_close(cut.critic.params, whole.critic.params, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_kl": 6.0, "beta": 0.0}, "target-kl needs a beta above 0"),
        ({"target_kl": 6.0, "kl_horizon": 10.0, "responses": 60}, "60 responses are more than 5 × kl-horizon 10"),
        ({"responses": 10, "minibatches": 4}, "10 responses do not divide into 4 minibatches"),
        ({"max_grad_norm": 0.0}, "max-grad-norm is 0.0; it must be more than 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_numbers_that_cannot_be_are_one_line(changes, message):
    with pytest.raises(UserError, match=message):
        ppo.PPO(**changes)
