"""Rollouts whose answers differ in length: static batches beside a queue that refills slots.

    python experiments/bench/long_tails.py
    python experiments/bench/long_tails.py --rows 256 --slots 64 --median 48 --longest 512

Lengths are log-normal with p95 = 8 × the median, as long chains of thought have them, and no answer ends by itself.
The static batches have as many rows as the queue has slots, and run until the longest of their answers ends. Useful
tokens a second of both are printed, from the second of two runs, with their ratio. Then a reward that waits for
`--reward-seconds` an answer, as for a server: asked when all answers are there, and as they end.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.batches import Ended
from rlhf_jax.cli import run_main
from rlhf_jax.models import ModelConfig, Transformer
from rlhf_jax.rewards.reward import HostScores, Part
from rlhf_jax.rewards.stream import Stream
from rlhf_jax.sampling import generate
from rlhf_jax.sampling.queue import generate_queued


@dataclass(frozen=True)
class Config:
    """The work."""

    rows: int = 256
    """Answers."""
    slots: int = 64
    """Rows at once."""
    group_size: int = 8
    """Answers to a prompt."""
    prompt: int = 64
    """Tokens of a prompt."""
    median: int = 48
    """Tokens of the median answer."""
    longest: int = 512
    """The most tokens of an answer."""
    reward_seconds: float = 0.1
    """Seconds that a reward takes for an answer."""
    seed: int = 0


MODEL = ModelConfig(
    vocab_size=32_000, d_model=288, n_layers=6, n_heads=6, n_kv_heads=6, head_dim=48, d_ff=768, rope_theta=10_000.0,
    norm_eps=1e-5, tie_embeddings=True, max_length=2048,
)  # fmt: skip
"""A Llama of 15.2 million parameters."""


def main(cfg: Config) -> dict[str, Any]:
    """Times both; returns their numbers."""
    rng = np.random.default_rng(cfg.seed)
    sigma = np.log(8) / 1.645
    lengths = np.clip(np.round(cfg.median * np.exp(sigma * rng.normal(size=cfg.rows))), 1, cfg.longest).astype(int)
    model = Transformer(MODEL)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    prompts = jnp.asarray(rng.integers(3, MODEL.vocab_size, (cfg.rows // cfg.group_size, cfg.prompt)), jnp.int32)
    mask = jnp.ones(prompts.shape, bool)
    numbers: dict[str, Any] = dict(max_new_tokens=cfg.longest, temperature=1.0, eos_id=None, pad_id=0)

    def queue(put: Any = None) -> Any:
        return generate_queued(
            model, params, prompts, mask, jax.random.key(1), group_size=cfg.group_size, slots=cfg.slots,
            limits=jnp.asarray(lengths), put=put, **numbers,
        )  # fmt: skip

    def static() -> Any:
        repeated = jnp.repeat(prompts, cfg.group_size, axis=0)
        out = []
        for start in range(0, cfg.rows, cfg.slots):
            rows = slice(start, start + cfg.slots)
            longest = numbers | {"max_new_tokens": int(lengths[rows].max())}
            out.append(
                generate(model, params, repeated[rows], mask[:1].repeat(cfg.slots, 0), jax.random.key(1), **longest)
            )
        return out

    def reward(part: Part, ended: Ended) -> dict[str, HostScores]:
        time.sleep(cfg.reward_seconds * len(ended.rows))
        return {}

    stream = Stream()

    def scored_after() -> Any:
        found = jax.block_until_ready(queue())
        rows = np.arange(cfg.rows)
        reward(Part(rows, cfg.rows), Ended(rows, np.asarray(found.tokens), np.asarray(found.mask)))

    def scored_meanwhile() -> Any:
        with stream.scored(reward, cfg.rows) as future:
            jax.block_until_ready(queue(stream.put))
        future.result()

    found: dict[str, Any] = {"tokens": int(lengths.sum()), "median": float(np.median(lengths)),
                             "p95": float(np.percentile(lengths, 95)), "longest": int(lengths.max())}  # fmt: skip
    ways = {"static": static, "queue": queue, "scored_after": scored_after, "scored_meanwhile": scored_meanwhile}
    for name, run in ways.items():
        for _ in range(2):
            began = time.perf_counter()
            jax.block_until_ready(run())
            seconds = time.perf_counter() - began
        found[f"{name}_seconds"] = round(seconds, 2)
        found[f"{name}_tokens_per_second"] = round(found["tokens"] / seconds, 1)
    found["scoring_seconds"] = cfg.reward_seconds * cfg.rows
    found["ratio"] = round(found["static_seconds"] / found["queue_seconds"], 2)
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    run_main(main, Config)
