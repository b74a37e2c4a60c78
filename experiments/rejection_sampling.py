"""Rejection sampling: SFT on the best of n answers that the policy itself gives, by a reward.

Touvron et al. 2023, §3.2.3 (Llama 2, https://arxiv.org/abs/2307.09288); Nakano et al. 2021. The best of n answers to
each prompt become demonstrations. With several rounds, each sampling from the last one's policy, it is expert
iteration (Anthony et al. 2017, https://arxiv.org/abs/1705.08439). Beside it a control is trained on as many answers to
the same prompts, picked without a look at the scores: the difference is what the choice is worth.
    python experiments/rejection_sampling.py
    python experiments/rejection_sampling.py --model FOLDER --reward-model FOLDER --prompts FILE
    python experiments/rejection_sampling.py --model FOLDER --reward math --prompts FILE --rounds 3
Without files it runs SFT and the reward model in the controlled world first. It writes policy/ to the run's folder,
and each round's answers, the best and a blind one to each prompt, to round-<n>/picked.jsonl.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[1]))


from experiments import sft
from experiments.flags import BestOfNFlags, Flags, ModelFlags, PromptFlags, RewardFlags, RunFlags, SamplingFlags
from experiments.reports import REJECTION_REPORT
from experiments.stages import again_defaults, open_own, open_rewards, open_task, policy_sampler
from rlhf_jax.cli import on_mesh, run_main, run_with_report
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.export import export_policy
from rlhf_jax.hosts import from_first
from rlhf_jax.log import Run
from rlhf_jax.tasks.measure import (
    AnswerScorer,
    PolicySampler,
    compare_policies,
    make_policy_measure,
    make_reward_scorer,
)
from rlhf_jax.tasks.picked import write_picked
from rlhf_jax.tasks.task import Task
from rlhf_jax.types import Params


@dataclass(frozen=True)
class RejectionFlags(Flags):
    """The flags of rejection sampling alone."""

    rounds: int = 1
    """So many times answers are sampled from the last policy and learned from."""
    control: bool = True
    """Train a control beside it in the first round, on answers picked without a look at the scores."""

    def __post_init__(self) -> None:
        at_least(self, rounds=1)
        super().__post_init__()


@dataclass(frozen=True)
class RejectionSampling(BestOfNFlags, sft.SFT, RejectionFlags):
    """The flags of the stage."""


@dataclass(frozen=True)
class Config(RunFlags, SamplingFlags, ModelFlags, PromptFlags, RewardFlags, RejectionSampling):
    """SFT on the best of n answers of the policy's own."""

    def __post_init__(self) -> None:
        """Raises UserError for --watch, which nothing here would use."""
        super().__post_init__()
        if self.watch:
            raise UserError("--watch is not used here")


def train_round(
    cfg: Config, task: Task, policy: Params, run: Run, sampler: PolicySampler, score: AnswerScorer, number: int
) -> dict[str, Params]:
    """One round from a policy: {"best": the policy after it, "blind": that of the control, if there is one}.

    `score` is of answers to training prompts. Writes round-<number>/picked.jsonl. Raises UserError where no answer
    ends.
    """
    base, file = task.base._replace(params=policy), run.dir / f"round-{number}" / "picked.jsonl"
    from_first(lambda: file.parent.mkdir(exist_ok=True))
    count = write_picked(
        run, f"answers-{number}", file, task, lambda some: sampler(policy, some, 20_000_000 * number),
        score, cfg.n, blind=True,
    )  # fmt: skip
    if not count:
        raise UserError(
            "no answer ends, so there is nothing to learn from: raise --max-new-tokens, or train SFT first"
        )
    run.say(f"round {number}: the best of {cfg.n} answers to {count} of {len(task.prompts().train.row)} prompts in"
            f" {file}; the best one of the others does not end, or has no words")  # fmt: skip
    found: dict[str, Params] = {}
    for side in ("blind", "best") if cfg.control and number == 1 else ("best",):
        columns = ("completion=blind",) if side == "blind" else ()
        demonstrations = open_own(cfg, task, run, {"demonstrations": [file]}, columns=columns).demonstrations()
        flags = again_defaults(cfg, base, demonstrations.rows or 0)
        found[side] = sft.train(
            flags, base, demonstrations, run, cfg.seed, eval_batch_size=task.eval_batch_size, stage=f"{side}-{number}"
        ).params
    return found


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Trains round by round, compares the policy with the first one and the control, exports it; returns metrics."""
    with run_with_report(cfg, "rejection_sampling", REJECTION_REPORT) as run:
        task = open_task(cfg, run, first="sft")
        sampler = policy_sampler(cfg, task)
        with open_rewards(cfg, run, task, failed_score=cfg.no_end_score) as (rewards, *_):
            score = make_reward_scorer(task, rewards, cfg.no_end_score)
            score_training = make_reward_scorer(task, rewards, cfg.no_end_score, training=True)
            measure = make_policy_measure(task, sampler, task.eval_batch_size)
            policy, metrics = task.base.params, dict(task.facts)

            def compared(name: str, params: Params) -> dict[str, float]:
                sides = ("start", task.base.params), (name, params)
                found = compare_policies(run, task, *sides, sampler, score)
                return found | {f"{name}_kl": float(measure(params, task.base.params, 300)["kl_k1"])}

            for number in range(1, cfg.rounds + 1):
                trained = train_round(cfg, task, policy, run, sampler, score_training, number)
                if "blind" in trained:
                    metrics |= {
                        name: x for name, x in compared("control", trained["blind"]).items() if "control" in name
                    }
                policy = trained["best"]
                found = compared("rejection_sampling", policy)
                short = {name.removeprefix("rejection_sampling_"): x for name, x in found.items()}
                run.log("rejection_sampling", number, {
                    name: short[name] for name in ("score", "utility", "kl", "length") if name in short
                })  # fmt: skip
            metrics |= found
        run.summary(metrics)
        export_policy(run, task.base, policy, algorithm="Rejection sampling", metrics=metrics)
    return metrics


if __name__ == "__main__":
    run_main(main, Config)
