"""Pools of answers: each prompt's own, the same whatever is asked for at once, and the best of each."""

import numpy as np
from numpy.testing import assert_array_equal

from rlhf_jax.batches import Prompts
from rlhf_jax.best_of_n import best_of_n_metrics, powers_up_to, sample_pools
from rlhf_jax.evaluate import best_of_n_kl
from rlhf_jax.sampling.sampler import numpy_completions

PROMPTS = Prompts(np.arange(7)[:, None], np.ones((7, 1), bool), np.arange(7) + 50)


def sample(prompts):
    # An answer says its prompt, and its place in the call.
    place = np.arange(len(prompts.row))
    tokens = np.stack([prompts.row, place], axis=1)
    return numpy_completions(tokens, np.ones(tokens.shape, bool), np.zeros(tokens.shape, np.float32))


def score(prompts, answers):
    assert_array_equal(prompts.row, answers.tokens[:, 0])
    return (answers.tokens[:, 1] * 7919 % 13).astype(float)


def test_each_prompt_has_n_answers_and_the_best_of_them():
    pools = list(sample_pools(sample, score, PROMPTS, 4, rows=12, judges={"utility": lambda p, a: -score(p, a)}))
    assert [len(pool.scores) for pool in pools] == [3, 3, 1]
    assert np.concatenate([pool.prompts.row for pool in pools]).tolist() == PROMPTS.row.tolist()
    for pool in pools:
        assert_array_equal(pool.answers.tokens[:, 0], pool.prompts.row.repeat(4))
        assert_array_equal(pool.answers.tokens[pool.best(), 0], pool.prompts.row)
        assert_array_equal(score(pool.prompts, type(pool.answers)(*(x[pool.best()] for x in pool.answers))),
                           pool.scores.max(axis=1))  # fmt: skip
        assert_array_equal(pool.answers.tokens[pool.first(), 1] % 4, 0)
        assert_array_equal(pool.values["utility"], -pool.scores)


def test_more_answers_than_rows_still_make_a_pool():
    assert [len(pool.scores) for pool in sample_pools(sample, score, PROMPTS, 9, rows=4)] == [1] * 7


def test_the_best_of_more_scores_more_and_is_worth_less_where_the_score_is_the_opposite_of_the_truth():
    (pool,) = sample_pools(sample, score, PROMPTS, 8, rows=56, judges={"utility": lambda p, a: -score(p, a)})
    found = [best_of_n_metrics(pool, n) for n in powers_up_to(8)]
    assert powers_up_to(8) == [1, 2, 4, 8] and powers_up_to(6) == [1, 2, 4, 6] and powers_up_to(1) == [1]
    scores, truths = ([float(some[name]) for some in found] for name in ("score", "utility"))
    assert scores == sorted(scores) and truths == sorted(truths, reverse=True) and scores[0] < scores[-1]
    assert found[0]["score"] == pool.scores.mean() and found[-1]["score"] == pool.scores.max(axis=1).mean()
    assert [float(some["kl_bound"]) for some in found] == [float(best_of_n_kl(n)) for n in (1, 2, 4, 8)]


def test_a_prompt_with_an_answer_that_has_no_value_is_left_out_of_its_mean():
    def some(prompts, answers):
        return np.where(answers.tokens[:, 0] == 52, np.nan, -score(prompts, answers))

    judges = {"all": lambda p, a: -score(p, a), "some": some, "none": lambda p, a: np.full(len(p.row), np.nan)}
    (pool,) = sample_pools(sample, score, PROMPTS, 4, rows=28, judges=judges)
    found = best_of_n_metrics(pool, 2)
    told = np.flatnonzero(PROMPTS.row != 52)
    kept = pool._replace(scores=pool.scores[told], values={"some": pool.values["all"][told]})
    assert found["some"] == best_of_n_metrics(kept, 2)["some"] and found["some_prompts"] == 6
    assert "none" not in found and found["none_prompts"] == 0 and "all_prompts" not in found
