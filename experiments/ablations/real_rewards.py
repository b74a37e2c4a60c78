"""Human comparisons of several kinds and a real model: reward models of each kind, tested on all.

From each file of --comparisons reward models learn with several seeds, and each is tested on the files of
--preferences beside "pick the longer": Bai et al. 2022, §3 (https://arxiv.org/abs/2204.05862) train on helpful and on
harmless comparisons, which disagree with each other.
    python experiments/ablations/real_rewards.py --model FOLDER \\
        --comparisons hh_helpful_base.train.jsonl.gz hh_harmless_base.train.jsonl.gz \\
        --preferences hh_helpful_base.eval.jsonl.gz hh_harmless_base.eval.jsonl.gz llmbar.jsonl.gz \\
        --run-dir runs/rewards
Every run is a command of this project in a process of its own. What is finished is left alone, so the same call again
goes on. It writes page.md. With SmolLM2-135M expect about two hours on 2 CPU cores.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.ablations.commands import Command, StudyFlags, make_study
from experiments.ablations.grid_results import rows_markdown
from experiments.ablations.real_preferences import reward_model_rows
from rlhf_jax.cli import run_main
from rlhf_jax.errors import UserError, at_least


@dataclass(frozen=True)
class Config(StudyFlags):
    """Reward models of real comparisons."""

    comparisons: tuple[str, ...] = ()
    """Files of comparisons; each has reward models of its own."""
    preferences: tuple[str, ...] = ()
    """Files of comparisons on which all are tested."""
    rows: int = 600
    """Comparisons of each file to learn from."""
    limit: int = 200
    """The most rows of a file of the test."""
    seeds: int = 3

    def __post_init__(self) -> None:
        """Raises UserError for a number out of range, and for what is missing."""
        at_least(self, rows=20, limit=2, seeds=1)
        super().__post_init__()
        if not self.comparisons or not self.preferences:
            raise UserError("--comparisons and --preferences are both needed: files to learn from, and for the test")
        for name in ("comparisons", "preferences"):
            if len(set(map(kind, getattr(self, name)))) < len(getattr(self, name)):
                raise UserError(f"two files of --{name} have one name: their numbers could not be told apart")


def kind(file: str) -> str:
    """The name of a file without its endings."""
    return Path(file).name.split(".")[0]


def models(cfg: Config) -> dict[str, tuple[str, int]]:
    """The file and the seed of each reward model, by the name of its folder."""
    return {f"{kind(file)}-{seed}": (file, seed) for file in cfg.comparisons for seed in range(cfg.seeds)}


def commands(cfg: Config, folder: Path) -> list[Command]:
    """Each reward model, and its test."""
    made = []
    for name, (file, seed) in models(cfg).items():
        learn = (
            "--model", cfg.model, "--comparisons", file, "--limit", str(cfg.rows), "--seed", str(seed),
            "--on-bad-row", "skip", "--max-length", "192", "--prompts-per-step", "8", "--evaluations", "3",
        )  # fmt: skip
        test = (
            "--reward-model", str(folder / name / "reward_model"), "--preferences", *cfg.preferences,
            "--limit", str(cfg.limit), "--max-length", "512",
        )  # fmt: skip
        made += [Command(name, "reward_model.py", learn), Command(f"{name}-test", "evaluate.py", test)]
    return made


def page_parts(cfg: Config, folder: Path) -> list[str]:
    """The table of what is finished; below the models of each file is what picking the longer has on its pairs."""
    heads = ["", "own held-out pairs", "calibration error (by chance alone)", *map(kind, cfg.preferences)]
    rows = []
    for file in cfg.comparisons:
        own = [name for name, (learned, _) in models(cfg).items() if learned == file]
        rows += reward_model_rows(folder, own, cfg.preferences)
    return ["## Reward models", rows_markdown(heads, rows)]


def main(cfg: Config) -> None:
    """Makes the runs that are missing, then page.md."""
    make_study(cfg, lambda cfg, folder: None, commands, page_parts)


if __name__ == "__main__":
    run_main(main, Config)
