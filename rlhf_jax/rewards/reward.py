"""The one type of what scores answers, and how several scores become one.

A reward that reads tokens is traceable: an iteration of PPO stays one compiled program. A reward that reads texts (a
Python function, a verifier, a model with another tokenizer) runs on the host, between two programs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlhf_jax.batches import Tokens
from rlhf_jax.errors import UserError
from rlhf_jax.types import Metrics, Params, ScalarLike

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or messages {"role": …, "content": …}."""
Completion = Prompt
"""A text where the prompt is one, otherwise a list with the assistant's message."""
Columns = Mapping[str, Sequence[Any]]
"""The rows' other fields by name, each as long as the completions."""


class HostScores(NamedTuple):
    """Scores of B answers, and what happened on the way to them."""

    scores: Float[np.ndarray, " B"]
    """NaN where the reward does not apply."""
    errors: int = 0
    """Answers that could not be scored; each has the reward's `failed_score`."""
    timeouts: int = 0
    """Answers that took longer than the limit; they, too, have the `failed_score`."""
    shortened: int = 0
    """Answers whose prompt lost its beginning to fit the scorer's context."""
    first_error: str = ""
    """Why the first of those answers has no score of its own."""


class Part(NamedTuple):
    """Where answers stand in a batch that is scored part by part."""

    rows: Int[np.ndarray, " N"]
    """Their numbers."""
    total: int
    """Answers of the batch."""


class TextScorer(Protocol):
    """Scores answers by their texts, on the host."""

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        columns: Columns,
        part: Part | None = None,
    ) -> HostScores:
        """Scores of answers, whose arguments `trl_forms` makes. They are a whole batch, or a part of one.

        Raises UserError where more than the reward's `max_failed_share` of the batch fails.
        """


class Reward(NamedTuple):
    """A scorer of answers: by their tokens, with parameters, or by their texts. One of the two functions is None."""

    name: str
    """Its metrics are called reward/<name>/…."""
    weight: float
    on_tokens: Callable[[Params, Tokens], Float[Array, " B"]] | None = None
    """score(params, tokens): traceable. NaN where it does not apply."""
    params: Params = None
    """The parameters of `on_tokens`: an argument of the compiled program, not a constant in it."""
    on_texts: TextScorer | None = None
    """score(prompts, completions, columns), on the host."""
    max_failed_share: float = 1.0
    """The share of a batch's answers on which `on_texts` may fail."""
    streams: bool = False
    """Whether `on_texts` may be given the answers of a batch as they end. A score does not depend, to the last bit, on
    the answers that are scored with it, and no device of the run is used."""

    @property
    def traceable(self) -> bool:
        """Whether it can stand inside of a compiled program."""
        return self.on_tokens is not None


def check_rewards(rewards: Sequence[Reward]) -> None:
    """Raises UserError without any reward and for two of one name, ValueError for one that scores nothing."""
    if not rewards:
        raise UserError("there is no reward: give --reward-model FOLDER, --reward FILE.py:NAME, or both")
    names = [reward.name for reward in rewards]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two rewards are called {twice[0]!r}: their metrics could not be told apart")
    for reward in rewards:
        if (reward.on_tokens is None) == (reward.on_texts is None):
            raise ValueError(f"reward {reward.name!r} must score either tokens or texts")


def weights_of(rewards: Sequence[Reward]) -> dict[str, float]:
    """Name -> weight, in the order of the rewards."""
    return {reward.name: reward.weight for reward in rewards}


def params_of(rewards: Sequence[Reward]) -> dict[str, Params]:
    """Name -> parameters of the traceable rewards: what a compiled program is given for `score_tokens`."""
    return {reward.name: reward.params for reward in rewards if reward.on_tokens is not None}


def score_tokens(
    rewards: Sequence[Reward], params: Mapping[str, Params], tokens: Tokens
) -> dict[str, Float[Array, " B"]]:
    """Name -> scores by the traceable rewards; the others are left out. Traceable in `params` and `tokens`."""
    scorers = {reward.name: reward.on_tokens for reward in rewards if reward.on_tokens is not None}
    return {name: score(params[name], tokens) for name, score in scorers.items()}


def score_texts(
    rewards: Sequence[Reward],
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    columns: Columns,
    part: Part | None = None,
) -> dict[str, HostScores]:
    """Name -> what each host reward found, on a whole batch or a part; the traceable rewards are left out.

    Raises UserError where a reward fails on more answers than it may.
    """
    scorers = {reward.name: reward.on_texts for reward in rewards if reward.on_texts is not None}
    return {name: score(prompts, completions, columns, part) for name, score in scorers.items()}


def joined(reward: Reward, parts: Sequence[Part], found: Sequence[HostScores]) -> HostScores:
    """The findings on all parts of a batch as one.

    Raises UserError where more than the reward's `max_failed_share` of the batch has failed.
    """
    count = parts[0].total
    scores = np.full(count, np.nan)
    for part, some in zip(parts, found, strict=True):
        scores[part.rows] = some.scores
    whole = added(found)._replace(scores=scores)
    failed = whole.errors + whole.timeouts
    if failed > reward.max_failed_share * count:
        raise UserError(too_many_failed(reward.name, failed, count, reward.max_failed_share, whole.first_error))
    return whole


def added(parts: Sequence[HostScores]) -> HostScores:
    """The findings of a host reward on several batches, one after the other."""
    return HostScores(
        np.concatenate([part.scores for part in parts]),
        sum(part.errors for part in parts),
        sum(part.timeouts for part in parts),
        sum(part.shortened for part in parts),
        next((part.first_error for part in parts if part.first_error), ""),
    )


def weighted_sum(
    scores: Mapping[str, Float[Array | np.ndarray, " B"]], weights: Mapping[str, ScalarLike]
) -> Float[Array, " B"]:
    """Σᵢ wᵢ sᵢ of each answer; a reward that does not apply to it (NaN) counts 0, and so does none that applies.

    Traceable; scores may come from the host. `unscored` tells where 0 means that no reward applies.
    Raises KeyError where a weight has no scores, ValueError without weights.
    """
    if not weights:
        raise ValueError("no weights")
    total: Any = None
    for name, weight in weights.items():
        values = jnp.asarray(scores[name], jnp.float32)
        term = weight * jnp.where(jnp.isnan(values), 0.0, values)
        total = term if total is None else total + term
    return total


def unscored(scores: Mapping[str, Float[Array | np.ndarray, " B"]]) -> Float[Array, " B"]:
    """1 for each answer to which no reward applies, 0 for the others. Traceable."""
    nowhere = jnp.stack([jnp.isnan(jnp.asarray(some)) for some in scores.values()]).all(axis=0)
    return nowhere.astype(jnp.float32)


def score_metrics(scores: Mapping[str, Float[Array | np.ndarray, " B"]]) -> Metrics:
    """reward/<name>/mean, std and applies (a share) of each reward, and reward/unscored, a share. Traceable.

    Mean and standard deviation are over the answers to which the reward applies, NaN where it applies to none.
    """
    metrics: Metrics = {}
    for name, some in scores.items():
        values = jnp.asarray(some, jnp.float32)
        metrics[f"reward/{name}/mean"] = jnp.nanmean(values)
        metrics[f"reward/{name}/std"] = jnp.nanstd(values)
        metrics[f"reward/{name}/applies"] = (~jnp.isnan(values)).mean(dtype=jnp.float32)
    return metrics | {"reward/unscored": unscored(scores).mean()}


def host_metrics(found: Mapping[str, HostScores]) -> dict[str, float]:
    """reward/<name>/errors, timeouts and shortened of each host reward: numbers of answers."""
    return {
        f"reward/{name}/{count}": float(getattr(some, count))
        for name, some in found.items()
        for count in ("errors", "timeouts", "shortened")
    }


def trl_forms(prompts: Sequence[Prompt], texts: Sequence[str]) -> tuple[list[Prompt], list[Completion]]:
    """Prompts and completions as TRL gives them to a reward function.

    A prompt that is a text has a text as its completion; one that is messages becomes a list, and its completion is
    [{"role": "assistant", "content": text}].
    """
    pairs = list(zip(prompts, texts, strict=True))
    given: list[Prompt] = [
        prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt] for prompt, _ in pairs
    ]
    answers: list[Completion] = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}] for prompt, text in pairs
    ]
    return given, answers


def refuse_failures(who: str, failures: Mapping[int, str], count: int, max_share: float) -> None:
    """Raises UserError when more than `max_share` of `count` answers failed. `failures`: answer -> why."""
    if len(failures) > max_share * count:
        raise UserError(too_many_failed(who, len(failures), count, max_share, first_failure(failures)))


def first_failure(failures: Mapping[int, str]) -> str:
    """The first answer that failed, and why; "" without one."""
    return f"answer {min(failures)}: {failures[min(failures)]}" if failures else ""


def too_many_failed(who: str, failed: int, count: int, max_share: float, first: str) -> str:
    """The message that says so."""
    return (
        f"{who}: it failed on {failed} of {count} answers ({failed / count:.0%}; at most {max_share:.0%} may); {first}"
    )
