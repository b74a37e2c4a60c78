"""Memory of a compiled PPO iteration: four full models, and adapters and heads on one frozen trunk.

    python experiments/bench/one_trunk.py
Nothing is allocated and nothing runs: XLA reports the memory of the compiled program. Prints a JSON line a shape. A
program's peak is its arguments + temporaries + outputs − what outputs share with arguments. Activations are measured
apart: the most temporaries that a part (rollout, scoring, one minibatch of both updates) needs when compiled alone.
"""

import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from experiments import ppo
from experiments.bench.programs import ppo_setup, score_and_shape
from experiments.bench.shapes import model_config
from experiments.flags import PRECISIONS, PrecisionName
from experiments.ppo import PPO
from rlhf_jax.actor_critic import Frozen, Setup, State, init_state
from rlhf_jax.adapters import FrozenDtype
from rlhf_jax.batches import Prompts, Tokens
from rlhf_jax.cli import run_main
from rlhf_jax.models import from_language_model

SHAPES = {"15M": "stories-15m", "0.5B": "qwen2.5-0.5b"}
"""The names of the shapes in experiments/bench/shapes.py."""


@dataclass(frozen=True)
class Config:
    """Compiles, and prints bytes."""

    shapes: tuple[Literal["15M", "0.5B"], ...] = ("15M", "0.5B")
    responses: int = 8
    minibatches: int = 4
    prompt_length: int = 64
    answer_length: int = 64
    lora_rank: int = 16
    precision: PrecisionName = "float32"
    frozen_dtype: FrozenDtype | None = None


def abstract(cfg: Config, ppo_cfg: PPO, setup: Setup) -> tuple[State, Frozen, Prompts]:
    """The State and Frozen of a run, and an iteration's prompts, as shapes without arrays."""
    width = cfg.prompt_length
    rows: Any = np.zeros((64, width), np.int32)
    asked: Any = np.zeros((cfg.responses, width), np.int32)
    demonstrations = Tokens(rows, rows, rows == 0, rows, rows)

    def build(key: Any) -> tuple[State, Frozen, Prompts]:
        params = setup.policy.init(key, jnp.zeros((1, 8), jnp.int32))["params"]
        scalar = from_language_model(params, key, setup.policy.config)
        trunk, policy = ppo_cfg.split_trainable(params, key)
        own = ppo_cfg.split_trainable(scalar, key)[1]
        frozen = Frozen({} if trunk else params, {"reward_model": own}, demonstrations, trunk)
        state = init_state(setup, policy, own, ppo_cfg.make_optimizer(1000), ppo_cfg.beta)
        return state, frozen, Prompts(asked, asked == 0, asked[:, 0])

    return jax.eval_shape(build, jax.random.key(0))


def size(tree: Any) -> int:
    """Bytes of a tree's arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def memory(function: Any, *arguments: Any, donate: tuple[int, ...] = ()) -> dict[str, int]:
    """Bytes of memory that the compiled function needs, by kind."""
    found = jax.jit(function, donate_argnums=donate).lower(*arguments).compile().memory_analysis()
    parts = {name: getattr(found, f"{name}_size_in_bytes") for name in ("argument", "temp", "output", "alias")}
    return parts | {"peak": parts["argument"] + parts["temp"] + parts["output"] - parts["alias"]}


def measure(cfg: Config, name: str) -> dict[str, Any]:
    """Measures both programs at one shape."""
    model = model_config(SHAPES[name], PRECISIONS[cfg.precision])
    setup = ppo_setup(model, max_new_tokens=cfg.answer_length, eos_id=2, pad_id=0)
    key = jax.eval_shape(lambda: jax.random.key(0))
    result: dict[str, Any] = {"shape": name}
    for kind, rank in [("four_models", 0), ("one_trunk", cfg.lora_rank)]:
        ppo_cfg = PPO(
            responses=cfg.responses, minibatches=cfg.minibatches, learning_rate=5e-4, lora_rank=rank,
            frozen_dtype=cfg.frozen_dtype,
        )  # fmt: skip
        state, frozen, prompts = abstract(cfg, ppo_cfg, setup)
        result[kind] = memory(partial(ppo.iterate, ppo_cfg, setup), state, frozen, prompts, key, donate=(0,))
    rollout, scoring = (partial(part, ppo_cfg, setup) for part in (ppo.rollout, score_and_shape))
    completions = jax.eval_shape(rollout, state, frozen, prompts, key)
    # One minibatch, so that nothing is carried from one to the next.
    alone = replace(ppo_cfg, epochs=1, minibatches=1, responses=cfg.responses // cfg.minibatches)
    some = [jax.eval_shape(lambda t: jax.tree.map(lambda x: x[: len(x) // cfg.minibatches], t), t)
            for t in (prompts, completions)]  # fmt: skip
    experience, _ = jax.eval_shape(partial(score_and_shape, alone, setup), state, frozen, *some)
    update = partial(ppo.update, alone, setup)
    result["activations"] = {
        "rollout": memory(rollout, state, frozen, prompts, key)["temp"],
        "scoring": memory(scoring, state, frozen, prompts, completions)["temp"],
        "update": memory(update, state, frozen, experience, key, donate=(0,))["temp"],
    }
    result["frozen_copy"] = size(frozen.trunk)
    result["own"] = size((state, frozen.rewards))
    floor = result["frozen_copy"] + max(result["activations"].values())
    result["four_over_one"] = result["four_models"]["peak"] / result["one_trunk"]["peak"]
    result["one_over_floor"] = result["one_trunk"]["peak"] / floor
    return result


def main(cfg: Config) -> dict[str, float]:
    """Compiles; prints and returns the ratios."""
    ratios: dict[str, float] = {}
    for name in cfg.shapes:
        result = measure(cfg, name)
        print(json.dumps(result), flush=True)
        ratios |= {f"{name}_{ratio}": result[ratio] for ratio in ("four_over_one", "one_over_floor")}
    return ratios


if __name__ == "__main__":
    run_main(main, Config)
