"""Runs the whole pipeline: SFT → reward model → PPO, then the evaluation and a report.

Ouyang et al. 2022 (https://arxiv.org/abs/2203.02155). PPO starts from the SFT epoch whose samples the reward model
scores highest (§3.5). The report also shows the epoch with the lowest validation loss.
    python experiments/pipeline.py
It takes about 4 minutes on 2 CPU cores. Then open runs/pipeline-<n>/report.html: the true utility rises from 0.8 (SFT;
its demonstrators have 0.9) to 2.4. The same stages run on real text, which has no true utility:
    python experiments/pipeline.py --model FOLDER --demonstrations FILE --comparisons FILE --on-bad-row=skip
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from experiments import ppo, reward_model, sft
from experiments.flags import ComparisonFlags, DemonstrationFlags, ModelFlags, PromptFlags, RunFlags, SamplingFlags
from experiments.ppo import PPO
from experiments.reports import PIPELINE_REPORT
from experiments.reward_model import RewardModel
from experiments.sft import SFT, Trained
from experiments.stages import open_task, policy_sampler
from rlhf_jax.batches import Prompts
from rlhf_jax.cli import on_mesh, run_main, run_with_report
from rlhf_jax.compiled import count_compilations
from rlhf_jax.data.tokens import join
from rlhf_jax.errors import UserError
from rlhf_jax.export import export_adapters, export_policy, export_reward_model
from rlhf_jax.log import Run
from rlhf_jax.models import ScalarModel, Transformer
from rlhf_jax.rewards.model import model_reward
from rlhf_jax.scoring import mean_in_batches, response_rewards, score_in_batches, sft_objective
from rlhf_jax.tasks.measure import PolicySampler, compare_policies, make_reward_scorer, make_utility_measure
from rlhf_jax.tasks.task import PromptSets, Task, with_choice
from rlhf_jax.types import Params


@dataclass(frozen=True)
class Config(RunFlags, SamplingFlags, ModelFlags, DemonstrationFlags, ComparisonFlags, PromptFlags):
    """Runs SFT, reward model and PPO, then the evaluation."""

    streams_prompts = True

    sft: SFT = field(default_factory=SFT)
    reward_model: RewardModel = field(default_factory=RewardModel)
    ppo: PPO = field(default_factory=PPO)

    def __post_init__(self) -> None:
        """Raises UserError for a reward model's epochs of a stream, before SFT is trained."""
        super().__post_init__()
        if self.streaming and self.reward_model.epochs is not None:
            raise UserError("--streaming has no passes to count: give --reward-model.steps, not --reward-model.epochs")


def choose_epoch(
    epochs: list[int],
    load: Callable[[int], Params],
    score: Callable[[Params, Prompts, int], np.ndarray],
    validation_loss: Callable[[Params], float],
    heldout: Prompts,
    run: Run,
    stage: str = "choice",
) -> int:
    """The step of the SFT epoch whose samples the reward model scores highest. Logs the validation loss of each, too.

    `score(params, prompts, number)` scores samples.
    """
    rows = []
    for number, step in enumerate(epochs):
        params = load(step)
        rows.append({"score": score(params, heldout, number).mean(), "val_loss": validation_loss(params)})
        run.log(stage, number + 1, rows[-1])
    by_score = int(np.argmax([row["score"] for row in rows]))
    by_loss = int(np.argmin([row["val_loss"] for row in rows]))
    run.say(f"PPO starts from SFT epoch {by_score + 1} (reward model); validation loss would choose {by_loss + 1}")
    return epochs[by_score]


def train_and_choose(
    cfg: Any, task: Task, sets: PromptSets, run: Run, seed: int, sampler: PolicySampler
) -> tuple[Params, Params, Params, dict[str, float]]:
    """Runs SFT and the reward model. Returns SFT's last weights, PPO's first ones, the reward model, and metrics.

    PPO's first weights are chosen on the prompts of `sets` that are for this.
    Without demonstrations SFT is left out; raises UserError unless its steps are 0.
    """
    base, size, demonstrations = task.base, task.eval_batch_size, None
    if task.has_demonstrations:
        demonstrations = task.demonstrations()
        trained = sft.train(
            cfg.sft, base, demonstrations, run, seed, eval_batch_size=size, keep_epochs=not cfg.ppo.lora_rank,
            measure=make_utility_measure(task, sampler),
        )  # fmt: skip
        base = task.base = base._replace(params=None)  # which nothing needs any more
        task.finish()
    elif cfg.sft.steps == 0:
        trained = Trained(base.params, [], lambda step: base.params)
    else:
        raise UserError(
            "SFT needs --demonstrations FILE; --sft.steps 0 leaves it out for a model that answers already"
        )
    comparisons = task.comparisons(partial(sampler, trained.params))
    start = base._replace(params=trained.params)
    rewards, metrics = reward_model.train(
        cfg.reward_model,
        start,
        comparisons,
        run,
        seed,
        eval_batch_size=size,
        zero=None if demonstrations is None else demonstrations.validation,
    )
    task.finish()
    if demonstrations is None or not trained.epochs:  # on one trunk PPO starts where the reward model did
        return trained.params, trained.params, rewards, metrics
    scores = score_in_batches(partial(response_rewards, ScalarModel(base.config)), size)
    loss = mean_in_batches(lambda params, tokens: sft_objective(Transformer(base.config), params, tokens)[0], size)

    def score(params: Params, prompts: Prompts, number: int) -> np.ndarray:
        return scores(rewards, join(prompts, sampler(params, prompts, number), pad_id=base.pad_id))

    epoch = choose_epoch(
        trained.epochs, trained.load, score, lambda params: loss(params, demonstrations.validation),
        sets.choice or sets.heldout, run,
    )  # fmt: skip
    return trained.params, trained.load(epoch), rewards, metrics


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Runs all stages. Returns the final metrics, which are also in the run's summary.json."""
    with run_with_report(cfg, "pipeline", PIPELINE_REPORT) as run, count_compilations() as compilations:
        task = open_task(cfg, run)
        sampler, sets = policy_sampler(cfg, task), task.prompts()
        if task.has_demonstrations and not cfg.ppo.lora_rank:  # SFT's epochs are kept, and one is chosen
            sets = with_choice(sets)
        last, start, rewards, metrics = train_and_choose(cfg, task, sets, run, cfg.seed, sampler)
        reward = [model_reward(task.base.config, rewards, name="reward_model", weight=1.0)]
        policy, ppo_metrics = ppo.train(
            cfg.ppo, task.base._replace(params=start), sets, reward, run, cfg.seed,
            max_new_tokens=task.max_new_tokens, critic=(task.base.config, rewards), judge=task.judge,
            demonstrations=task.demonstrations().train if cfg.ppo.ptx_coef else None,
        )  # fmt: skip
        task.finish()
        metrics |= task.facts | ppo_metrics
        scorer = make_reward_scorer(task, reward, cfg.ppo.no_end_score)
        metrics |= compare_policies(run, task, ("sft", start), ("ppo", policy), sampler, scorer, sets)
        metrics["compilations"] = compilations()
        run.summary(metrics)
        export(run, task, last, policy, rewards, metrics)
    return metrics


def export(run: Run, task: Task, last: Params, policy: Params, rewards: Params, metrics: dict[str, float]) -> None:
    """Writes policy/ and reward_model/. Where adapters were trained, writes these and base/, too."""

    def of(stage: str) -> dict[str, float]:
        return {name: value for name, value in metrics.items() if name.startswith(stage)}

    algorithm = "PPO against a Bradley-Terry reward model, minus a KL penalty to SFT"
    export_policy(run, task.base, policy, algorithm=algorithm, metrics=of("ppo_"))
    algorithm = "Bradley-Terry reward model, started from SFT"
    export_reward_model(run, task.base, rewards, algorithm=algorithm, metrics=of("reward_model_"))
    export_adapters(run, task.base, last, policy, rewards)


if __name__ == "__main__":
    run_main(main, Config)
