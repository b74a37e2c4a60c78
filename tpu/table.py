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

from rlhf_jax.cli import run_main
from rlhf_jax.errors import UserError

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
)


@dataclass(frozen=True)
class Config:
    """Compiles the cases."""

    rows: tuple[int, ...] = tuple(range(len(CASES)))
    """The rows to compile."""


def main(cfg: Config) -> dict[str, float]:
    """Prints a row a case, as Markdown; returns the least seconds of each."""
    columns = ("experiment", "model", "slice", "mesh", "HBM, GB (state, temporaries)", "sent to a chip, GB")
    print("| " + " | ".join((*columns, "s at least", "MFU")) + " |")
    print("|---" * 8 + "|", flush=True)
    seconds = {}
    for number in cfg.rows:
        case = CASES[number]
        what = case.experiment + (f", adapters of {case.lora_rank}" if case.lora_rank else "")
        begin = f"| {what} | {case.model} | {case.topology} | {case.mesh} |"
        try:
            found = compile_case(case, quiet=True)
        except UserError as error:
            print(f"{begin} {str(error).partition(': ')[2].partition(';')[0]} | | | |", flush=True)
            continue
        memory = f"{found['hbm_gb']:.1f} of {found['hbm_of_gb']:.0f}"
        parts = f"{found['arguments_gb']:.1f}, {found['temporaries_gb']:.1f}"
        print(f"{begin} {memory} ({parts}) | {found['received_gb']:.3g} | {found['seconds']:.3g} |", end="")
        print(f" {found['mfu']:.0%} |", flush=True)
        seconds[f"{number}_seconds"] = found["seconds"]
    return seconds


if __name__ == "__main__":
    run_main(main, Config)
