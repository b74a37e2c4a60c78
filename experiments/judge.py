"""A judge on comparisons that people have labelled: how far it agrees with them, and its labels as a file.

The judge is a language model, asked in both orders which of two answers is better (Zheng et al. 2023,
https://arxiv.org/abs/2306.05685); with --principle it is asked by that (Bai et al. 2022, §4.1,
https://arxiv.org/abs/2212.08073).
    python experiments/judge.py --judge FOLDER --comparisons FILE
    python experiments/judge.py --judge http://127.0.0.1:8000/v1 --judge-model NAME --comparisons FILE
It writes comparisons.jsonl to the run's folder, for `reward_model.py` and `dpo.py`: prompt, chosen, rejected, and the
probability that chosen is better, by the mean of both orders. Pairs on which the judge fails or has no preference are
left out and counted; verdicts.jsonl has all of them. A server is asked nothing twice: after a kill, --resume goes on
with the answers that the run's folder has.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from experiments.flags import Flags, JudgeFlags, RunFlags
from experiments.judging import OpenJudge, load_judge, open_judge, or_none
from experiments.reports import JUDGE_REPORT
from experiments.stages import say_notes
from rlhf_jax.cli import on_mesh, run_main, run_with_report
from rlhf_jax.data.conversations import Conversation
from rlhf_jax.data.suites import read_preferences
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.evaluate import judged_win_rate, length_baseline, rate_metrics, win_rate
from rlhf_jax.log import Run
from rlhf_jax.rewards.judge import COMPARE, Verdicts, both_orders, comparing, in_words

SHOWN = 20
"""Pairs in the report."""


@dataclass(frozen=True)
class ComparedFlags(Flags):
    """The comparisons, and how the judge is asked."""

    comparisons: str | None = None
    """A file, jsonl[.gz]: chosen and rejected (perhaps prompt), responses and ranks, LLMBar, or PandaLM's test set."""
    limit: int | None = None
    """Read at most so many rows."""
    principle: str = COMPARE
    """The question, such as "Choose the response that is less harmful."."""
    max_length: int = 2048
    """The most tokens of a question to a judge from a folder; the model's own limit if that is less."""
    batch_size: int = 16
    """Questions that a judge from a folder reads at once."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range and a question without words."""
        at_least(self, max_length=16, batch_size=1)
        if self.limit is not None:
            at_least(self, limit=1)
        if not self.principle.strip():
            raise UserError("--principle is empty: what is the judge to be asked?")
        super().__post_init__()


@dataclass(frozen=True)
class Config(RunFlags, JudgeFlags, ComparedFlags):
    """Judges comparisons."""


class Pair(NamedTuple):
    """Two answers, of which people preferred the first."""

    prompt: Conversation
    chosen: str
    rejected: str
    line: int


def read_pairs(path: str, limit: int | None, run: Run) -> list[Pair]:
    """Every pair of answers of each row that people rank differently. The run says which rows are not used.

    Answers that call a tool are left out: a judge reads words. Raises UserError for a file that cannot be read, and
    when no pair is left.
    """
    found = read_preferences(path, limit)
    for note in found.notes:
        run.say(note)
    pairs, calls = [], 0
    for row in found.pairs:
        order = sorted(range(len(row.ranks)), key=row.ranks.__getitem__)
        for better, worse in combinations(order, 2):
            (good,), (bad,) = row.responses[better], row.responses[worse]
            if row.tools or good.get("tool_calls") or bad.get("tool_calls"):
                calls += 1
            elif row.ranks[better] < row.ranks[worse]:
                pairs.append(Pair(row.prompt, good["content"], bad["content"], row.place.line))
    if calls:
        run.say(f"{path}: {calls} pairs with tools are left out: a judge reads words")
    if not pairs:
        raise UserError(f"{path}: no pair of answers can be judged")
    return pairs


def ask(cfg: Config, judge: OpenJudge, pairs: Sequence[Pair], run: Run) -> Verdicts:
    """The verdicts on all pairs; logs how the judge does on those so far."""
    found: list[Verdicts] = []
    size = 4 * cfg.batch_size
    starts = range(0, len(pairs), size)
    show = ("agreement", "takes_first", "failed")
    for start in run.progress("judge", starts, show=show):
        some = pairs[start : start + size]
        texts = [in_words(pair.prompt) for pair in some], [pair.chosen for pair in some], [p.rejected for p in some]
        found.append(both_orders(comparing(judge.ask, cfg.principle), *texts))
        so_far = Verdicts(*(np.concatenate(one) for one in zip(*found, strict=True)))
        metrics = measure(so_far) | judge.metrics()
        run.log("judge", start + len(some), {name.removeprefix("judge_"): metrics[name] for name in metrics})
    return so_far


def measure(verdicts: Verdicts) -> dict[str, float]:
    """A judge beside people, who prefer the response that `verdicts` are about; pairs that failed are left out.

    Agreement has its interval and its standard error, ties counting half: of the mean of both orders, and of each.
    All but judge_failed are NaN when every pair has failed.
    """
    both = np.stack(verdicts)
    told = ~np.isnan(both).any(axis=0)
    first, second = both[:, told]
    mean = (first + second) / 2
    metrics = {"judge_failed": float(1 - told.mean()), "judge_pairs": float(len(mean))}
    if not len(mean):
        return metrics | {f"judge_{name}": np.nan for name in ("agreement", "orders_agree", "takes_first")}
    for name, sides in (("agreement", mean), ("agreement_first", first), ("agreement_second", second)):
        agrees = (1 + np.sign(sides - 0.5)) / 2
        metrics |= rate_metrics(f"judge_{name}", win_rate(sides, np.full(len(sides), 0.5)), len(sides))
        metrics |= {f"judge_{name}_se": float(agrees.std() / np.sqrt(len(sides)))}
    rates = judged_win_rate(first, second)
    metrics |= rate_metrics("judge_orders_agree", rates.consistent, len(mean))
    metrics |= rate_metrics("judge_takes_first", rates.first_shown, len(mean))
    return metrics | {
        "judge_mean_first": float((first + 1 - second).mean() / 2), "judge_ties": float((mean == 0.5).mean()),
    }  # fmt: skip


def write(pairs: Sequence[Pair], verdicts: Verdicts, folder: Path) -> int:
    """Writes comparisons.jsonl, verdicts.jsonl and, for the report, examples.jsonl; returns the first's rows."""
    labels: list[dict[str, Any]] = []
    every: list[dict[str, Any]] = []
    examples: list[dict[str, Any]] = []
    for pair, first, second in zip(pairs, *verdicts, strict=True):
        mean = float(first + second) / 2
        verdict = {"line": pair.line, "chosen_first": or_none(first), "chosen_second": or_none(second)}
        every.append(verdict | {"probability": or_none(mean)})
        sides = {"chosen": pair.chosen, "rejected": pair.rejected}
        if mean < 0.5:
            sides = {"chosen": pair.rejected, "rejected": pair.chosen}
        if mean != 0.5 and not np.isnan(mean):
            labels.append({"prompt": shown(pair.prompt), **sides, "probability": max(mean, 1 - mean)})
            example = {"prompt": in_words(pair.prompt), "people": pair.chosen, "other": pair.rejected}
            examples.append(example | {"people_probability": mean, "other_probability": 1 - mean})
    rows = {"comparisons": labels, "verdicts": every, "examples": examples[:SHOWN]}
    for name, some in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return len(labels)


def shown(prompt: Conversation) -> str | list[dict[str, Any]]:
    """A prompt for a file: text for one user's words, unless they would be read as a transcript; else messages."""
    text = in_words(prompt)
    alone = [turn["role"] for turn in prompt] == ["user"]
    return (
        text if alone and not text.lstrip().startswith(("Human:", "Assistant:")) else [dict(turn) for turn in prompt]
    )


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Asks the judge, writes its labels, and returns the metrics, which are also in the run's summary.json.

    Raises UserError without a judge or comparisons.
    """
    if cfg.judge is None or cfg.comparisons is None:
        raise UserError("give a judge, --judge FOLDER or --judge URL --judge-model NAME, and --comparisons FILE")
    with run_with_report(cfg, "judge", JUDGE_REPORT) as run:
        run.inputs(judge=cfg.judge, comparisons=cfg.comparisons)
        pairs = read_pairs(cfg.comparisons, cfg.limit, run)
        model = load_judge(cfg)
        length = min(cfg.max_length, say_notes(run, model).config.max_length) if model else cfg.max_length
        began = time.monotonic()
        size = {"batch_size": cfg.batch_size, "max_length": length, "questions": 2 * len(pairs)}
        with open_judge(cfg, run, model, **size) as judge:
            verdicts = ask(cfg, judge, pairs, run)
            metrics = measure(verdicts) | judge.metrics() | {"judge_seconds": time.monotonic() - began}
        lengths = np.array([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
        metrics |= rate_metrics("judge_length_baseline", length_baseline(*lengths.T), len(pairs))
        if run.first:
            count = write(pairs, verdicts, run.dir)
            run.say(
                f"labels: {run.dir / 'comparisons.jsonl'} ({count} of {len(pairs)} pairs; on the others the judge has"
                " no preference, or failed)"
            )
        run.summary(metrics)
    return metrics


if __name__ == "__main__":
    run_main(main, Config)
