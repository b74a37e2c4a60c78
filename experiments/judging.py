"""The judge that the flags name, and its verdicts on pairs of answers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from experiments.flags import JudgeFlags
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate import judged_win_rate, rate_metrics
from rlhf_jax.log import Run
from rlhf_jax.pretrained import Pretrained, load_policy
from rlhf_jax.rewards.judge import Ask, Verdicts, both_orders, comparing, letters
from rlhf_jax.rewards.server import ServerLimits, is_server, open_server


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
