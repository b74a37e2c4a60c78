"""Measures policies on held-out prompts: scores, lengths, true utility where it is known, win rates."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from rlhf_jax.batches import Completions, Prompts, Rankings, Tokens
from rlhf_jax.data.tokens import join, take
from rlhf_jax.diagnostics import distinct_n, duplicate_share
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate import pass_at_k, win_rate
from rlhf_jax.log import Run
from rlhf_jax.models import Transformer
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.rewards.reward import (
    Completion,
    Prompt,
    Reward,
    params_of,
    score_texts,
    score_tokens,
    trl_forms,
    weighted_sum,
    weights_of,
)
from rlhf_jax.scored_groups import is_checker
from rlhf_jax.scoring import answer_logprobs, score_in_batches
from rlhf_jax.tasks.task import PromptRow, PromptSets, Task
from rlhf_jax.types import Params

SHOWN = 24
"""Held-out prompts whose answers are written to examples.jsonl."""
PolicySampler = Callable[[Params, Prompts, int], Completions]
"""sampler(params, prompts, number) -> numpy Completions; other numbers give other answers."""
AnswerScorer = Callable[[Prompts, Completions], np.ndarray]
"""scorer(prompts, completions) -> [B], a number for each answer."""


def make_utility_measure(task: Task, sampler: PolicySampler) -> Callable[[Params, int], dict[str, Any]]:
    """Returns measure(params, number) -> {"utility": mean true utility of samples}; {} where utility is not known."""
    if task.judge is None:
        return lambda params, number: {}
    judge, heldout = task.judge, task.prompts().heldout
    return lambda params, number: {"utility": judge(heldout, sampler(params, heldout, number)).mean()}


def make_policy_measure(
    task: Task, sampler: PolicySampler, eval_batch_size: int
) -> Callable[[Params, Params, int], dict[str, Any]]:
    """Returns measure(policy, reference, number) -> metrics of samples for the held-out prompts.

    They are the KL to the reference in nats a response (k₁), tokens a response, the shares of answers that end, of
    distinct pairs of tokens and of copies, and true utility where it is known.
    """
    heldout, base = task.prompts().heldout, task.base
    logprobs = score_in_batches(partial(answer_logprobs, Transformer(base.config)), eval_batch_size)

    def measure(policy: Params, reference: Params, number: int) -> dict[str, Any]:
        completions = sampler(policy, heldout, number)
        tokens = join(heldout, completions, pad_id=base.pad_id)
        ids = [some[real].tolist() for some, real in zip(completions.tokens, completions.mask, strict=True)]
        metrics = {
            "kl_k1": (logprobs(policy, tokens) - logprobs(reference, tokens)).mean(),
            "length": completions.mask.sum(axis=1).mean(),
            "ended": base.ended(completions).mean(),
            "distinct_2": distinct_n(ids, 2),
            "duplicates": duplicate_share(ids),
        }
        if task.judge is not None:
            metrics["utility"] = task.judge(heldout, completions).mean()
        return metrics

    return measure


def make_watch(
    task: Task, sampler: PolicySampler, scorers: Sequence[Reward]
) -> Callable[[Params, int], dict[str, Any]]:
    """Returns watch(policy, number) -> metrics: watch/<name>, each scorer's mean score of samples for the held-out
    prompts, and `watched`, the mean over scorers."""
    sets = task.prompts()
    heldout, rows = sets.heldout, sets.heldout_rows

    def watch(policy: Params, number: int) -> dict[str, Any]:
        completions = sampler(policy, heldout, number)
        found: dict[str, Any] = {
            name: some.scores
            for name, some in score_texts(scorers, *as_texts(task.base, rows, heldout, completions)).items()
        }
        tokens = join(heldout, completions, pad_id=task.base.pad_id)
        found |= score_tokens(scorers, params_of(scorers), tokens)
        means = {f"watch/{name}": np.nanmean(scores) for name, scores in found.items()}
        return means | {"watched": np.mean(list(means.values()))}

    return watch


def as_texts(
    base: Pretrained, rows: Sequence[PromptRow], prompts: Prompts, completions: Completions
) -> tuple[list[Prompt], list[Completion], dict[str, list[Any]]]:
    """Sampled answers as arguments of a reward function: (prompts, completions, columns).

    `prompts.row` indexes `rows`. Where a row lacks a column, its value is None.
    """
    asked = [rows[number] for number in np.asarray(prompts.row)]
    names = dict.fromkeys(name for row in asked for name in row.columns if name not in ("prompt", "completion"))
    columns = {name: [row.columns.get(name) for row in asked] for name in names}
    return *trl_forms([row.prompt for row in asked], base.read_answers(completions)), columns


def make_reward_scorer(
    task: Task, rewards: Sequence[Reward], no_end_score: float | None, *, training: bool = False
) -> AnswerScorer:
    """scorer(prompts, completions) -> the weighted sum of rewards, and `no_end_score` for answers that do not end.

    That is the rule of PPO; None has no such rule. The prompts are held-out ones, or those of training: their rows are
    the task's `heldout_rows`, or its `rows`.
    """
    scorers = {reward.name: make_single_scorer(task, reward, training=training) for reward in rewards}

    def scorer(prompts: Prompts, completions: Completions) -> np.ndarray:
        each = {name: score(prompts, completions) for name, score in scorers.items()}
        total = np.asarray(weighted_sum(each, weights_of(rewards)))
        return total if no_end_score is None else np.where(task.base.ended(completions), total, no_end_score)

    return scorer


def make_single_scorer(task: Task, reward: Reward, *, training: bool = False) -> AnswerScorer:
    """scorer(prompts, completions) -> one reward of answers to held-out prompts; NaN where it does not apply."""
    sets = task.prompts()
    base, rows = task.base, sets.rows if training else sets.heldout_rows
    if reward.on_tokens is not None:
        score = score_in_batches(reward.on_tokens, task.eval_batch_size)
        return lambda prompts, answers: score(reward.params, join(prompts, answers, pad_id=base.pad_id))

    def on_texts(prompts: Prompts, completions: Completions) -> np.ndarray:
        return score_texts([reward], *as_texts(base, rows, prompts, completions))[reward.name].scores

    return on_texts


def pass_metrics(
    task: Task, name: str, policy: Params, sampler: PolicySampler, rewards: Sequence[Reward], samples: int
) -> dict[str, float]:
    """pass@1, 2, 4, … and pass@samples of a policy on held-out prompts, from so many answers to each.

    They are of the first reward that `is_checker`, weights aside; {} without one. A prompt to which it does not apply
    is left out. Metrics are called <name>_pass@<k>.
    """
    heldout = task.prompts().heldout
    answers = [sampler(policy, heldout, 200 + number) for number in range(samples)]
    ks = [2**i for i in range(samples.bit_length()) if 2**i < samples] + [samples]
    for reward in rewards:
        score = make_single_scorer(task, reward)
        scores = np.stack([score(heldout, some) for some in answers], axis=1)
        if is_checker(scores):
            right = scores[~np.isnan(scores).any(axis=1)].sum(axis=1)
            return {f"{name}_pass@{k}": float(pass_at_k(right, samples, k).mean()) for k in ks if len(right)}
    return {}


def make_token_scorer(task: Task, score: Callable[[Tokens], np.ndarray]) -> AnswerScorer:
    """scorer(prompts, completions) of a function of their tokens, such as an implicit reward."""
    return lambda prompts, completions: score(join(prompts, completions, pad_id=task.base.pad_id))


def compare_policies(
    run: Run,
    task: Task,
    before: tuple[str, Params],
    after: tuple[str, Params],
    sampler: PolicySampler,
    scorer: AnswerScorer,
    sets: PromptSets | None = None,
) -> dict[str, float]:
    """Compares two named policies on held-out prompts, by default the task's, one sample each.

    Writes the first answers to examples.jsonl.

    Metrics begin with the policy's name (sft_score, ppo_utility, …), and with "shifted_" on prompts of another
    distribution. `win_rate` says how often `after` beats `before` by true utility, `score_win_rate` by the scorer.
    """
    names, policies = zip(before, after, strict=True)
    sets = task.prompts() if sets is None else sets
    metrics: dict[str, Any] = {}
    for prefix, prompts in [("", sets.heldout), ("shifted_", sets.shifted)]:
        if prompts is None:
            continue
        # Each policy samples with keys of its own: the same keys make answers alike, and win rates too high.
        samples = [sampler(params, prompts, 100 + side) for side, params in enumerate(policies)]
        for name, completions in zip(names, samples, strict=True):
            metrics[f"{prefix}{name}_length"] = completions.mask.sum(axis=1).mean()
            metrics[f"{prefix}{name}_ended"] = task.base.ended(completions).mean()
        columns: dict[str, list[np.ndarray]] = {}
        columns["score"] = [scorer(prompts, some) for some in samples]
        metrics[f"{prefix}score_win_rate"] = win_rate(columns["score"][1], columns["score"][0])[0]
        for name, scores in zip(names, columns["score"], strict=True):
            metrics[f"{prefix}{name}_score"] = scores.mean()
        if task.judge is not None:
            columns["utility"] = [task.judge(prompts, some) for some in samples]
            for name, utility in zip(names, columns["utility"], strict=True):
                metrics[f"{prefix}{name}_utility"] = utility.mean()
                metrics[f"{prefix}{name}_utility_se"] = utility.std() / np.sqrt(len(utility))
                metrics[f"{prefix}{name}_utility_std"] = utility.std()
            rate, low, high = win_rate(columns["utility"][1], columns["utility"][0])
            metrics |= {f"{prefix}win_rate": rate, f"{prefix}win_rate_low": low, f"{prefix}win_rate_high": high}
        if not prefix:
            write_examples(run, task.base, prompts, dict(zip(names, samples, strict=True)), columns)
    return {key: float(value) for key, value in metrics.items()}


def sample_examples(run: Run, task: Task, name: str, policy: Params, sampler: PolicySampler) -> dict[str, float]:
    """A policy's answers to the first held-out prompts, written to examples.jsonl; the share that ends by itself.

    {} and a line that says so where the task has no prompts, as plain text has none.
    """
    try:
        prompts = task.prompts().heldout
    except UserError as error:
        run.say(f"no examples: {error}")
        return {}
    some = take(prompts, np.arange(min(SHOWN, len(prompts.row))))
    completions = sampler(policy, some, 100)
    columns = {} if task.judge is None else {"utility": [task.judge(some, completions)]}
    write_examples(run, task.base, some, {name: completions}, columns)
    return {f"{name}_ended": float(task.base.ended(completions).mean())}


def write_pairs(run: Run, base: Pretrained, heldout: Rankings, scores: Float[np.ndarray, " N"]) -> None:
    """The first held-out comparisons, the preferred answer first, and the reward model's score of either."""
    if not run.first:
        return
    count = heldout.ranks.shape[1]
    with open(run.dir / "examples.jsonl", "w", encoding="utf-8") as file:
        for row, ranks in enumerate(np.asarray(heldout.ranks)[:SHOWN]):
            example: dict[str, Any] = {}
            for name, which in (("chosen", ranks.argmin()), ("rejected", ranks.argmax())):
                at = row * count + int(which)
                tokens: Tokens = take(heldout.responses, at)
                real = np.asarray(tokens.segment_ids) > 0
                ids, answer = np.asarray(tokens.inputs)[real], np.asarray(tokens.targets)[np.asarray(tokens.mask)]
                example["prompt"] = base.tokenizer.decode(ids[: len(ids) - len(answer)].tolist())
                example[name] = base.tokenizer.decode(answer.tolist(), skip_special_tokens=True)
                example[f"{name}_score"] = float(scores[at])
            file.write(json.dumps(example, ensure_ascii=False) + "\n")


def write_examples(
    run: Run,
    base: Pretrained,
    prompts: Prompts,
    samples: Mapping[str, Completions],
    columns: Mapping[str, list[np.ndarray]],
) -> None:
    """Writes the first prompts to the run's examples.jsonl, with each policy's answer and its numbers."""
    if not run.first:
        return
    texts = [base.read_answers(completions) for completions in samples.values()]
    with open(run.dir / "examples.jsonl", "w", encoding="utf-8") as file:
        for row, prompt in enumerate(base.read_prompts(prompts)[:SHOWN]):
            example: dict[str, Any] = {"prompt": prompt}
            for i, name in enumerate(samples):
                example[name] = texts[i][row]
                numbers = {f"{name}_{column}": float(values[i][row]) for column, values in columns.items()}
                example |= {key: number for key, number in numbers.items() if math.isfinite(number)}
            file.write(json.dumps(example, ensure_ascii=False) + "\n")
