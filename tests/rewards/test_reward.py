"""Several rewards as one: the weighted sum, where none applies, and what is logged of each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax.batches import Tokens
from rlhf_jax.errors import UserError
from rlhf_jax.rewards.reward import (
    HostScores,
    Reward,
    check_rewards,
    host_metrics,
    params_of,
    refuse_failures,
    score_metrics,
    score_texts,
    score_tokens,
    trl_forms,
    unscored,
    weighted_sum,
    weights_of,
)

NAN = float("nan")
SCORES = {
    "kind": np.array([1.0, 2.0, NAN, NAN, 3.0]),
    "short": np.array([NAN, -4.0, 5.0, NAN, np.inf]),
}
WEIGHTS = {"short": 0.5, "kind": 2.0}
# By hand: 2·1; 2·2 − 0.5·4; 0.5·5; nothing; inf.
TOTAL = [2.0, 2.0, 2.5, 0.0, np.inf]


def length(params, tokens):
    return params * tokens.mask.sum(axis=1)


def texts(prompts, completions, columns, part=None):
    rows = zip(prompts, completions, columns["a"], strict=True)
    return HostScores(np.array([float(len(p) + len(c) + a) for p, c, a in rows]), errors=1)


REWARDS = (
    Reward("host", 3.0, on_texts=texts),
    Reward("tokens", 1.0, on_tokens=length, params=jnp.asarray(0.5)),
)


def tokens_of(mask):
    ids = jnp.zeros(mask.shape, jnp.int32)
    return Tokens(ids, ids, mask, ids, ids)


@pytest.mark.parametrize("through", [lambda f: f, jax.jit], ids=["host", "jit"])
def test_sum_and_unscored(through):
    assert_array_equal(through(weighted_sum)(SCORES, WEIGHTS), TOTAL)
    assert_array_equal(through(unscored)(SCORES), [0, 0, 0, 1, 0])


def test_one_reward_of_weight_one_is_itself_to_the_bit():
    scores = np.random.default_rng(0).normal(size=64).astype(np.float32)
    assert_array_equal(jax.jit(weighted_sum)({"a": scores}, {"a": 1.0}), scores)


@pytest.mark.parametrize("through", [lambda f: f, jax.jit], ids=["host", "jit"])
def test_metrics_by_name(through):
    some = {"kind": SCORES["kind"], "never": np.full(5, NAN)}
    metrics = {name: float(value) for name, value in through(score_metrics)(some).items()}
    expected = {
        "reward/kind/mean": 2.0, "reward/kind/std": np.sqrt(2 / 3), "reward/kind/applies": 3 / 5,
        "reward/never/mean": NAN, "reward/never/std": NAN, "reward/never/applies": 0.0, "reward/unscored": 2 / 5,
    }  # fmt: skip
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)


def test_each_kind_scores_what_it_reads_and_the_two_join():
    mask = jnp.asarray([[True, True], [True, False]])
    program = jax.jit(lambda params, tokens: score_tokens(REWARDS, params, tokens))
    traced = program(params_of(REWARDS), tokens_of(mask))
    found = score_texts(REWARDS, ["p", "pp"], ["a", "b"], {"a": [0, 7]})
    assert [reward.traceable for reward in REWARDS] == [False, True]
    assert traced.keys() == {"tokens"} and found.keys() == {"host"}
    scores = traced | {name: some.scores for name, some in found.items()}
    assert_allclose(weighted_sum(scores, weights_of(REWARDS)), [3 * 2 + 1, 3 * 10 + 0.5])
    assert host_metrics(found) == {
        "reward/host/errors": 1.0,
        "reward/host/timeouts": 0.0,
        "reward/host/shortened": 0.0,
    }
    # Parameters are arguments: others need no other program.
    assert_allclose(program({"tokens": jnp.asarray(2.0)}, tokens_of(mask))["tokens"], [4.0, 2.0])
    assert program._cache_size() == 1


@pytest.mark.parametrize(
    "rewards, error, message",
    [
        ((), UserError, "no reward"),
        ((REWARDS[0], REWARDS[1]._replace(name="host")), UserError, "two rewards are called 'host'"),
        ((Reward("a", 1.0),), ValueError, "either tokens or texts"),
        ((Reward("a", 1.0, on_tokens=length, on_texts=texts),), ValueError, "either tokens or texts"),
    ],
)
def test_rewards_that_cannot_be_used(rewards, error, message):
    with pytest.raises(error, match=message):
        check_rewards(rewards)
    check_rewards(REWARDS)


def test_sums_that_cannot_be_made():
    with pytest.raises(KeyError, match="absent"):
        weighted_sum(SCORES, {"absent": 1.0})
    with pytest.raises(ValueError, match="no weights"):
        weighted_sum(SCORES, {})


def test_forms_keep_the_caller_s_messages():
    turn = {"role": "user", "content": "Hi"}
    prompts, completions = trl_forms(["Hi", (turn,)], ["a", "b"])
    assert prompts == ["Hi", [turn]] and completions == ["a", [{"role": "assistant", "content": "b"}]]
    prompts[1][0]["content"] = "changed"
    assert turn["content"] == "Hi"


def test_failures_are_refused_past_their_share():
    refuse_failures("f", {3: "late", 1: "early"}, 4, 0.5)
    with pytest.raises(UserError, match=r"f: it failed on 2 of 4 answers \(50%; at most 49% may\); answer 1: early"):
        refuse_failures("f", {3: "late", 1: "early"}, 4, 0.49)
