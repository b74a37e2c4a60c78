"""Where a PPO iteration's time goes: rollout, scoring, update, each compiled alone, beside the one whole program.

    python experiments/bench/ppo_iteration.py
One minute on 2 CPU cores. Weights are random, answers run until EOS or the limit, as in the controlled world; prints
one JSON line: median seconds over `repeats`, the programs compiled by a run of as many whole iterations, and the
seconds of each of several policies that one program trains under `vmap`.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from experiments import ppo
from experiments.bench.programs import score_and_shape
from experiments.ppo import PPO
from rlhf_jax.cli import run_main
from rlhf_jax.compiled import count_compilations
from rlhf_jax.data.tokens import take
from rlhf_jax.models import Transformer, from_language_model
from rlhf_jax.rewards.model import model_reward
from rlhf_jax.tasks.simulated import World


@dataclass(frozen=True)
class Config:
    """Times one PPO iteration in the controlled world's shapes."""

    repeats: int = 20
    together: int = 4
    """Policies that are trained at once, under `vmap`."""
    seed: int = 0
    ppo: PPO = field(default_factory=PPO)


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call, the first one not counted."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main(cfg: Config) -> dict[str, float]:
    """Times it; returns and prints the figures."""
    world, key = World(cfg.seed), jax.random.key(cfg.seed)
    model = world.base.config
    params = Transformer(model).init(key, jnp.zeros((1, 8), jnp.int32))["params"]
    base = world.base._replace(params=params)
    reward_params = from_language_model(params, key, model)
    stage = ppo.with_defaults(cfg.ppo, base)
    setup, state, frozen = ppo.prepare(
        stage, base, [model_reward(model, reward_params, name="reward_model", weight=1.0)], key,
        max_new_tokens=world.max_new_tokens, critic=(model, reward_params),
        demonstrations=world.demonstrations().train,
    )  # fmt: skip

    parts = (ppo.rollout, score_and_shape, ppo.update, ppo.iterate)
    rollout, score, update, iterate = (jax.jit(partial(part, stage, setup)) for part in parts)
    prompts = take(world.prompts().train, np.asarray(ppo.draw(stage, len(world.prompts().train.row), key)))
    completions = rollout(state, frozen, prompts, key)
    experience, _ = score(state, frozen, prompts, completions)
    metrics = {
        "rollout_seconds": seconds(lambda: rollout(state, frozen, prompts, key), cfg.repeats),
        "scoring_seconds": seconds(lambda: score(state, frozen, prompts, completions), cfg.repeats),
        "update_seconds": seconds(lambda: update(state, frozen, experience, key), cfg.repeats),
    }
    keys = jax.random.split(key, cfg.repeats + 1)
    with count_compilations() as compilations:
        metrics["whole_seconds"] = seconds(lambda: iterate(state, frozen, prompts, keys[0]), cfg.repeats)
        metrics["compilations"] = compilations()
    together = jax.jit(jax.vmap(partial(ppo.iterate, stage, setup), in_axes=(0, None, None, 0)))
    states = jax.tree.map(lambda x: jnp.stack([x] * cfg.together), state)
    once = seconds(lambda: together(states, frozen, prompts, keys[: cfg.together]), cfg.repeats)
    metrics["vmapped_seconds_of_each"] = once / cfg.together
    metrics["sampled_tokens"] = float(completions.mask.sum())
    print(json.dumps({name: round(value, 4) for name, value in metrics.items()}))
    return metrics


if __name__ == "__main__":
    run_main(main, Config)
