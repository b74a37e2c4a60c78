"""Memory of a compiled PPO iteration: four full models, and adapters and heads on one frozen trunk.

    python experiments/bench/one_trunk.py
Nothing is allocated and nothing runs: XLA says what the compiled program needs. Prints a JSON line a shape. A
program's peak is its arguments + temporaries + outputs − what outputs share with arguments. Activations are measured
apart: the most temporaries that a part (rollout, scoring, one minibatch of both updates) needs when compiled alone.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import ppo
from experiments.adapters import split
from experiments.ppo import PPO, Frozen
from experiments.setting import PRECISIONS, PrecisionName
from rlhf_jax.batches import Prompts, Tokens
from rlhf_jax.cli import run_main
from rlhf_jax.models import ModelConfig, Transformer, from_language_model

COMMON = dict(
    rope_theta=10_000.0, norm_eps=1e-5, tie_embeddings=True, max_length=2048, scan_layers=True, remat=True
)  # fmt: skip
SHAPES = {
    "15M": ModelConfig(
        vocab_size=32_000, d_model=288, n_layers=6, n_heads=6, n_kv_heads=6, head_dim=48, d_ff=768, **COMMON
    ),
    "0.5B": ModelConfig(
        vocab_size=151_936, d_model=896, n_layers=24, n_heads=14, n_kv_heads=2, head_dim=64, d_ff=4864,
        **COMMON | {"qkv_bias": True},
    ),
}  # fmt: skip
"""TinyStories-15M's, and Qwen2-0.5B's."""


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
    frozen_dtype: Literal["float32", "bfloat16", "int8"] | None = None


def abstract(cfg: Config, ppo_cfg: PPO, model: ModelConfig) -> tuple[ppo.State, Frozen]:
    """State and Frozen of a run, as shapes."""
    width = cfg.prompt_length
    rows = np.zeros((64, width), np.int32)
    prompts = Prompts(rows, rows == 0, rows[:, 0])
    demonstrations = Tokens(rows, rows, rows == 0, rows, rows)

    def build(key: Any) -> tuple[ppo.State, Frozen]:
        params = Transformer(model).init(key, jnp.zeros((1, 8), jnp.int32))["params"]
        scalar = from_language_model(params, key, model)
        trunk, policy = split(ppo_cfg, key, params)
        own = split(ppo_cfg, key, scalar)[1]
        reference = {} if trunk else params
        return ppo.init_state(ppo_cfg, model, policy, own), Frozen(reference, own, prompts, demonstrations, trunk)

    return jax.eval_shape(build, jax.random.key(0))


def size(tree: Any) -> int:
    """Bytes of its arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def memory(function: Any, *arguments: Any, donate: tuple[int, ...] = ()) -> dict[str, int]:
    """What the compiled function needs, in bytes."""
    found = jax.jit(function, donate_argnums=donate).lower(*arguments).compile().memory_analysis()
    parts = {name: getattr(found, f"{name}_size_in_bytes") for name in ("argument", "temp", "output", "alias")}
    return parts | {"peak": parts["argument"] + parts["temp"] + parts["output"] - parts["alias"]}


def measure(cfg: Config, name: str) -> dict[str, Any]:
    """Both programs of a shape."""
    model = replace(SHAPES[name], precision=PRECISIONS[cfg.precision])
    key = jax.eval_shape(lambda: jax.random.key(0))
    result: dict[str, Any] = {"shape": name}
    for kind, rank in [("four_models", 0), ("one_trunk", cfg.lora_rank)]:
        ppo_cfg = PPO(
            responses=cfg.responses, minibatches=cfg.minibatches, lora_rank=rank, frozen_dtype=cfg.frozen_dtype
        )
        make = partial(ppo.make_iteration, config=model, max_new_tokens=cfg.answer_length, eos_id=2, pad_id=0)
        iteration = make(ppo_cfg)
        state, frozen = abstract(cfg, ppo_cfg, model)
        result[kind] = memory(iteration.whole, state, frozen, key, donate=(0,))
    # One minibatch, so that nothing is carried from one to the next.
    alone = make(replace(ppo_cfg, epochs=1, minibatches=1, responses=cfg.responses // cfg.minibatches))
    prompts, completions = jax.eval_shape(iteration.rollout, state, frozen, key)
    some = [jax.eval_shape(lambda t: jax.tree.map(lambda x: x[: len(x) // cfg.minibatches], t), t)
            for t in (prompts, completions)]  # fmt: skip
    experience, _ = jax.eval_shape(alone.score, state, frozen, *some)
    result["activations"] = {
        "rollout": memory(iteration.rollout, state, frozen, key)["temp"],
        "scoring": memory(iteration.score, state, frozen, prompts, completions)["temp"],
        "update": memory(alone.update, state, frozen, experience, key, donate=(0,))["temp"],
    }
    result["frozen_copy"] = size(frozen.trunk)
    result["own"] = size((state, frozen.reward_model))
    floor = result["frozen_copy"] + max(result["activations"].values())
    result["four_over_one"] = result["four_models"]["peak"] / result["one_trunk"]["peak"]
    result["one_over_floor"] = result["one_trunk"]["peak"] / floor
    return result


def main(cfg: Config) -> dict[str, float]:
    """Compiles; prints and returns the ratios."""
    ratios = {}
    for name in cfg.shapes:
        result = measure(cfg, name)
        print(json.dumps(result), flush=True)
        ratios |= {f"{name}_{ratio}": result[ratio] for ratio in ("four_over_one", "one_over_floor")}
    return ratios


if __name__ == "__main__":
    run_main(main, Config)
