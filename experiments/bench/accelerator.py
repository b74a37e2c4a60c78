"""How much of an accelerator each kind of work uses: MFU of the updates, and decoding's share of the memory's rate.

    python experiments/bench/accelerator.py > rows.jsonl
On one device, with random weights and tokens, bfloat16 arithmetic on float32 weights; the largest model has adapters
on a trunk in bfloat16. First measures what the device reaches at a large matrix product (bfloat16) and at a copy. MFU
is the model's own operations, without what is computed twice, over the first; decoding's share is the bytes that it
has to read, all weights and the cache so far for each token, over the second. Prints a JSON line a row, each from a
process of its own; a row that does not fit the device's memory says so.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments.bench.programs import Case, Program, build
from rlhf_jax.cli import run_main
from rlhf_jax.errors import UserError, at_least

MODELS = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b")
ADAPTED = {"qwen2.5-7b": 16}
"""Ranks of the adapters of those that are too large to be trained whole."""
Work = Literal["device", "sft", "dpo", "ppo_update", "decode"]


@dataclass(frozen=True)
class Config:
    """Times rows, each in a process of its own."""

    models: tuple[str, ...] = MODELS
    """Some of the published shapes of experiments/bench/shapes.py."""
    work: tuple[Work, ...] = ("sft", "dpo", "ppo_update", "decode")
    """`device` is the device alone, which the others are compared with."""
    rows: int = 8
    """Sequences of a step, and of a minibatch of PPO's, of which there are four. Decoding has 64."""
    prompt: int = 512
    response: int = 512
    steps: int = 10
    """Those that count, after 2 that do not."""
    matrix: int = 16384
    """Rows and columns of the matrices that measure the device."""
    peak: tuple[float, float] | None = None
    """FLOP/s and bytes/s of the device; without, they are measured first."""

    def __post_init__(self) -> None:
        at_least(self, rows=2, prompt=1, response=1, steps=1, matrix=1)
        if self.rows % 2:
            raise UserError(f"rows is {self.rows}, and DPO's answers go in pairs: give an even number")
        if not self.models or not self.work:
            raise UserError("nothing to time: give some --models and --work")
        for model in self.models:
            Case("sft", model)  # refuses what is not there


def seconds(call: Callable[[], Any], steps: int) -> float:
    """Median of those that count."""
    taken = []
    for _ in range(2 + steps):
        began = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[2:])


def device(cfg: Config) -> dict[str, Any]:
    """What it reaches: a matrix product in bfloat16, and reading and writing a large array."""
    n = cfg.matrix
    a = jnp.ones((n, n), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    copy = jax.jit(lambda a: a + 1)
    return {
        "work": "device",
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "flops_per_s": 2 * n**3 / seconds(lambda: product(a), cfg.steps),
        "bytes_per_s": 2 * a.nbytes / seconds(lambda: copy(a), cfg.steps),
    }


def arrays(function: Callable[..., Any], *args: Any) -> Any:
    """As `jax.eval_shape`, but what it returns is there."""
    return jax.jit(function)(*args)


def stepping(program: Program) -> Callable[[], Any]:
    """Takes a step of the program again and again; its state, the first argument, is donated."""
    state, *rest = program.args

    def call() -> Any:
        nonlocal state
        state, metrics = program.function(state, *rest)
        return metrics

    return call


def updating(program: Program) -> Callable[[], Any]:
    """PPO's update on one experience."""
    assert program.iteration is not None
    state, frozen, key = program.args
    experience, _ = jax.jit(program.iteration.score)(state, frozen, *decoding(program)())
    update = jax.jit(program.iteration.update, donate_argnums=0)
    return stepping(program._replace(function=update, args=(state, frozen, experience, key)))


def decoding(program: Program) -> Callable[[], Any]:
    """PPO's sampling: prompts are read, then a token of each row at a time."""
    assert program.iteration is not None
    rollout, (state, frozen, key) = jax.jit(program.iteration.rollout), program.args
    # What samples is kept, and no more.
    state = state._replace(policy=state.policy.replace(opt_state=()), critic=())
    frozen = frozen._replace(reference=(), reward_model=())
    return lambda: rollout(state, frozen, key)


def measure(cfg: Config, model: str, work: Work, peak: tuple[float, float]) -> dict[str, Any]:
    """One row, in this process, of a device with that peak."""
    ppo = work in ("ppo_update", "decode")
    rows = 64 if work == "decode" else cfg.rows * (4 if ppo else 1)
    case = Case(
        "ppo" if ppo else work, model, rows=rows, prompt=cfg.prompt, response=cfg.response,
        lora_rank=ADAPTED.get(model, 0),
    )  # fmt: skip
    program = build(case, arrays)
    tokens, flops = rows * (cfg.prompt + cfg.response), program.flops
    if work == "decode":
        call, tokens = decoding(program), rows * cfg.response
    elif work == "ppo_update":
        call, flops = updating(program), program.update_flops
    else:
        call = stepping(program)
    decoded = program.decoded
    del program  # of its arrays only those that are called with live on
    taken = seconds(call, cfg.steps)
    share = {"share_of_bandwidth": decoded / taken / peak[1]}
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "work": work,
        "model": model,
        "lora_rank": case.lora_rank,
        "rows": rows,
        "seconds_per_step": taken,
        "tokens_per_s": tokens / taken,
        "process_peak_memory_gb": memory["peak_bytes_in_use"] / 1e9 if memory else None,
    } | (share if work == "decode" else {"mfu": flops / taken / peak[0]})


def apart(cfg: Config, work: Work, **more: Any) -> dict[str, Any]:
    """One row, from a process of its own, which has the device to itself: its last line."""
    flags = {"work": work, "rows": cfg.rows, "prompt": cfg.prompt, "response": cfg.response, "steps": cfg.steps,
             "matrix": cfg.matrix, **more}  # fmt: skip
    command = [sys.executable, __file__]
    for name, value in flags.items():
        command += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "RESOURCE_EXHAUSTED" in done.stderr or "Out of memory" in done.stderr:
        return {"work": work, **more, "error": "does not fit the device's memory"}
    sys.stderr.write(done.stderr)
    raise UserError(f"{work} ended with exit status {done.returncode}; what it said is above")


def main(cfg: Config) -> dict[str, float]:
    """Prints a line a row; returns MFU, or decoding's share of the bandwidth, of each."""
    if cfg.work == ("device",):
        print(json.dumps(device(cfg)), flush=True)
        return {}
    if len(cfg.models) == len(cfg.work) == 1 and cfg.peak is not None:
        print(json.dumps(measure(cfg, cfg.models[0], cfg.work[0], cfg.peak)), flush=True)
        return {}
    found, peak = {}, cfg.peak
    if peak is None:
        row = apart(cfg, "device")
        print(json.dumps(row), flush=True)
        if "error" in row:
            raise UserError(f"two matrices of {cfg.matrix} rows do not fit the device: a smaller --matrix, or --peak")
        peak = row["flops_per_s"], row["bytes_per_s"]
    for model in cfg.models:
        for work in [work for work in cfg.work if work != "device"]:
            row = apart(cfg, work, models=model, peak=peak)
            print(json.dumps(row), flush=True)
            if "error" not in row:
                found[f"{model}_{work}"] = row.get("mfu", row.get("share_of_bandwidth"))
    return found


if __name__ == "__main__":
    run_main(main, Config)
