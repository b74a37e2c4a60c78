"""Makes experiments/results/tpu.md: the memory and the least time of each experiment on TPU slices.

    python tpu/table.py > table.md
The numbers are the TPU compiler's; nothing is run on a TPU. A row takes some minutes on 2 CPU cores. `--rows 0 3`
makes only these rows.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

from compile import Config as Case
from compile import main as compile_case

from experiments.bench.programs import Experiment
from experiments.bench.shapes import least_seconds
from rlhf_jax.cli import run_main
from rlhf_jax.errors import UserError

USUAL = 1024
"""Tokens of a row where a case does not say it."""


def long(experiment: Experiment, mesh: str, rows: int) -> Case:
    """A step of 8 billion parameters on sequences of 128k tokens."""
    return Case(experiment, "llama3-8b", rows, topology="v5p:4x4x4", mesh=mesh, prompt=65_536, response=65_536)


CASES = (
    Case("sft", "qwen3-0.6b", topology="v5e:4x4"),
    Case("reward_model", "qwen3-0.6b", topology="v5e:4x4"),
    Case("dpo", "qwen3-0.6b", topology="v5e:4x4"),
    Case("ppo", "qwen3-0.6b", topology="v5e:4x4"),
    Case("ppo", "qwen3-0.6b", topology="v5e:4x4", mesh="fsdp=4,tensor=4"),
    Case("ppo", "qwen3-0.6b", topology="v5e:4x4", mesh="fsdp=4,tensor=4", lora_rank=16),
    Case("ppo", "qwen3-0.6b", topology="v5e:4x4", mesh="data=2,tensor=8"),
    Case("sft", "llama3-8b", topology="v5e:8x16", rows=128),
    Case("sft", "llama3-8b", topology="v5e:8x16", mesh="fsdp=32,tensor=4"),
    Case("ppo", "llama3-8b", topology="v5e:8x16", mesh="fsdp=32,tensor=4"),
    Case("ppo", "llama3-8b", topology="v6e:4x8", mesh="fsdp=8,tensor=4", lora_rank=16),
    Case("ppo", "llama3-8b", topology="v6e:4x8", mesh="data=4,tensor=8", lora_rank=16),
    Case("grpo", "llama3-8b", topology="v5e:8x16", mesh="fsdp=32,tensor=4"),
    Case("grpo", "llama3-8b", topology="v6e:4x8", mesh="fsdp=8,tensor=4", lora_rank=16),
    Case("dpo", "llama3-8b", topology="v5e:8x16"),
    Case("sft", "gemma3-4b", topology="v6e:4x4"),
    Case("sft", "llama3-70b", topology="v5p:8x8x8", rows=512),
    Case("ppo", "llama3-70b", topology="v5p:8x8x8", mesh="fsdp=64,tensor=8"),
    long("sft", "fsdp=8,sequence=8", 8),
    long("sft", "fsdp=16,sequence=4", 16),
    long("dpo", "fsdp=8,sequence=8", 8),
    long("reward_model", "fsdp=8,sequence=8", 8),
    Case("ppo", "llama3-8b", topology="v5e:8x16", mesh="fsdp=32,tensor=4", reward_model="qwen3-0.6b"),
    Case("ppo", "llama3-70b", topology="v5p:8x8x8", mesh="fsdp=64,tensor=8", reward_model="llama3-8b"),
    Case("reward_model", "llama3-8b", topology="v5e:8x16"),
    Case("sft", "qwen3-1.7b", topology="v5e:4x4"),
    Case("sft", "qwen3-4b", topology="v5e:4x8"),
    Case("sft", "qwen3-8b", topology="v6e:4x8"),
    Case("sft", "qwen3-14b", topology="v6e:8x8"),
    Case("sft", "qwen3-32b", topology="v5p:4x4x4"),
    Case("sft", "gemma3-1b", topology="v5e:4x4"),
    Case("sft", "gemma3-12b", topology="v6e:8x8"),
    Case("sft", "gemma3-27b", topology="v5p:4x4x4"),
    Case("grpo", "qwen3-8b", topology="v6e:4x8", mesh="fsdp=8,tensor=4"),
    Case("grpo", "qwen3-32b", topology="v5p:4x4x4", mesh="fsdp=16,tensor=4"),
    Case("grpo", "llama3-8b", topology="v5e:8x16", mesh="fsdp=32,tensor=4", rows=1024, accumulate=8),
    Case("grpo", "llama3-8b", topology="v5e:8x16", mesh="fsdp=32,tensor=4", rows=1024, accumulate=8, slots=256),
    Case("grpo", "qwen3-8b", topology="v6e:4x8", mesh="fsdp=8,tensor=4", rows=512, accumulate=8, slots=128),
    Case("ppo", "llama3-8b", topology="v5e:8x16", mesh="fsdp=32,tensor=4", minibatches=1),
    Case("ppo", "gemma3-4b", topology="v6e:4x4", mesh="fsdp=4,tensor=4"),
    Case("ppo", "llama3-8b", topology="v5p:4x4x4", mesh="fsdp=16,tensor=4"),
)


@dataclass(frozen=True)
class Config:
    """Compiles the cases."""

    rows: tuple[int, ...] = tuple(range(len(CASES)))
    """The rows to compile."""


def main(cfg: Config) -> dict[str, float]:
    """Prints a row a case, as Markdown; returns the least seconds of each."""
    columns = ("experiment", "model", "slice", "mesh", "HBM, GB (state, temporaries)", "sent to a chip, GB")
    print("| " + " | ".join((*columns, "s at least", "limited by", "MFU")) + " |")
    print("|---" * 9 + "|", flush=True)
    seconds = {}
    for number in cfg.rows:
        case = CASES[number]
        what = case.experiment + (f", adapters of {case.lora_rank}" if case.lora_rank else "")
        what += f", reward model {case.reward_model}" if case.reward_model else ""
        what += f", {case.rows} rows" if case.rows else ""
        what += f", {case.slots} slots" if case.slots else ""
        what += ", one minibatch" if case.minibatches == 1 else ""
        what += f", {case.accumulate} parts" if case.accumulate > 1 else ""
        what += f", {length:,} tokens" if (length := case.prompt + case.response) != USUAL else ""
        begin = f"| {what} | {case.model} | {case.topology} | {case.mesh} |"
        try:
            found = compile_case(case, quiet=True)
        except UserError as error:
            print(f"{begin} {str(error).partition(': ')[2].partition(';')[0]} | | | | |", flush=True)
            continue
        memory = f"{found['hbm_gb']:.1f} of {found['hbm_of_gb']:.0f}"
        parts = f"{found['arguments_gb']:.1f}, {found['temporaries_gb']:.1f}"
        print(f"{begin} {memory} ({parts}) | {found['received_gb']:.3g} | {found['seconds']:.3g} |", end="")
        _, limit = least_seconds({name.removeprefix("seconds_of_"): value for name, value in found.items()})
        print(f" {limit} | {found['mfu']:.0%} |", flush=True)
        seconds[f"{number}_seconds"] = found["seconds"]
    return seconds


if __name__ == "__main__":
    run_main(main, Config)
