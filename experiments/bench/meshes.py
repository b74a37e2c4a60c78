"""Each algorithm's step on meshes of 8 simulated devices: is it that of one device, and what does it send?

    python experiments/bench/meshes.py
Three minutes on 2 CPU cores. A model of three scanned layers whose sizes tell its arrays apart, rows of 1 to 12 tokens
that count, most of them on the last devices; plain gradient descent, so that parameters move by their gradient. Prints
the largest differences to one device, and how many collectives of each kind the compiled program has, as Markdown.
"""

import re
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import dpo, ppo
from rlhf_jax.batches import Prompts, Tokens
from rlhf_jax.cli import run_main
from rlhf_jax.data.tokens import pad_sequences
from rlhf_jax.errors import UserError
from rlhf_jax.losses import bradley_terry_loss
from rlhf_jax.models import ModelConfig, ScalarModel, Transformer, from_language_model
from rlhf_jax.scoring import response_rewards, sft_objective
from rlhf_jax.sharding import make_mesh, shard_batch, shard_params
from rlhf_jax.train import make_state, make_train_step

# Vocabulary 96, width 16, queries 32, keys 16, feed-forward 40.
MODEL = ModelConfig(
    vocab_size=96, d_model=16, n_layers=3, n_heads=8, n_kv_heads=4, head_dim=4, d_ff=40, rope_theta=1e4,
    norm_eps=1e-5, tie_embeddings=True, max_length=32, scan_layers=True,
)  # fmt: skip
ROWS, LENGTH, NEW_TOKENS = 16, 14, 7
MESHES = ("data=8", "fsdp=8", "data=2,tensor=4", "data=2,fsdp=2,tensor=2")
# XLA's CPU backend runs collectives that do not wait for one another in any order, each device in its own: simulated
# devices may then wait for each other for ever.
IN_ORDER = {"xla_cpu_enable_concurrency_optimized_scheduler": False}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Config:
    """Compares meshes with one device."""

    meshes: tuple[str, ...] = MESHES
    """Of 8 devices each."""


class Stepped(NamedTuple):
    """What a step came to, on the host, and its compiled program."""

    state: list[Any]
    """Its leaves."""
    metrics: dict[str, Any]
    rest: Any
    program: str
    before: Any
    """Shardings of the state that went in."""
    after: Any
    """Those of the one that came out."""


@cache
def weights() -> tuple[Any, Any]:
    """A language model's and a ScalarModel's parameters."""
    params = jax.jit(Transformer(MODEL).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return jax.tree.map(np.asarray, (params, from_language_model(params, jax.random.key(1), MODEL)))


def tokens(seed: int) -> Tokens:
    """Few that count in the rows of the first devices, many in those of the last."""
    rng = np.random.default_rng(seed)
    lengths = np.sort(rng.integers(1, LENGTH - 1, ROWS))
    return pad_sequences([([3], rng.integers(4, 96, n).tolist()) for n in lengths], length=LENGTH, pad_id=0)


def sft() -> tuple[Any, tuple[Any, ...]]:
    """The step and what it takes, placed on the mesh that is set."""
    model = Transformer(MODEL)
    return make_train_step(partial(sft_objective, model)), (
        make_state(model, weights()[0], optax.sgd(1.0)),
        shard_batch(tokens(0)),
    )


def reward_model() -> tuple[Any, tuple[Any, ...]]:
    """Pairs: the first half of the rows against the second."""
    model = ScalarModel(MODEL)

    def loss_fn(params: Any, batch: Tokens) -> Any:
        return bradley_terry_loss(*jnp.split(response_rewards(model, params, batch), 2))

    return make_train_step(loss_fn), (make_state(model, weights()[1], optax.sgd(1.0)), shard_batch(tokens(1)))


def preferences() -> tuple[Any, tuple[Any, ...]]:
    """DPO."""
    model, some = Transformer(MODEL), tokens(2)
    references = np.linspace(-9, -2, ROWS, dtype=np.float32)
    batch = dpo.Batch(some, np.arange(ROWS) < ROWS // 2, some.mask.sum(axis=1), references)
    cfg = dpo.DPO(batch_size=ROWS // 2)
    state = make_state(model, weights()[0], optax.sgd(1.0))
    return make_train_step(partial(dpo.objective, cfg, model)), (state, shard_batch(batch))


def ppo_iteration() -> tuple[Any, tuple[Any, ...]]:
    """Rollout, scores of four models, two updates with every term of the loss."""
    cfg = ppo.PPO(responses=ROWS, minibatches=2, epochs=1, ptx_coef=0.5, entropy_coef=0.1)
    iteration = ppo.make_iteration(cfg, MODEL, max_new_tokens=NEW_TOKENS, eos_id=2, pad_id=0)
    ids = np.random.default_rng(4).integers(4, 96, (24, 5))
    real = np.arange(5) >= np.arange(24)[:, None] % 4
    params, rewards = weights()
    frozen = shard_params(ppo.Frozen(params, rewards, Prompts(ids, real, np.arange(24)), tokens(3)))
    optimizer = optax.sgd(0.1)
    state = ppo.State(
        make_state(Transformer(MODEL), params, optimizer),
        make_state(ScalarModel(MODEL), rewards, optimizer),
        shard_params(jnp.float32(cfg.beta)),
    )
    return jax.jit(iteration.whole, donate_argnums=0), (state, frozen, jax.random.key(7))


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
    return Stepped(*host, compiled.as_text(), before, after)


def shardings_of(state: Any) -> list[Any]:
    """Of its arrays of numbers, in the order of its leaves."""
    return [leaf.sharding for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array) and leaf.ndim]


def collectives(program: str) -> list[tuple[str, list[tuple[int, ...]], str]]:
    """Of a compiled program (HLO text): each one's kind, the shapes that it makes, and what in the code it is of."""
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
    """The largest difference of two trees."""
    differences = jax.tree.map(lambda a, b: np.abs(np.float64(a) - np.float64(b)).max(initial=0), found, expected)
    return max(map(float, jax.tree.leaves(differences)))


def main(cfg: Config) -> dict[str, float]:
    """Prints the two tables; returns the largest differences."""
    jax.config.update("jax_num_cpu_devices", 8)
    if len(jax.devices()) != 8:
        raise UserError(
            f"this compares meshes of 8 simulated CPU devices; there are {len(jax.devices())} of another kind"
        )
    lines = ["| step | mesh | loss | gradients | " + " | ".join(KINDS) + " |", "|---" * (4 + len(KINDS)) + "|"]
    metrics = {}
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
