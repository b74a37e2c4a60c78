"""A real model revises its own answers by principles, and a reward model that learned from people reads the chains.

Bai et al. 2022, §3 (https://arxiv.org/abs/2212.08073) find that each revision is more harmless to a preference model.
Here that is a reward model of HH-RLHF's harmless comparisons, on the model's own weights: it says how often it likes a
revision better than the answer. The prompts are other first turns of the same set.
    python experiments/ablations/real_constitution.py --model FOLDER --comparisons FILE --asked FILE --run-dir runs/cai
Every run is a command of this project in a process of its own; what is finished is left alone. It writes page.md. With
SmolLM2-135M it takes about half an hour on 2 CPU cores.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.ablations.commands import Command, StudyFlags, finished, lines_of, make_study, one_line, rate
from experiments.ablations.grid_results import rows_markdown
from rlhf_jax.cli import run_main
from rlhf_jax.data.suites import read_rows
from rlhf_jax.errors import UserError, at_least

WATCH, CHAINS = "reward-model", "constitutional"


@dataclass(frozen=True)
class Config(StudyFlags):
    """A reward model of people's comparisons, and the chains that it reads."""

    comparisons: str = ""
    """jsonl[.gz] of comparisons in HH-RLHF's form."""
    asked: str = ""
    """Others in the same form, whose first turns are the prompts."""
    limit: int = 1000
    """Comparisons that the reward model learns from."""
    prompts: int = 40
    longest: int = 120
    """Characters of a prompt."""
    revisions: int = 2
    examples: int = 1
    constitution: str | None = None

    def __post_init__(self) -> None:
        """Raises UserError for a number out of range, and for what is missing."""
        at_least(self, limit=16, prompts=4, longest=8, revisions=1, examples=0)
        super().__post_init__()
        if not self.comparisons or not self.asked:
            raise UserError(f"--{'asked' if self.comparisons else 'comparisons'} is missing")


def write_prompts(cfg: Config, folder: Path) -> None:
    """Writes the first turns, each once. Raises UserError where there are too few."""
    found: dict[str, None] = {}
    for _, row in read_rows(cfg.asked, None):
        first = str(row.get("chosen", "")).split("\n\nAssistant:")[0].rpartition("Human:")[2].strip()
        if 0 < len(first) <= cfg.longest and len(found) < cfg.prompts:
            found[first] = None
    if len(found) < cfg.prompts:
        raise UserError(
            f"{cfg.asked}: {len(found)} first turns of at most {cfg.longest} characters, not {cfg.prompts}"
        )
    text = "".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in found)
    (folder / "prompts.jsonl").write_text(text, encoding="utf-8")


def commands(cfg: Config, folder: Path) -> list[Command]:
    """Both runs."""
    flags: tuple[str, ...]
    flags = ("--model", cfg.model, "--comparisons", cfg.comparisons, "--limit", str(cfg.limit), "--on-bad-row", "skip")
    made = [Command(WATCH, "reward_model.py", (*flags, "--max-length", "192", "--prompts-per-step", "8"))]
    flags = ("--model", cfg.model, "--prompts", str(folder / "prompts.jsonl"), "--heldout", "4")
    flags += ("--watch", str(folder / WATCH / "reward_model"), "--revisions", str(cfg.revisions))
    flags += ("--examples", str(cfg.examples), "--temperature", "0.5", "--max-length", "1024")
    flags += ("--max-new-tokens", "128", "--sft.steps", "3", "--dpo.steps", "3", "--eval-batch-size", "8")
    flags += ("--constitution", cfg.constitution) if cfg.constitution else ()
    return [*made, Command(CHAINS, "constitutional.py", flags)]


def page_parts(cfg: Config, folder: Path) -> list[str]:
    """How often the reward model is right, how often it likes a revision better, and chains."""
    parts = []
    if (own := finished(folder, WATCH)) is not None:
        longer = own["reward_model_length_baseline"]
        parts += [f"The reward model is right on {rate(own, 'reward_model_val_accuracy')} of its held-out pairs; the"
                  f" longer answer is the preferred one in {longer:.0%}."]  # fmt: skip
    if (found := finished(folder, CHAINS)) is None:
        return parts
    rows = []
    for number in range(1, cfg.revisions + 1):
        name = f"reward_model_prefers_revision_{number}"
        rows.append([str(number), rate(found, name), f"{found[f'{name}_n']:.0f}"])
    heads = ["revision", "preferred", "chains with both texts"]
    parts += ["## Revisions against the answer", rows_markdown(heads, rows)]
    chains = list(lines_of(folder / CHAINS / "chains.jsonl"))
    reasons = Counter(chain["unlearned"] or "all there, and the last one ends" for chain in chains)
    parts += [f"{len(chains)} chains: " + "; ".join(f"{reason}: {n}" for reason, n in reasons.items()) + "."]
    return [*parts, "## Chains", *(chain_table(chain) for chain in chains if not chain["unlearned"])][: len(parts) + 7]


def chain_table(chain: dict[str, Any]) -> str:
    """A chain as a table of its texts."""
    rows = [["prompt", one_line(chain["prompt"], 400)], ["answer", one_line(chain["answer"], 400)]]
    for step in chain["revisions"]:
        rows += [[f"critique, “{step['principle']}”", one_line(step["critique"], 400)]]
        rows += [["revision", one_line(step["revision"], 400)]]
    return rows_markdown(["", ""], rows)


def main(cfg: Config) -> None:
    """Makes the runs that are missing, then page.md."""
    make_study(cfg, write_prompts, commands, page_parts)


if __name__ == "__main__":
    run_main(main, Config)
