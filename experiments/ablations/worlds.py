"""The stages that ablations start from in the controlled world: each seed's SFT, comparisons and reward model.

They are made once and kept in the folder of --common, under a name that has a hash of all that they depend on: the
seed and the world, the flags of their stages, and the code.
"""

import hashlib
import inspect
import json
import os
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from experiments import sft
from experiments.ablations.records import ROOT, code_hash
from experiments.pipeline import train_and_choose
from experiments.stages import policy_sampler
from rlhf_jax.batches import Completions, Prompts
from rlhf_jax.data.tokens import take
from rlhf_jax.log import Run
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.rewards.model import model_reward
from rlhf_jax.simulation import ERRANDS, WORDS, Demonstrators
from rlhf_jax.tasks.measure import AnswerScorer, PolicySampler, make_reward_scorer
from rlhf_jax.tasks.simulated import Sizes, World
from rlhf_jax.tasks.task import Comparisons, Task
from rlhf_jax.train import keep_freed_memory
from rlhf_jax.types import Params

Value = TypeVar("Value")
SETTINGS = {"words": WORDS, "errands": ERRANDS}
QUICK = Sizes(4000, 128, 400, 8, 256, 512, 128)
"""A quick run's world."""


class AfterSFT(NamedTuple):
    """A world, SFT's policy in it, and comparisons of its answers."""

    task: World
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


def open_world(cfg: Any, seed: int, **people: Any) -> tuple[World, PolicySampler]:
    """The world of a seed, with `demonstrators` or `annotators` of its own, and the sampler that measures policies."""
    keep_freed_memory()
    task = World(seed, sizes=QUICK if cfg.quick else None, setting=SETTINGS[cfg.setting], **people)
    return task, policy_sampler(replace(cfg, seed=seed), task)


def world_with_sft(cfg: Any, seed: int, run: Run, **people: Any) -> tuple[World, PolicySampler]:
    """The world of a seed with a model that `cfg.sft` has trained, and the sampler that measures policies in it."""
    task, sampler = open_world(cfg, seed, **people)
    task.base = task.base._replace(params=sft_params(cfg, task, seed, run, people.get("demonstrators")))
    return task, sampler


def sft_params(cfg: Any, task: World, seed: int, run: Run, demonstrators: Demonstrators | None) -> Params:
    """The world's new model as `cfg.sft` trains it."""

    def make() -> Params:
        size = task.eval_batch_size
        return sft.train(cfg.sft, task.base, task.demonstrations(), run, seed, eval_batch_size=size).params

    return kept(cfg, task, "sft", seed, {"sft": cfg.sft, "demonstrators": demonstrators}, make)


def after_sft(cfg: Any, seed: int, run: Run, **people: Any) -> AfterSFT:
    """SFT with `cfg.sft`, and comparisons of its answers."""
    task, sampler = world_with_sft(cfg, seed, run, **people)

    def make() -> tuple[Any, ...]:
        found = task.comparisons(partial(sampler, task.base.params))
        return list(found.train), tuple(found.heldout), found.facts

    train, heldout, facts = kept(cfg, task, "comparisons", seed, {"sft": cfg.sft, **people}, make)
    responses, *rest = heldout
    found = Comparisons(train, type(task.lay(train[:1]))(responses, *rest), facts, task.lay, packed=False)
    return AfterSFT(task, sampler, task.base, found)


def after_reward_model(cfg: Any, seed: int, run: Run, **people: Any) -> AfterRewardModel:
    """SFT and a reward model, with `cfg.sft` and `cfg.reward_model`; PPO starts where `pipeline.py` has it start."""
    task, sampler = open_world(cfg, seed, **people)

    def make() -> tuple[Any, ...]:
        return train_and_choose(cfg, task, task.prompts(), run, seed, sampler)[1:]

    flags = {"sft": cfg.sft, "reward_model": cfg.reward_model, "lora_rank": cfg.ppo.lora_rank, **people}
    start, rewards, facts = kept(cfg, task, "reward_model", seed, flags, make)
    reward = [model_reward(task.base.config, rewards, name="reward_model", weight=1.0)]
    scorer = make_reward_scorer(task, reward, cfg.ppo.no_end_score)
    return AfterRewardModel(task, sampler, task.base._replace(params=start), rewards, scorer, task.facts | facts)


def sft_pool(
    cfg: Any, task: World, sampler: PolicySampler, seed: int, n: int, prompts: int
) -> tuple[Prompts, Completions]:
    """Held-out prompts, and `n` answers to each of the SFT policy of the world's own people, prompt-major."""
    heldout = take(task.prompts().heldout, slice(prompts))
    repeated = take(heldout, np.arange(len(heldout.row)).repeat(n))

    def make() -> Completions:
        return sampler(task.base.params, repeated, 0)

    return heldout, kept(cfg, task, "pool", seed, {"sft": cfg.sft, "n": n, "prompts": prompts}, make)


# What is made once.


def kept(cfg: Any, task: World, what: str, seed: int, flags: dict[str, Any], make: Callable[[], Value]) -> Value:
    """The value of make(), with its arrays as numpy's: found in the folder of --common, or made and kept there.

    The code of the file that make() is in counts, too. The world goes on as if the value had been made here: what it
    draws next is the same.
    """
    if cfg.common == "none":
        return make()
    plain = {name: asdict(value) if hasattr(value, "__dataclass_fields__") else value for name, value in flags.items()}
    made_by = [version(name) for name in ("jax", "numpy", "optax", "flax")] + [jax.devices()[0].device_kind]
    own = code_hash(Path(inspect.getfile(make)))
    parts = [what, seed, cfg.setting, task.sizes, plain, code(), own, made_by]
    name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    file = Path(cfg.common) / f"{what}-{seed}-{name}.pickle"
    if file.exists():
        value, state = pickle.loads(file.read_bytes())
        if state is not None:  # making it has drawn from it
            task.rng.bit_generator.state = state
        return value
    before = task.rng.bit_generator.state
    value = jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, make())
    after = task.rng.bit_generator.state
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(handle, "wb") as opened:
        pickle.dump((value, None if after == before else after), opened, protocol=5)
    os.replace(temporary, file)
    return value


@cache
def code() -> str:
    """A hash of the code of the library, the experiments and this file; ablations do not count."""
    files = [*sorted((ROOT / "rlhf_jax").rglob("*.py")), *sorted((ROOT / "experiments").glob("*.py")), Path(__file__)]
    return hashlib.sha256("".join(map(code_hash, files)).encode()).hexdigest()
