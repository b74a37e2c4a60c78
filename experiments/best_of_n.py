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
`sft.py --demonstrations` reads; and pairs.jsonl: the best answer and a random one, which `dpo.py --comparisons` and
`evaluate.py --preferences` read. Without files it runs SFT and the reward model in the controlled world first.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from experiments.flags import BestOfNFlags, ModelFlags, PromptFlags, RewardFlags, RunFlags, SamplingFlags
from experiments.reports import BEST_OF_N_REPORT
from experiments.stages import open_rewards, open_task, policy_sampler
from rlhf_jax.best_of_n import best_of_n_metrics, powers_up_to, sample_pools
from rlhf_jax.cli import on_mesh, run_main, run_with_report
from rlhf_jax.data.tokens import take
from rlhf_jax.errors import UserError
from rlhf_jax.hosts import from_first
from rlhf_jax.log import Run
from rlhf_jax.revision import asked_in
from rlhf_jax.rewards.reward import Reward
from rlhf_jax.row_file import read_rows
from rlhf_jax.tasks.measure import (
    AnswerScorer,
    PolicySampler,
    make_reward_scorer,
    make_single_scorer,
    write_examples,
)
from rlhf_jax.tasks.picked import write_picked
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
    (pool,) = sample_pools(
        lambda prompts: sampler(task.base.params, prompts, 0), score, heldout, cfg.n,
        rows=cfg.n * len(heldout.row), judges=judges,
    )  # fmt: skip
    metrics: dict[str, float] = {}
    for n in powers_up_to(cfg.n):
        found = best_of_n_metrics(pool, n)
        if seen := [found[name] for reward in watched if (name := f"watch/{reward.name}") in found]:
            found["watched"] = float(np.mean(seen))
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


def write_pairs(best: Path, file: Path) -> int:
    """Writes the best answers with a random one beside each as comparisons, where they differ; returns how many.

    Raises UserError for best answers of an older version, which have no random ones.
    """
    rows = list(read_rows(best))
    if any("blind" not in row for row in rows):
        raise UserError(f"{best} was written by an older version, without random answers: take another --run-dir")
    rows = [row for row in rows if row["completion"] != row["blind"]]
    pairs = [
        asked_in(row) | {"chosen": row["completion"], "rejected": row["blind"], "row": row["row"]} for row in rows
    ]
    file.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    return len(pairs)


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Samples, measures on held-out prompts, writes the best answers, and returns the metrics."""
    with run_with_report(cfg, "best_of_n", BEST_OF_N_REPORT) as run:
        task = open_task(cfg, run, first="sft")
        sampler = policy_sampler(cfg, task)
        with open_rewards(cfg, run, task, failed_score=cfg.no_end_score) as (rewards, _, _, watched):
            metrics = measure(cfg, task, run, sampler, make_reward_scorer(task, rewards, cfg.no_end_score), watched)
            score = make_reward_scorer(task, rewards, cfg.no_end_score, training=True)
            file = run.dir / "best.jsonl"
            count = write_picked(
                run, "best_of_n", file, task, lambda prompts: sampler(task.base.params, prompts, 1000),
                score, cfg.n, blind=True,
            )  # fmt: skip
            pairs = from_first(lambda: write_pairs(file, run.dir / "pairs.jsonl"))
        run.say(f"best answers: {file} ({count} of {len(task.prompts().train.row)} prompts; the best answer to the"
                " others is empty or does not end)")  # fmt: skip
        run.say(f"with a random answer beside each: {run.dir / 'pairs.jsonl'} ({pairs} that differ)")
        run.summary(metrics)
    return metrics


if __name__ == "__main__":
    run_main(main, Config)
