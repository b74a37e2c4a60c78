"""Reward functions of the user: `FILE.py:NAME`, with the signature that TRL's users have.

    def reward(prompts, completions, **columns) -> list[float | None]: ...

`columns` are the rows' other fields, each a list as long as `completions`; None says that the reward does not apply
to an answer. A function without **columns is given the columns that it names. It runs in processes of its own
(`workers.py`), which are killed when an answer takes too long, and is called with some of a batch's answers at a
time: a score must not depend on the other answers. What it prints goes to standard error.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.hosts import many
from rlhf_jax.rewards import HOMES
from rlhf_jax.rewards.reward import (
    Columns,
    Completion,
    HostScores,
    Part,
    Prompt,
    Reward,
    first_failure,
    joined,
    refuse_failures,
)
from rlhf_jax.rewards.worker import Reply, Setup
from rlhf_jax.rewards.workers import Failed, Pool
from rlhf_jax.sharding import host_share, in_shares


class Function(NamedTuple):
    """A function in a file, and the file as it was read."""

    path: str
    name: str
    source: bytes

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"


class Limits(NamedTuple):
    """How a function runs, and what it may take."""

    seconds: float
    """For an answer; a call with n answers may take n times as long."""
    start_seconds: float = 120.0
    """For loading the file, with what it imports."""
    memory: int | None = None
    """Bytes of address space of a worker process; None: no limit."""
    jobs: int = 1
    """Worker processes."""
    chunk: int = 16
    """Answers in a call."""


CHECKERS = {name: f"{name}_reward" for name in ("math", "strict_math", "code", "ifeval", "tag", "boxed")}
"""The reward functions that are here already, as flags name them: math, strict_math, code, ifeval, tag, boxed."""


def is_function(text: str) -> bool:
    """Whether a flag's text names a function, and not a folder."""
    return text in CHECKERS or ".py:" in text


def parse(text: str) -> Function:
    """Reads "FILE.py:NAME" and the file, or the file of one of the CHECKERS by its name.

    Raises UserError for another form and a file that cannot be read.
    """
    if text in CHECKERS:
        text = f"{Path(__file__).with_name(HOMES[CHECKERS[text]])}.py:{CHECKERS[text]}"
    path, colon, name = text.rpartition(":")
    if not colon or not path or not name.isidentifier():
        raise UserError(
            f"reward {text!r}: a function is named as FILE.py:NAME, such as rewards.py:brevity; a checker that is here"
            f" already as {', '.join(CHECKERS)}"
        )
    try:
        source = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"reward {text!r}: {path}: {error.strerror}") from None
    return Function(str(Path(path).absolute()), name, source)


@contextmanager
def python_reward(
    function: Function, limits: Limits, *, name: str, weight: float, failed_score: float, max_failed_share: float
) -> Iterator[Reward]:
    """The function as a host reward, while the `with` lasts; at its end no worker process is left.

    An answer on which the function raises, takes too long, kills its process or gives no finite number scores
    `failed_score` and is counted. Raises UserError when the function cannot be loaded; when it returns something
    else than as many numbers or None as there are answers; and when more than `max_failed_share` of the answers of
    one batch fail.
    """
    with _pool(function, limits) as pool:
        score_some = partial(
            score_answers, pool, function, limits, failed_score=failed_score, max_failed_share=max_failed_share
        )

        def score(
            prompts: Sequence[Prompt], completions: Sequence[Completion], columns: Columns, part: Part | None = None
        ) -> HostScores:
            size = len(completions)
            if not many():
                return score_some(prompts, completions, columns, part or Part(np.arange(size), size))
            # Each process asks the function about the answers that its devices have.
            parts = [Part(rows, size) for rows in np.array_split(np.arange(size), host_share()[1])]

            def score_share(mine: Part) -> list[Any]:
                found = score_some(*_rows(mine.rows, prompts, completions, columns), mine)
                return list(found._replace(scores=found.scores.tolist()))

            found = [HostScores(np.asarray(scores), *rest) for scores, *rest in in_shares(score_share, parts)]
            return joined(reward, parts, found)

        reward = Reward(name, weight, on_texts=score, max_failed_share=max_failed_share, streams=True)
        yield reward


def score_answers(
    pool: Pool,
    function: Function,
    limits: Limits,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    columns: Columns,
    part: Part,
    *,
    failed_score: float,
    max_failed_share: float,
) -> HostScores:
    """Scores of a part of a batch. Where a call fails, its answers are tried one by one: only culprits have failed.

    Raises UserError as `python_reward` does.
    """
    _check_columns(function, columns, len(prompts), len(completions))
    count = len(completions)
    scores = np.full(count, np.nan)
    failures: dict[int, Failed] = {}

    def reasons() -> dict[int, str]:
        return {int(part.rows[row]): why.reason for row, why in failures.items()}

    chunks = [range(start, min(start + limits.chunk, count)) for start in range(0, count, limits.chunk)]
    again: list[range] = []
    for calls in (chunks, again):  # the first fills the second
        requests = [_rows(rows, prompts, completions, columns) for rows in calls]
        for number, reply in pool.map(requests, [len(rows) * limits.seconds for rows in calls]):
            rows, outcome = calls[number], _outcome(function, reply)
            if isinstance(outcome, Failed) and len(rows) > 1:
                again += [range(row, row + 1) for row in rows]
            elif isinstance(outcome, Failed):
                failures[rows.start] = outcome
            else:
                scores[rows.start : rows.stop] = [np.nan if value is None else value for value in outcome]
                for row, value in zip(rows, outcome, strict=True):
                    if value is not None and not math.isfinite(value):
                        failures[row] = Failed(f"it returned {value}", timeout=False)
            refuse_failures(str(function), reasons(), part.total, max_failed_share)
    scores[list(failures)] = failed_score
    timeouts = sum(why.timeout for why in failures.values())
    return HostScores(scores, len(failures) - timeouts, timeouts, first_error=first_failure(reasons()))


def _rows(
    rows: Iterable[int], prompts: Sequence[Prompt], completions: Sequence[Completion], columns: Columns
) -> tuple[list[Prompt], list[Completion], dict[str, list[Any]]]:
    rows = list(rows)
    of_columns = {name: [values[row] for row in rows] for name, values in columns.items()}
    return [prompts[row] for row in rows], [completions[row] for row in rows], of_columns


def _pool(function: Function, limits: Limits) -> Pool:
    root = str(Path(__file__).resolve().parents[2])
    setup = Setup(function.path, function.name, function.source, limits.memory, root)
    return Pool(setup, jobs=limits.jobs, start_seconds=limits.start_seconds)


def _outcome(function: Function, reply: Reply | Failed) -> list[float | None] | Failed:
    if isinstance(reply, Failed):
        return reply
    kind: str = reply[0]
    value: Any = reply[1]
    if kind == "refused":
        raise UserError(f"{function}: {value}")
    return Failed(value, timeout=False) if kind == "raised" else value


def _check_columns(function: Function, columns: Columns, prompts: int, completions: int) -> None:
    if taken := {"prompts", "completions"} & set(columns):
        raise UserError(f"{function}: the rows have a field {min(taken)!r}, which is what a function is given itself")
    sizes: dict[str, Any] = {"prompts": prompts} | {name: len(values) for name, values in columns.items()}
    for name, size in sizes.items():
        if size != completions:
            raise ValueError(f"{size} {name} for {completions} completions")
