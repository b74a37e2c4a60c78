"""The judges that the flags name, and their verdicts on pairs of answers: a model that is asked, and reward models
that only watch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.flags import JudgeFlags, names
from rlhf_jax.data.conversations import message
from rlhf_jax.data.formats import Comparison
from rlhf_jax.data.rejects import Place
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate import judged_win_rate, rate_metrics, win_rate
from rlhf_jax.log import Run
from rlhf_jax.pretrained import Pretrained, load_policy, load_reward_model
from rlhf_jax.revision import as_conversation, texts_of
from rlhf_jax.rewards.judge import Ask, Verdicts, both_orders, comparing, letters
from rlhf_jax.rewards.pairs import score_pairs
from rlhf_jax.rewards.server import ServerLimits, is_server, open_server
from rlhf_jax.row_file import read_rows
from rlhf_jax.scoring import document_rewards


class OpenJudge(NamedTuple):
    """A judge, and the numbers that it has so far."""

    ask: Ask
    metrics: Callable[[], dict[str, float]]
    """Costs by name; {} for a model of ours."""


def load_judge(cfg: JudgeFlags) -> Pretrained | None:
    """The model of the folder that --judge names; None where it names a server, or nothing.

    Raises UserError for a folder that cannot be read.
    """
    return load_policy(cfg.judge) if cfg.judge and not is_server(cfg.judge) else None


@contextmanager
def open_judge(
    cfg: JudgeFlags,
    run: Run,
    model: Pretrained | None,
    *,
    batch_size: int,
    max_length: int,
    questions: int | None = None,
) -> Iterator[OpenJudge]:
    """The judge of --judge, while the `with` lasts: the model that `load_judge` has found, or a server.

    A model of ours is asked `batch_size` questions at once, of `max_length` tokens at most. A server's answers are
    kept in the run's folder, or in --judge-cache. It may fail on --judge-max-failed of all `questions`, by default of
    those of each call. Raises UserError for a server that cannot be asked.
    """
    if model is not None:
        ask = letters(
            model, batch_size=batch_size, max_length=max_length, max_failed_share=cfg.judge_max_failed, total=questions
        )
        yield OpenJudge(ask, dict)
        return
    assert cfg.judge and cfg.judge_model
    limits = ServerLimits(
        at_once=cfg.judge_at_once, requests=cfg.judge_max_requests, seconds=cfg.judge_time_limit,
        failed_share=cfg.judge_max_failed, questions=questions,
    )  # fmt: skip
    cache = cfg.judge_cache or run.dir / "judge.sqlite"
    with open_server(cfg.judge, cfg.judge_model, cache, limits=limits, key_variable=cfg.judge_key) as server:
        try:
            yield OpenJudge(server.ask, server.metrics)
        finally:
            if server.metrics()["judge_answers"]:  # which are in the run's folder, and were paid for
                run.keep_folder()


def judged(
    judge: OpenJudge, prompts: Sequence[str], ours: Sequence[str], theirs: Sequence[str]
) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """The win rate of our answers by a judge who sees each pair in both orders, and the verdicts, as columns.

    Pairs on which the judge fails are left out of the rates, and counted. Raises UserError when none is left.
    """
    verdicts = both_orders(comparing(judge.ask), prompts, ours, theirs)
    told = ~np.isnan(verdicts.shown_first + verdicts.shown_second)
    if not told.any():
        raise UserError(f"the judge has failed on all of {len(prompts)} pairs")
    rates, count = judged_win_rate(*(found[told] for found in verdicts)), int(told.sum())
    metrics = judge.metrics() | rate_metrics("win_rate_judge", rates.win, count)
    metrics |= rate_metrics("judge_consistent", rates.consistent, count)
    metrics |= rate_metrics("judge_takes_first", rates.first_shown, count)
    columns = {name: [or_none(verdict) for verdict in getattr(verdicts, name)] for name in Verdicts._fields}
    return metrics | {"judge_failed": 1 - count / len(prompts)}, columns


def or_none(number: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return None if np.isnan(number) else float(number)


def load_watched(cfg: Any, run: Run) -> dict[str, Pretrained]:
    """The watched reward models by their names.

    Raises UserError for one that cannot be read, and for two of the same name.
    """
    run.inputs(watch=names(cfg.watch))
    found: dict[str, Pretrained] = {}
    for folder in names(cfg.watch):
        name, model = Path(folder).name, load_reward_model(folder, cfg.layout())
        if name in found:
            raise UserError(f"--watch: two models are called {name!r}: their metrics could not be told apart")
        for note in model.notes:
            run.say(note)
        found[name] = model
    return found


def watch_revisions(cfg: Any, run: Run, watched: dict[str, Pretrained], batch_size: int) -> dict[str, float]:
    """How often each watched reward model scores a revision higher than the answer, by the revision's number.

    A revision that repeats the answer makes no pair.
    """
    chains = [row for row in read_rows(run.dir / "chains.jsonl") if all(texts_of(row))]
    metrics: dict[str, float] = {}
    for name, model in watched.items():
        score, length = partial(document_rewards, model, batch_size=batch_size), model.config.max_length
        for number in range(1, cfg.revisions + 1):
            pairs = [revised_pair(row, number) for row in chains]
            try:
                found = score_pairs(score, f"revision {number}", pairs, model.tokenizer, max_length=length)
            except UserError as error:  # it only measures
                run.warn(f"{name} cannot be asked about revision {number}: {error}")
                continue
            for note in found.notes:
                run.say(note)
            rate, count = win_rate(found.chosen, found.rejected), len(found.kept)
            metrics |= rate_metrics(f"{name}_prefers_revision_{number}", rate, count)
            run.say(f"{name} prefers revision {number} to the answer in {rate.rate:.0%} of {count} chains")
    return metrics


def revised_pair(row: dict[str, Any], number: int) -> Comparison:
    """A revision of a chain and its answer, as if the revision were preferred."""
    texts = texts_of(row)
    answers = tuple((message("assistant", texts[side]),) for side in (number, 0))
    return Comparison(as_conversation(row["prompt"]), answers, (0, 1), Place("chains.jsonl", row["row"] + 1))
