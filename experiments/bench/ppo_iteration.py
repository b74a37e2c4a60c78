"""Where a PPO iteration's time goes: rollout, scoring, update, each compiled alone, beside the one whole program.

    python experiments/bench/ppo_iteration.py
One minute on 2 CPU cores. Weights are random, answers run until EOS or the limit, as in the controlled world; prints
one JSON line: median seconds over `repeats`, and the programs compiled by a run of as many whole iterations.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from experiments import ppo
from experiments.ppo import PPO
from experiments.setting import world_setting
from rlhf_jax.cli import run_main
from rlhf_jax.log import count_compilations
from rlhf_jax.models import Transformer, from_language_model


@dataclass(frozen=True)
class Config:
    """Times one PPO iteration in the controlled world's shapes."""

    repeats: int = 20
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
    setting = world_setting(cfg.seed)
    key = jax.random.key(cfg.seed)
    start = Transformer(setting.model).init(key, jnp.zeros((1, 8), jnp.int32))["params"]
    reward_params = from_language_model(start, key, setting.model)
    iteration = ppo.make_iteration(
        cfg.ppo, setting.model, max_new_tokens=setting.max_new_tokens, eos_id=setting.eos_id, pad_id=setting.pad_id
    )
    state = ppo.init_state(cfg.ppo, setting.model, start, reward_params)
    frozen = jax.device_put(ppo.Frozen(start, reward_params, setting.prompts, setting.demonstrations))

    rollout, score, update = (jax.jit(part) for part in (iteration.rollout, iteration.score, iteration.update))
    prompts, completions = rollout(state, frozen, key)
    experience, _ = score(state, frozen, prompts, completions)
    metrics = {
        "rollout_seconds": seconds(lambda: rollout(state, frozen, key), cfg.repeats),
        "scoring_seconds": seconds(lambda: score(state, frozen, prompts, completions), cfg.repeats),
        "update_seconds": seconds(lambda: update(state, frozen, experience, key), cfg.repeats),
    }
    whole = jax.jit(iteration.whole)
    keys = jax.random.split(key, cfg.repeats + 1)
    with count_compilations() as compilations:
        metrics["whole_seconds"] = seconds(lambda: whole(state, frozen, keys[0]), cfg.repeats)
        metrics["compilations"] = compilations()
    metrics["sampled_tokens"] = float(completions.mask.sum())
    print(json.dumps({name: round(value, 4) for name, value in metrics.items()}))
    return metrics


if __name__ == "__main__":
    run_main(main, Config)
