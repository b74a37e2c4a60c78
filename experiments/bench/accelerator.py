"""Accelerator use by kind of work: MFU of the updates, and the share of memory bandwidth that decoding reaches.

    python experiments/bench/accelerator.py > rows.jsonl
It runs on one device, with random weights and tokens, and bfloat16 arithmetic on float32 weights. The largest model
has adapters on a trunk in bfloat16. The peaks are measured first, with a large matrix product (bfloat16) and a copy.
MFU divides the model's own operations, without recomputation, by the first peak. Decoding's share divides the bytes
that it must read (for each token all weights and the cache so far) by the second. Each row is a JSON line, measured in
a process of its own. A row that does not fit the device's memory says so.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp

from experiments import ppo
from experiments.bench.programs import Case, Program, build, score_and_shape
from rlhf_jax.cli import run_main
from rlhf_jax.errors import UserError, at_least

MODELS = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b")
ADAPTED = {"qwen2.5-7b": 16}
"""Adapter ranks of the models that are too large for training all weights."""
Work = Literal["device", "sft", "dpo", "ppo_update", "decode"]
EXPERIMENT: dict[Work, Literal["sft", "dpo", "ppo"]] = {
    "sft": "sft",
    "dpo": "dpo",
    "ppo_update": "ppo",
    "decode": "ppo",
}
"""The experiment whose program contains each kind of work."""


@dataclass(frozen=True)
class Config:
    """Times rows, each in a process of its own."""

    models: tuple[str, ...] = MODELS
    """Some of the published shapes of experiments/bench/shapes.py."""
    work: tuple[Work, ...] = ("sft", "dpo", "ppo_update", "decode")
    """The kinds of work. `device` measures only the device's peaks."""
    rows: int = 8
    """Sequences in a step, and in each of PPO's four minibatches. Decoding has 64."""
    prompt: int = 512
    response: int = 512
    steps: int = 10
    """Steps that are timed, after 2 that are not."""
    matrix: int = 16384
    """Rows and columns of the matrix that measures the device's peaks."""
    peak: tuple[float, float] | None = None
    """The device's peaks, in FLOP/s and bytes/s. By default they are measured first."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range, an odd number of rows, unknown models, and without any work."""
        at_least(self, rows=2, prompt=1, response=1, steps=1, matrix=1)
        if self.rows % 2:
            raise UserError(f"rows is {self.rows}; DPO's answers come in pairs, so it must be even")
        if not self.models or not self.work:
            raise UserError("nothing to time: give some --models and --work")
        for model in self.models:
            Case("sft", model)  # refuses what is not there


def seconds(call: Callable[[], Any], steps: int) -> float:
    """The median duration of the timed calls, after 2 that are not timed."""
    taken = []
    for _ in range(2 + steps):
        began = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[2:])


def device(cfg: Config) -> dict[str, Any]:
    """Peaks of the device: of a matrix product in bfloat16, and of reading and writing a large array."""
    n, times = cfg.matrix, 50  # one copy ends before the host has started the next
    a = jnp.ones((n, n), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    copies = jax.jit(lambda a: jax.lax.fori_loop(0, times, lambda _, a: a + 1, a))
    return {
        "work": "device",
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "flops_per_s": 2 * n**3 / seconds(lambda: product(a), cfg.steps),
        "bytes_per_s": times * 2 * a.nbytes / seconds(lambda: copies(a), cfg.steps),
    }


def arrays(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function under jit. It takes the place of `jax.eval_shape` where arrays are needed."""
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
    assert program.flags_and_setup is not None
    state, frozen, prompts, key = program.args
    score = jax.jit(partial(score_and_shape, *program.flags_and_setup))
    experience, _ = score(state, frozen, prompts, decoding(program)())
    update = jax.jit(partial(ppo.update, *program.flags_and_setup), donate_argnums=0)
    return stepping(program._replace(function=update, args=(state, frozen, experience, key)))


def decoding(program: Program) -> Callable[[], Any]:
    """PPO's sampling: prompts are read, then a token of each row at a time."""
    assert program.flags_and_setup is not None
    rollout, (state, frozen, prompts, key) = jax.jit(partial(ppo.rollout, *program.flags_and_setup)), program.args
    # Only the arrays that sampling reads are kept.
    state = state._replace(policy=state.policy.replace(opt_state=()), critic=())
    frozen = frozen._replace(reference=(), rewards={})
    return lambda: rollout(state, frozen, prompts, key)


def measure(cfg: Config, model: str, work: Work, peak: tuple[float, float]) -> dict[str, Any]:
    """Measures one row in this process. `peak` is the device's FLOP/s and bytes/s."""
    ppo = EXPERIMENT[work] == "ppo"
    rows = 64 if work == "decode" else cfg.rows * (4 if ppo else 1)
    case = Case(
        EXPERIMENT[work], model, rows=rows, prompt=cfg.prompt, response=cfg.response,
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
    """Measures one row in a process of its own, which has the device to itself.

    Raises UserError when the process fails for another reason than the device's memory.
    """
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
    """Prints a line a row; returns each row's MFU, or decoding's share of the bandwidth.

    Raises UserError when the device's peaks cannot be measured.
    """
    if cfg.work == ("device",):
        print(json.dumps(device(cfg)), flush=True)
        return {}
    if len(cfg.models) == len(cfg.work) == 1 and cfg.peak is not None:
        print(json.dumps(measure(cfg, cfg.models[0], cfg.work[0], cfg.peak)), flush=True)
        return {}
    found: dict[str, float] = {}
    peak = cfg.peak
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
                found[f"{model}_{work}"] = row["mfu" if "mfu" in row else "share_of_bandwidth"]
    return found


if __name__ == "__main__":
    run_main(main, Config)
