"""Human comparisons and a real model: reward models, DPO, SimPO and PPO, each judged by others.

The rows of --comparisons (instruction, perhaps input, chosen, rejected) are cut: two fifths (A), two fifths (B), and
prompts for PPO (P) and for the win rates (H). Reward models learn from A with three seeds; one more learns from B,
with another seed, and judges. DPO and SimPO learn A; PPO follows the first reward model, which also picks the best of
sixteen answers of the model itself, beside a random one. Each policy is set beside the model that it came from: on H
by the other reward model and by the model itself as a judge in both orders, and by IFEval and the perplexity of other
texts, which nothing here trains.
    python experiments/ablations/real_preferences.py --model FOLDER --comparisons FILE \\
        --preferences FILE FILE --ifeval FILE --text FILE --run-dir runs/real
Every run is a command of this project in a process of its own. What is finished is left alone, so the same call again
goes on. It writes page.md. With SmolLM2-135M and 1,100 pairs it takes about two hours on 2 CPU cores.
"""

import collections
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.ablations.commands import (
    Command,
    StudyFlags,
    curve,
    finished,
    lines_of,
    make_study,
    one_line,
    rate,
)
from experiments.ablations.grid_results import rows_markdown
from rlhf_jax.cli import run_main
from rlhf_jax.data.suites import read_rows
from rlhf_jax.errors import UserError, at_least

JUDGE, CHOOSER = "reward-model-b", "reward-model-0"
POLICIES = ("dpo", "simpo", "ppo")
BEST = "best-of-16"
CUTS = {"a": 0.4, "b": 0.8, "prompts": 0.92, "heldout": 1.0}
"""The parts of the comparisons, each up to that share of the rows."""


@dataclass(frozen=True)
class Config(StudyFlags):
    """A study of a real model on real comparisons."""

    comparisons: str = ""
    """jsonl[.gz] of instruction, perhaps input, chosen, rejected."""
    preferences: tuple[str, ...] = ()
    """Other comparisons on which the reward models are tested."""
    ifeval: str = ""
    text: str = ""
    """IFEval's prompts, and texts for perplexity: what may be forgotten."""
    limit: int = 120
    """The most rows of each file of an evaluation."""
    seeds: int = 3
    """Reward models on A."""
    steps: int = 30
    """Iterations of PPO."""

    def __post_init__(self) -> None:
        """Raises UserError for a number out of range, and for what is missing."""
        at_least(self, limit=2, seeds=1, steps=1)
        super().__post_init__()
        if not self.comparisons:
            raise UserError("--comparisons is missing")


def cut(cfg: Config, folder: Path) -> None:
    """Writes the parts of the comparisons into the folder.

    Raises UserError where parts of other comparisons are there.
    """
    rows = [row for _, row in read_rows(cfg.comparisons, None)]
    firsts = {asked(row): number for number, row in reversed(list(enumerate(rows)))}
    below = 0
    for name, share in CUTS.items():
        end = round(share * len(rows))
        # A prompt goes with its first row: nobody is asked what another part has learned.
        part = [row for row in rows if below <= firsts[asked(row)] < end]
        text = "".join(
            json.dumps({key: row[key] for key in keys_of(name) if key in row}, ensure_ascii=False) + "\n"
            for row in part
        )
        below, file = end, folder / f"{name}.jsonl"
        if file.exists() and file.read_text(encoding="utf-8") != text:
            raise UserError(f"{file} was cut from other comparisons: take another --run-dir")
        file.write_text(text, encoding="utf-8")


def asked(row: dict[str, Any]) -> tuple[Any, Any]:
    """The prompt of a row."""
    return row.get("instruction"), row.get("input")


def keys_of(part: str) -> tuple[str, ...]:
    """The columns of a part: prompts have no answers."""
    return ("instruction", "input") + (("chosen", "rejected") if part in "ab" else ())


def commands(cfg: Config, folder: Path) -> list[Command]:
    """All runs, in the order in which they are made."""
    a, b, prompts, heldout = (str(folder / f"{name}.jsonl") for name in CUTS)
    start = ("--model", cfg.model, "--on-bad-row", "skip", "--max-length", "192")
    chooser, judge = (str(folder / name / "reward_model") for name in (CHOOSER, JUDGE))

    def reward_model(name: str, file: str, seed: int) -> Command:
        flags = ("--comparisons", file, "--seed", str(seed), "--prompts-per-step", "8", "--evaluations", "3")
        return Command(name, "reward_model.py", start + flags)

    def preference(name: str) -> Command:
        return Command(name, f"{name}.py", (*start, "--comparisons", a, "--batch-size", "4", "--evaluations", "2"))

    tests = ["--limit", str(cfg.limit), "--max-new-tokens", "96", "--max-length", "512"]
    tests += (["--ifeval", cfg.ifeval] if cfg.ifeval else []) + (["--text", cfg.text] if cfg.text else [])

    def beside_start(name: str) -> Command:
        against = ("--against", cfg.model, "--prompts", heldout, "--reward-model", judge, "--judge", cfg.model)
        return Command(f"{name}-test", "evaluate.py", ("--model", str(folder / name / "policy"), *against, *tests))

    reward_models = [reward_model(f"reward-model-{seed}", a, seed) for seed in range(cfg.seeds)]
    made = [*reward_models, reward_model(JUDGE, b, 100)]
    for name in [one.name for one in made] if cfg.preferences else []:
        flags = ("--reward-model", str(folder / name / "reward_model"), "--preferences", *cfg.preferences)
        made += [Command(f"{name}-test", "evaluate.py", (*flags, "--limit", str(cfg.limit), "--max-length", "512"))]
    if cfg.ifeval or cfg.text:
        made += [Command("start-test", "evaluate.py", ("--model", cfg.model, *tests))]
    made += [preference("dpo"), beside_start("dpo")]
    short = ("--max-length", "128", "--max-new-tokens", "64")
    scored = ("--reward-model", chooser, "--watch", judge, *start[:-2], *short)
    following = ("--steps", str(cfg.steps), "--epochs", "1")
    made += [Command("ppo", "ppo.py", (*scored, "--prompts", prompts, *following)), beside_start("ppo")]
    flags = ("--model", cfg.model, "--reward-model", chooser, "--watch", judge, "--prompts", heldout, "--n", "16")
    made += [Command(BEST, "best_of_n.py", (*flags, "--max-length", "192", "--max-new-tokens", "64"))]
    flags = ("--reward-model", judge, "--preferences", str(folder / BEST / "pairs.jsonl"), "--max-length", "512")
    made += [Command(f"{BEST}-test", "evaluate.py", flags)]
    made += [preference("simpo"), beside_start("simpo")]
    return made


# The page.


def reward_model_rows(folder: Path, names: Sequence[str], preferences: Sequence[str]) -> list[list[str]]:
    """A row for each reward model: its own held-out pairs, then the other files."""
    rows = []
    for name in names:
        own, tested = finished(folder, name) or {}, finished(folder, f"{name}-test") or {}
        row = [name, rate(own, "reward_model_val_accuracy")]
        row += [f"{own['reward_model_calibration_error']:.2f} ({own['reward_model_calibration_floor']:.2f})"
                if own else "not run"]  # fmt: skip
        rows.append(row + [rate(tested, f"{Path(file).name.split('.')[0]}_accuracy") for file in preferences])
    tested, own = finished(folder, f"{names[0]}-test") or {}, finished(folder, names[0]) or {}
    longer = [f"{100 * own['reward_model_length_baseline']:.0f}%" if own else "not run", ""]
    files = [Path(file).name.split(".")[0] for file in preferences]
    rows.append(["pick the longer", *longer, *(rate(tested, f"{file}_length_baseline") for file in files)])
    return rows


def policy_rows(folder: Path) -> list[list[str]]:
    """A row for each policy beside the model that it came from."""
    rows = []
    for name in ("start", *POLICIES):
        found = finished(folder, f"{name}-test") or {}
        words, distinct = spoken(folder / f"{name}-test") if found else ("not run", "not run")
        rows.append([
            name, *(["", "", ""] if name == "start" else [
                rate(found, "win_rate_reward_model"), rate(found, "win_rate_judge"), rate(found, "judge_consistent"),
            ]), words, distinct, rate(found, "ifeval_prompt_strict"),
            f"{found['perplexity']:.1f}" if "perplexity" in found else "not run",
        ])  # fmt: skip
    return rows


def spoken(folder: Path) -> tuple[str, str]:
    """Words an answer, and the share of answers that differ from all others, over what was asked in a test."""
    texts = [row["answer"] for row in lines_of(folder / "answers.jsonl")]
    counts = collections.Counter(texts)
    return f"{sum(len(text.split()) for text in texts) / len(texts):.0f}", f"{len(counts) / len(texts):.0%}"


def side_by_side(folder: Path, count: int = 4) -> str:
    """The first answers of each policy to the same prompts, beside those of the model that it came from."""
    parts = []
    for name in POLICIES:
        if finished(folder, f"{name}-test") is None:
            continue
        rows = [row for row in lines_of(folder / f"{name}-test" / "answers.jsonl") if row["suite"] == "prompts"]
        cells = [[one_line(row[key]) for key in ("prompt", "against", "answer")] for row in rows[:count]]
        parts.append(rows_markdown(["prompt", "start", name], cells))
    return "\n\n".join(parts)


def page_parts(cfg: Config, folder: Path) -> list[str]:
    """Tables of what is finished."""
    tested = [Path(file).name.split(".")[0] for file in cfg.preferences]
    names = [*(f"reward-model-{seed}" for seed in range(cfg.seeds)), JUDGE]
    parts = ["## Reward models", rows_markdown(
        ["", "own held-out pairs", "calibration error (by chance alone)", *tested],
        reward_model_rows(folder, names, cfg.preferences),
    )]  # fmt: skip
    if (chosen := finished(folder, f"{BEST}-test")) is not None:
        parts += [
            f"Of sixteen answers of the start the one that {CHOOSER} likes best is liked better than a random one by"
            f" {JUDGE} in {rate(chosen, 'pairs_accuracy')} of {chosen['pairs_accuracy_n']:.0f} prompts; the longer of"
            f" the two is the chosen one in {rate(chosen, 'pairs_length_baseline')}."
        ]
    parts += ["## Policies", rows_markdown(
        ["", "wins by the other reward model", "wins by the judge", "judge agrees with itself", "words an answer",
         "answers that differ", "IFEval, strict", "perplexity of other texts"], policy_rows(folder)
    )]  # fmt: skip
    if finished(folder, "ppo") is not None:
        heads = ["iteration", "KL to the start, nats", "reward", "tokens", "answers that end", "entropy"]
        rows = curve(folder, "ppo", ("kl_k1", "score", "length", "ended", "entropy"))
        parts += ["## PPO", rows_markdown(heads, rows)]
    return [*parts, "## Answers side by side", side_by_side(folder)]


def main(cfg: Config) -> None:
    """Makes the runs that are missing, then page.md."""
    make_study(cfg, cut, commands, page_parts)


if __name__ == "__main__":
    run_main(main, Config)
