"""Compares each algorithm's step on meshes of 8 simulated devices with one device, and counts its collectives.

    python experiments/bench/meshes.py
It takes three minutes on 2 CPU cores. The model has three scanned layers, and sizes that tell its arrays apart. Rows
have 1 to 12 tokens in the mask; the last devices have the longest rows. Gradient descent is plain, so parameters move
by their gradient. The Markdown table has the largest differences from one device, and the number of collectives of
each kind in the compiled program.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import dpo, ppo
from experiments.bench.programs import ppo_setup
from rlhf_jax.actor_critic import Frozen, State
from rlhf_jax.batches import Prompts, Tokens
from rlhf_jax.cli import run_main
from rlhf_jax.data.pairs import AnswerBatch
from rlhf_jax.data.tokens import pad_sequences
from rlhf_jax.errors import UserError
from rlhf_jax.losses import bradley_terry_loss
from rlhf_jax.models import ModelConfig, ScalarModel, Transformer, from_language_model
from rlhf_jax.preference import objective
from rlhf_jax.scoring import response_rewards, sft_objective
from rlhf_jax.sharding import make_mesh, shard_batch, shard_params
from rlhf_jax.train import make_state, make_train_step

# Vocabulary 96, width 16, queries 32, keys 16, feed-forward 40.
MODEL = ModelConfig(
    vocab_size=96, d_model=16, n_layers=3, n_heads=8, n_kv_heads=4, head_dim=4, d_ff=40, rope_theta=1e4,
    norm_eps=1e-5, tie_embeddings=True, max_length=32, scan_layers=True,
)  # fmt: skip
ROWS, LENGTH, NEW_TOKENS = 16, 14, 7
MESHES = (
    "data=8", "fsdp=8", "data=2,tensor=4", "data=2,fsdp=2,tensor=2", "fsdp=4,sequence=2", "fsdp=2,sequence=2,tensor=2",
)  # fmt: skip
# XLA's CPU backend runs collectives that do not wait for one another in any order, each device in its own: simulated
# devices may then wait for each other for ever.
IN_ORDER = {"xla_cpu_enable_concurrency_optimized_scheduler": False}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Config:
    """Compares meshes with one device."""

    meshes: tuple[str, ...] = MESHES
    """Meshes of 8 devices."""


class Stepped(NamedTuple):
    """The results of a step on the host, and its compiled program."""

    state: list[Any]
    """The leaves of the new state."""
    metrics: dict[str, Any]
    rest: Any
    program: str
    before: Any
    """Shardings of the state before the step."""
    after: Any
    """Shardings of the state after the step."""


@cache
def weights() -> tuple[Any, Any]:
    """A language model's and a ScalarModel's parameters."""
    params = jax.jit(Transformer(MODEL).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return jax.tree.map(np.asarray, (params, from_language_model(params, jax.random.key(1), MODEL)))


def tokens(seed: int) -> Tokens:
    """Rows with few tokens in the mask on the first devices, and with many on the last."""
    rng = np.random.default_rng(seed)
    lengths = np.sort(rng.integers(1, LENGTH - 1, ROWS))
    return pad_sequences([([3], rng.integers(4, 96, n).tolist()) for n in lengths], length=LENGTH, pad_id=0)


def sft() -> tuple[Any, tuple[Any, ...]]:
    """SFT's step and its arguments, placed on the mesh that is set."""
    model = Transformer(MODEL)
    return make_train_step(partial(sft_objective, model)), (
        make_state(model, weights()[0], optax.sgd(1.0)),
        shard_batch(tokens(0)),
    )


def reward_model() -> tuple[Any, tuple[Any, ...]]:
    """The reward model's step. Pairs are the first half of the rows against the second."""
    model = ScalarModel(MODEL)

    def loss_fn(params: Any, batch: Tokens) -> Any:
        return bradley_terry_loss(*jnp.split(response_rewards(model, params, batch), 2))

    return make_train_step(loss_fn), (make_state(model, weights()[1], optax.sgd(1.0)), shard_batch(tokens(1)))


def preferences() -> tuple[Any, tuple[Any, ...]]:
    """DPO's step and its arguments."""
    model, some = Transformer(MODEL), tokens(2)
    references: Any = np.linspace(-9, -2, ROWS, dtype=np.float32)
    chosen: Any = np.arange(ROWS) < ROWS // 2
    batch = AnswerBatch(some, chosen, some.mask.sum(axis=1), references, np.zeros_like(references))
    state = make_state(model, weights()[0], optax.sgd(1.0))
    return make_train_step(partial(objective, partial(dpo.loss, dpo.DPO()), model)), (state, shard_batch(batch))


def ppo_iteration() -> tuple[Any, tuple[Any, ...]]:
    """PPO's iteration: a rollout, scores of four models, and two updates with every term of the loss."""
    cfg = ppo.PPO(responses=ROWS, minibatches=2, epochs=1, ptx_coef=0.5, entropy_coef=0.1)
    setup = ppo_setup(MODEL, max_new_tokens=NEW_TOKENS, eos_id=2, pad_id=0)
    ids: Any = np.random.default_rng(4).integers(4, 96, (ROWS, 5))
    real: Any = np.arange(5) >= np.arange(ROWS)[:, None] % 4
    params, rewards = weights()
    prompts = Prompts(ids, real, jnp.arange(ROWS))
    frozen = shard_params(Frozen(params, {"reward_model": rewards}, tokens(3)))
    optimizer = optax.sgd(0.1)
    state = State(
        make_state(setup.policy, params, optimizer),
        make_state(setup.critic, rewards, optimizer),
        shard_params(jnp.float32(cfg.beta)),
    )
    return jax.jit(partial(ppo.iterate, cfg, setup), donate_argnums=0), (state, frozen, prompts, jax.random.key(7))


ALGORITHMS: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
    "sft": sft, "reward model": reward_model, "dpo": preferences, "ppo": ppo_iteration,
}  # fmt: skip


@cache
def stepped(algorithm: str, mesh: str | None) -> Stepped:
    """One step on a mesh, or on one device."""
    with nullcontext() if mesh is None else jax.set_mesh(make_mesh(mesh)):
        step, args = ALGORITHMS[algorithm]()
        compiled = step.lower(*args).compile(IN_ORDER)
        before = shardings_of(args[0])
        state, metrics, *rest = compiled(*args)
        after = shardings_of(state)
    host = jax.tree.map(np.asarray, (jax.tree.leaves(state), metrics, rest))
    leaves, metrics, rest = host
    return Stepped(leaves, metrics, rest, compiled.as_text(), before, after)


def shardings_of(state: Any) -> list[Any]:
    """Shardings of the state's arrays, in the order of its leaves. Scalars are left out."""
    return [leaf.sharding for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array) and leaf.ndim]


def collectives(program: str) -> list[tuple[str, list[tuple[int, ...]], str]]:
    """Collectives of a compiled program (HLO text): kind, result shapes, and the name of the operation in the code."""
    found = []
    kinds = "|".join((*KINDS, "collective-broadcast", "ragged-all-to-all"))
    for line in program.splitlines():
        if match := re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            origin = re.search(r'op_name="([^"]*)"', line)
            made = [tuple(map(int, filter(None, shape.split(",")))) for shape in shapes]
            found.append((match[2], made, origin[1] if origin else ""))
    return found


def furthest(found: Any, expected: Any) -> float:
    """The largest absolute difference between two trees."""
    differences = jax.tree.map(lambda a, b: np.abs(np.float64(a) - np.float64(b)).max(initial=0), found, expected)
    return max(map(float, jax.tree.leaves(differences)))


def main(cfg: Config) -> dict[str, float]:
    """Prints the table; returns the largest differences.

    Raises UserError where there are not 8 simulated CPU devices.
    """
    jax.config.update("jax_num_cpu_devices", 8)
    if len(jax.devices()) != 8:
        raise UserError(
            f"this needs 8 simulated CPU devices, and there are {len(jax.devices())}: run it with JAX_PLATFORMS=cpu"
        )
    lines = ["| step | mesh | loss | gradients | " + " | ".join(KINDS) + " |", "|---" * (4 + len(KINDS)) + "|"]
    metrics: dict[str, float] = {}
    for algorithm in ALGORITHMS:
        one = stepped(algorithm, None)
        for mesh in cfg.meshes:
            many = stepped(algorithm, mesh)
            loss = furthest(many.metrics["loss"], one.metrics["loss"])
            moved = furthest(many.state, one.state) / (0.1 if algorithm == "ppo" else 1.0)
            counts = Counter(kind for kind, *_ in collectives(many.program))
            cells = [algorithm, mesh, f"{loss:.1e}", f"{moved:.1e}", *(str(counts[kind]) for kind in KINDS)]
            lines.append(f"| {' | '.join(cells)} |")
            metrics |= {f"{algorithm}, {mesh}: loss": loss, f"{algorithm}, {mesh}: gradients": moved}
    print("\n".join(lines))
    return metrics


if __name__ == "__main__":
    run_main(main, Config)
