"""Best of n: of n answers to each prompt the one that a reward likes best. Nothing is trained.

Stiennon et al. 2020, §3 (https://arxiv.org/abs/2009.01325); Nakano et al. 2021 (https://arxiv.org/abs/2112.09332). It
moves the policy by at most log n − (n − 1)/n nats. On held-out prompts the mean score of the best of 1, 2, 4, … n is
told without bias from one pool of n answers each, and in the controlled world their true utility.
    python experiments/best_of_n.py
    python experiments/best_of_n.py --model FOLDER --reward-model FOLDER --prompts FILE
    python experiments/best_of_n.py --model FOLDER --reward FILE.py:NAME --prompts FILE
With --watch FOLDER or FILE.py:NAME another scorer, which chooses nothing, says what the chosen ones are worth: where
its mean falls while the score rises, the reward is over-optimised.
It writes best.jsonl to the run's folder: prompt, completion and score of the best answer to each prompt, which
`sft.py --demonstrations` reads. Without files it runs SFT and the reward model in the controlled world first.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from experiments.flags import BestOfNFlags, ModelFlags, PromptFlags, RewardFlags, RunFlags, SamplingFlags
from experiments.reports import BEST_OF_N_REPORT
from experiments.stages import open_rewards, open_task, policy_sampler
from rlhf_jax.batches import Completions, Prompts
from rlhf_jax.best_of_n import Pool, best_of_n_metrics, powers_up_to, prompts_a_pool, sample_pools
from rlhf_jax.cli import on_mesh, run_main, run_with_report
from rlhf_jax.data.tokens import take
from rlhf_jax.log import Run
from rlhf_jax.rewards.reward import Reward
from rlhf_jax.row_file import write_parts
from rlhf_jax.tasks.measure import (
    AnswerScorer,
    PolicySampler,
    make_reward_scorer,
    make_single_scorer,
    write_examples,
)
from rlhf_jax.tasks.task import Task


@dataclass(frozen=True)
class Config(RunFlags, SamplingFlags, ModelFlags, PromptFlags, RewardFlags, BestOfNFlags):
    """The best of n answers to each prompt, by a reward."""


def measure(
    cfg: BestOfNFlags,
    task: Task,
    run: Run,
    sampler: PolicySampler,
    score: AnswerScorer,
    watched: Sequence[Reward] = (),
) -> dict[str, float]:
    """The best of 1, 2, 4, … n answers to held-out prompts: mean scores, true utility where it is known, and what
    the watched scorers think of them.

    Logged with n as the step. Writes the first answers, random ones beside the best ones, to examples.jsonl.
    """
    judges = {f"watch/{reward.name}": make_single_scorer(task, reward) for reward in watched}
    if task.judge is not None:
        judges["utility"] = task.judge
    heldout = task.prompts().heldout
    sample = partial(sampler, task.base.params)
    (pool,) = sample_pools(sample, score, heldout, cfg.n, rows=cfg.n * len(heldout.row), judges=judges)
    metrics: dict[str, float] = {}
    for n in powers_up_to(cfg.n):
        found = best_of_n_metrics(pool, n)
        if watched:
            found["watched"] = float(np.mean([found[f"watch/{reward.name}"] for reward in watched]))
        run.log("best_of_n", n, found)
        metrics |= {f"best_of_{n}_{name}": value for name, value in found.items()}
    sides = {"start": pool.first(), "best_of_n": pool.best()}
    columns = {
        name: [values.reshape(-1)[rows] for rows in sides.values()]
        for name, values in {"score": pool.scores, **pool.values}.items()
    }
    answers = {name: take(pool.answers, rows) for name, rows in sides.items()}
    write_examples(run, task.base, heldout, answers, columns)
    return metrics


def write_best(cfg: Config, task: Task, run: Run, sampler: PolicySampler, score: AnswerScorer) -> None:
    """Writes the best answer to each prompt to best.jsonl, as they come; a resumed run goes on after the last ones.

    A prompt whose best answer is empty or does not end has none there. Such prompts are counted.
    """
    sets, file, size = task.prompts(), run.dir / "best.jsonl", prompts_a_pool(cfg.n, task.eval_batch_size)

    def make(part: range) -> list[dict[str, Any]]:
        def sample(prompts: Prompts, _: int) -> Completions:
            return sampler(task.base.params, prompts, 1000 + part.start // size)

        some = take(sets.train, np.asarray(part))
        (pool,) = sample_pools(sample, score, some, cfg.n, rows=cfg.n * len(part))
        return best_rows(task, pool, part.start)

    write_parts(run, "best_of_n", file, len(sets.train.row), size, make)
    if run.first:
        with open(file, encoding="utf-8") as found:
            count = sum(1 for _ in found)
        run.say(f"best answers: {file} ({count} of {len(sets.train.row)} prompts; the best answer to the others is"
                " empty or does not end)")  # fmt: skip


def best_rows(task: Task, pool: Pool, first: int) -> list[dict[str, Any]]:
    """A row for each prompt whose best answer ends and is not empty. "row" is the prompt's number, from `first` on."""
    rows = pool.best()
    best = take(pool.answers, rows)
    found = zip(
        pool.prompts.row.tolist(), task.base.read_answers(best), pool.scores.reshape(-1)[rows].tolist(),
        task.base.ended(best).tolist(), strict=True,
    )  # fmt: skip
    texts = task.prompts().rows
    return [
        {"prompt": texts[number].prompt, "completion": text, "score": score, "row": first + place}
        for place, (number, text, score, ended) in enumerate(found)
        if ended and text.strip()
    ]


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Samples, measures on held-out prompts, writes the best answers, and returns the metrics."""
    with run_with_report(cfg, "best_of_n", BEST_OF_N_REPORT) as run:
        task = open_task(cfg, run, first="sft")
        sampler = policy_sampler(cfg, task)
        with open_rewards(cfg, run, task, failed_score=cfg.no_end_score) as (rewards, _, _, watched):
            metrics = measure(cfg, task, run, sampler, make_reward_scorer(task, rewards, cfg.no_end_score), watched)
            score = make_reward_scorer(task, rewards, cfg.no_end_score, training=True)
            write_best(cfg, task, run, sampler, score)
        run.summary(metrics)
    return metrics


if __name__ == "__main__":
    run_main(main, Config)
