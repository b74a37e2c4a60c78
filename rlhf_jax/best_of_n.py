"""Best of n: of n answers to a prompt the one that a reward likes best."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from rlhf_jax.batches import Completions, Prompts
from rlhf_jax.data.tokens import take
from rlhf_jax.evaluate import best_of_n_kl, best_of_n_mean

Score = Callable[[Prompts, Completions], np.ndarray]
"""score(prompts, completions) -> [B]."""


class Pool(NamedTuple):
    """N answers to each of P prompts: rows p·N … p·N + N − 1 are those to prompt p."""

    prompts: Prompts
    answers: Completions
    scores: Float[np.ndarray, "P N"]
    values: Mapping[str, Float[np.ndarray, "P N"]]
    """Other scores of the answers by their names, such as the true utility, that no answer is chosen by."""

    def best(self) -> Int[np.ndarray, " P"]:
        """The row of each prompt's best answer; of equal ones the first."""
        return np.arange(len(self.scores)) * self.scores.shape[1] + self.scores.argmax(axis=1)

    def first(self) -> Int[np.ndarray, " P"]:
        """The row of each prompt's first answer: a random one, for it was drawn without a look at the scores."""
        return np.arange(len(self.scores)) * self.scores.shape[1]


def sample_pools(
    sample: Callable[[Prompts], Completions],
    score: Score,
    prompts: Prompts,
    n: int,
    *,
    rows: int,
    judges: Mapping[str, Score] | None = None,
) -> Iterator[Pool]:
    """Pools of `n` answers, for as many prompts at once as make about `rows` answers.

    `sample(prompts)` answers each prompt once, by its row. `judges` give the pools' values.
    What is in memory does not grow with the number of prompts.
    """
    size = prompts_a_pool(n, rows)
    for start in range(0, len(prompts.row), size):
        some = take(prompts, np.arange(start, min(start + size, len(prompts.row))).repeat(n))
        answers = sample(some)
        yield Pool(
            take(some, np.arange(0, len(some.row), n)), answers, np.asarray(score(some, answers)).reshape(-1, n),
            {name: np.asarray(judge(some, answers)).reshape(-1, n) for name, judge in (judges or {}).items()},
        )  # fmt: skip


def prompts_a_pool(n: int, rows: int) -> int:
    """The prompts of a pool, so that it has about `rows` answers."""
    return max(1, rows // n)


def powers_up_to(n: int) -> list[int]:
    """1, 2, 4, … and n."""
    return [2**i for i in range(n.bit_length()) if 2**i < n] + [n]


def best_of_n_metrics(pool: Pool, n: int) -> dict[str, float]:
    """Mean score, and mean of each of the pool's values, of the best of n answers, from a pool of at least as many.

    `kl_bound` is in nats a response; `score_se` and the like are standard errors over prompts. A prompt with an answer
    that has no value, NaN, is left out of the mean of that value: `<name>_prompts` then counts those that are in it.
    """
    found = {"kl_bound": float(best_of_n_kl(n))}
    for name, values in {"score": None, **pool.values}.items():
        means = best_of_n_mean(pool.scores, n, values)
        told = means[~np.isnan(means)] if values is not None else means
        if len(told) < len(means):
            found[f"{name}_prompts"] = float(len(told))
        if len(told):
            found |= {name: float(told.mean()), f"{name}_se": float(told.std() / np.sqrt(len(told)))}
    return found
