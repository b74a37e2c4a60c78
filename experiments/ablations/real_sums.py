"""A real model learns sums from a checker: GRPO, beside SFT on the solutions of as many problems.

GRPO samples eight answers to eight problems an iteration and learns from a checker alone; SFT learns the right answers
to as many problems as GRPO has seen, and knows their form from them. Both are asked eight answers to each of 32 sums
that neither has seen: pass@1, pass@8.
    python experiments/ablations/real_sums.py --model FOLDER --run-dir runs/sums
Every run is a command of this project in a process of its own; what is finished is left alone. It writes page.md. With
SmolLM2-135M it takes about a quarter of an hour on 2 CPU cores and one seed.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.ablations.commands import Command, StudyFlags, curve, finished, make_study
from experiments.ablations.grid_results import rows_markdown
from rlhf_jax.cli import run_main
from rlhf_jax.data.arithmetic import make_problems
from rlhf_jax.errors import at_least

GROUPS, SIZE, HELDOUT = 8, 8, 32
"""Problems an iteration, answers to each, and problems that nobody learns."""


@dataclass(frozen=True)
class Config(StudyFlags):
    """GRPO and SFT on sums."""

    digits: int = 1
    steps: int = 30
    """Iterations of GRPO."""
    learning_rate: float = 3e-4
    seeds: int = 1

    def __post_init__(self) -> None:
        """Raises UserError for a number out of range, and for what is missing."""
        at_least(self, digits=1, steps=1, learning_rate=0, seeds=1)
        super().__post_init__()


def write_problems(cfg: Config, folder: Path) -> None:
    """Writes the sums that are learned, once as prompts with answers and once as solutions, and those held out.

    A tenth of a file of prompts is held out: the file for the tests has ten times as many, of which none is learned.
    """
    learned = cfg.steps * GROUPS
    rows = make_problems(learned + 10 * HELDOUT, digits=cfg.digits)
    solutions = [{"prompt": row["prompt"], "completion": row["answer"]} for row in rows[:learned]]
    for name, some in {"learned": rows[:learned], "solutions": solutions, "tests": rows[learned:]}.items():
        text = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def commands(cfg: Config, folder: Path) -> list[Command]:
    """All runs, in the order in which they are made."""
    made = []
    learned, solutions, tests = (str(folder / f"{name}.jsonl") for name in ("learned", "solutions", "tests"))

    asked = ["--reward", "math", "--max-new-tokens", "16"]

    def tested(name: str, model: str, seed: int) -> Command:
        """One iteration without a learning rate: what counts is the answers before it."""
        flags = ["--model", model, "--prompts", tests, "--heldout", str(HELDOUT), *asked, "--steps", "1"]
        flags += ["--pass-samples", str(SIZE), "--groups", "1", "--group-size", "2", "--learning-rate", "0"]
        return Command(name, "grpo.py", (*flags, "--seed", str(seed)))

    for seed in range(cfg.seeds):
        flags = ["--model", cfg.model, "--prompts", learned, "--heldout", "1", *asked, "--steps", str(cfg.steps)]
        flags += ["--groups", str(GROUPS), "--group-size", str(SIZE), "--learning-rate", str(cfg.learning_rate)]
        made += [Command(f"grpo-{seed}", "grpo.py", (*flags, "--seed", str(seed)))]
        flags = ["--model", cfg.model, "--demonstrations", solutions, "--heldout", "1", "--seed", str(seed)]
        made += [Command(f"sft-{seed}", "sft.py", tuple(flags)), tested(f"start-{seed}-test", cfg.model, seed)]
        made += [tested(f"{n}-{seed}-test", str(folder / f"{n}-{seed}" / "policy"), seed) for n in ("grpo", "sft")]
    return made


def page_parts(cfg: Config, folder: Path) -> list[str]:
    """Tables of what is finished."""
    rows = []
    for name in ("start", "sft", "grpo"):
        for seed in range(cfg.seeds):
            found = finished(folder, f"{name}-{seed}-test") or {}
            shares = [f"{found[key]:.1%}" if (key := f"start_pass@{k}") in found else "not run" for k in (1, 2, 4, 8)]
            rows.append([name, str(seed), *shares])
    parts = ["## Sums that none has seen", rows_markdown(["", "seed", "pass@1", "pass@2", "pass@4", "pass@8"], rows)]
    if finished(folder, "grpo-0") is not None:
        columns = ("score", f"pass@{SIZE}", "kl_k1", "entropy", "length", "ended")
        heads = ["iteration", "score", f"pass@{SIZE}", "KL, nats", "entropy", "tokens", "answers that end"]
        parts += ["## GRPO, seed 0", rows_markdown(heads, curve(folder, "grpo-0", columns))]
    return parts


def main(cfg: Config) -> None:
    """Makes the runs that are missing, then page.md."""
    make_study(cfg, write_problems, commands, page_parts)


if __name__ == "__main__":
    run_main(main, Config)
