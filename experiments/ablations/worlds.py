"""The stages that ablations start from in the controlled world: each seed's SFT, comparisons and reward model."""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from experiments import sft
from experiments.pipeline import train_and_choose
from experiments.stages import policy_sampler
from rlhf_jax.log import Run
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.rewards.model import model_reward
from rlhf_jax.tasks.measure import AnswerScorer, PolicySampler, make_reward_scorer
from rlhf_jax.tasks.simulated import World
from rlhf_jax.tasks.task import Comparisons, Task
from rlhf_jax.train import keep_freed_memory
from rlhf_jax.types import Params


class AfterSFT(NamedTuple):
    """A world, SFT's policy in it, and comparisons of its answers."""

    task: Task
    sampler: PolicySampler
    base: Pretrained
    comparisons: Comparisons


class AfterRewardModel(NamedTuple):
    """A world, the policy that PPO starts from, and a reward model."""

    task: Task
    sampler: PolicySampler
    base: Pretrained
    rewards: Params
    scorer: AnswerScorer
    facts: dict[str, float]
    """Facts about demonstrators and annotators, and metrics of the reward model."""


def open_world(cfg: Any, seed: int) -> tuple[World, PolicySampler]:
    """The world of a seed, and the sampler that measures policies in it."""
    keep_freed_memory()
    task = World(seed)
    return task, policy_sampler(replace(cfg, seed=seed), task)


def world_with_sft(cfg: Any, seed: int, run: Run) -> tuple[World, PolicySampler]:
    """The world of a seed with a model that `cfg.sft` has trained, and the sampler that measures policies in it."""
    task, sampler = open_world(cfg, seed)
    size = task.eval_batch_size
    params = sft.train(cfg.sft, task.base, task.demonstrations(), run, seed, eval_batch_size=size).params
    task.base = task.base._replace(params=params)
    return task, sampler


def after_sft(cfg: Any, seed: int, run: Run) -> AfterSFT:
    """SFT with `cfg.sft`, and comparisons of its answers."""
    task, sampler = world_with_sft(cfg, seed, run)
    return AfterSFT(task, sampler, task.base, task.comparisons(partial(sampler, task.base.params)))


def after_reward_model(cfg: Any, seed: int, run: Run) -> AfterRewardModel:
    """SFT and a reward model, with `cfg.sft` and `cfg.reward_model`; PPO starts where `pipeline.py` has it start."""
    task, sampler = open_world(cfg, seed)
    _, start, rewards, facts = train_and_choose(cfg, task, task.prompts(), run, seed, sampler)
    reward = [model_reward(task.base.config, rewards, name="reward_model", weight=1.0)]
    scorer = make_reward_scorer(task, reward, cfg.ppo.no_end_score)
    return AfterRewardModel(task, sampler, task.base._replace(params=start), rewards, scorer, task.facts | facts)
