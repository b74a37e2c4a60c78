"""Rejection sampling: SFT on the best of n answers that the policy itself gives, by a reward.

Touvron et al. 2023, §3.2.3 (Llama 2, https://arxiv.org/abs/2307.09288); Nakano et al. 2021. The best of n answers to
each prompt become demonstrations. With several rounds, each sampling from the last one's policy, it is expert
iteration (Anthony et al. 2017, https://arxiv.org/abs/1705.08439). Beside it a control is trained on as many answers to
the same prompts, picked without a look at the scores: the difference is what the choice is worth.
    python experiments/rejection_sampling.py
    python experiments/rejection_sampling.py --model FOLDER --reward-model FOLDER --prompts FILE
    python experiments/rejection_sampling.py --model FOLDER --reward math --prompts FILE --rounds 3
Without files it runs SFT and the reward model in the controlled world first. It writes policy/ to the run's folder. A
resumed run samples its answers again, the same ones, and goes on in the training that it was in.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[1]))


from experiments import sft
from experiments.flags import BestOfNFlags, Flags, ModelFlags, PromptFlags, RewardFlags, RunFlags, SamplingFlags
from experiments.reports import REJECTION_REPORT
from experiments.stages import again_defaults, open_rewards, open_task, policy_sampler
from rlhf_jax.batches import Prompts
from rlhf_jax.best_of_n import sample_pools
from rlhf_jax.cli import on_mesh, run_main, run_with_report
from rlhf_jax.data.epochs import EpochBatches
from rlhf_jax.data.preferences import Answer
from rlhf_jax.data.tokens import bucket, pack_sequences, pad_sequences, size
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.export import export_policy
from rlhf_jax.log import Run
from rlhf_jax.tasks.measure import (
    AnswerScorer,
    PolicySampler,
    compare_policies,
    make_policy_measure,
    make_reward_scorer,
)
from rlhf_jax.tasks.task import Demonstrations, Task
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


class Picked(NamedTuple):
    """Answers to the same prompts, in ids: each prompt's best one, and one that was picked blindly."""

    best: list[Answer]
    blind: list[Answer]


def pick(
    cfg: BestOfNFlags, task: Task, policy: Params, prompts: Prompts, sampler: PolicySampler, score: AnswerScorer,
    number: int,
) -> Picked:  # fmt: skip
    """The best of n answers to each prompt, and the first one that ends; none where the best one does not end."""
    picked = Picked([], [])

    def sample(some: Prompts, part: int) -> Any:
        return sampler(policy, some, number + part)

    for pool in sample_pools(sample, score, prompts, cfg.n, rows=task.eval_batch_size):
        ended = task.base.ended(pool.answers)
        blind = pool.first() + ended.reshape(-1, cfg.n).argmax(axis=1)
        for p, (best, other) in enumerate(zip(pool.best(), blind, strict=True)):
            if ended[best]:
                prompt = pool.prompts.tokens[p][pool.prompts.mask[p]].tolist()
                for side, row in zip(picked, (best, other), strict=True):
                    side.append((prompt, pool.answers.tokens[row][pool.answers.mask[row]].tolist()))
    return picked


def as_demonstrations(answers: list[Answer], heldout: list[Answer], pad_id: int) -> Demonstrations:
    """Answers as demonstrations: packed to train on, one to a row for the validation loss."""
    length = bucket(max(map(size, answers + heldout)))
    packed = pack_sequences(answers, length=length, pad_id=pad_id)
    validation = pad_sequences(heldout, length=length, pad_id=pad_id)
    return Demonstrations(packed, validation, lambda rows, seed: EpochBatches(packed, rows, seed), len(packed.mask))


def train_round(
    cfg: Config, task: Task, policy: Params, run: Run, sampler: PolicySampler, scorers: Sequence[AnswerScorer],
    number: int,
) -> dict[str, Params]:  # fmt: skip
    """One round from a policy: {"best": the policy after it, "blind": that of the control, if there is one}.

    `scorers` are of answers to training prompts and to held-out ones. Raises UserError when no answer ends.
    """
    sets, base = task.prompts(), task.base._replace(params=policy)
    train, heldout = (
        pick(cfg, task, policy, prompts, sampler, score, 20_000_000 * number + 10_000_000 * side)
        for side, (prompts, score) in enumerate(zip((sets.train, sets.heldout), scorers, strict=True))
    )
    if not train.best or not heldout.best:
        raise UserError(
            "no answer ends, so there is nothing to learn from: raise --max-new-tokens, or train SFT first"
        )
    run.say(f"round {number}: the best of {cfg.n} answers to {len(train.best)} of {len(sets.train.row)} prompts; the"
            " best one of the others does not end")  # fmt: skip
    found: dict[str, Params] = {}
    for side in ("blind", "best") if cfg.control and number == 1 else ("best",):
        demonstrations = as_demonstrations(getattr(train, side), getattr(heldout, side), base.pad_id)
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
            on_training, on_heldout = (
                make_reward_scorer(task, rewards, cfg.no_end_score, training=training) for training in (True, False)
            )
            measure = make_policy_measure(task, sampler, task.eval_batch_size)
            policy, metrics = task.base.params, dict(task.facts)

            def compared(name: str, params: Params) -> dict[str, float]:
                sides = ("start", task.base.params), (name, params)
                found = compare_policies(run, task, *sides, sampler, on_heldout)
                return found | {f"{name}_kl": float(measure(params, task.base.params, 300)["kl_k1"])}

            for number in range(1, cfg.rounds + 1):
                trained = train_round(cfg, task, policy, run, sampler, (on_training, on_heldout), number)
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
