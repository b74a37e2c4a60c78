"""Does bfloat16 arithmetic change what is learned: SFT, reward model and PPO in float32 and in mixed precision.

Micikevicius et al. 2017 (https://arxiv.org/abs/1710.03740). For each seed and precision one whole run on its own
answers, from the same initial weights and in the same order, so that only arithmetic differs.
    python experiments/ablations/precision.py
About 15 minutes on 2 CPU cores, which have no bfloat16 arithmetic of their own. Prints and writes a table: what each
seed ends at, the differences, and beside them what seeds differ by. On real text (flags as for pipeline.py) there is
no utility. Nothing is measured of speed or memory: for that an accelerator is needed.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import ppo, reward_model, sft
from experiments.ppo import PPO
from experiments.reward_model import RewardModel
from experiments.setting import PrecisionName, Source, load_setting
from experiments.sft import SFT
from rlhf_jax import checkpoint
from rlhf_jax.cli import on_mesh, run_main
from rlhf_jax.errors import at_least
from rlhf_jax.hosts import from_first
from rlhf_jax.log import Run
from rlhf_jax.models import Transformer

LAST = 5
"""Iterations of PPO whose mean is taken."""


@dataclass(frozen=True)
class Config(Source):
    """The same stages in several precisions, several seeds."""

    seeds: int = 3
    precisions: tuple[PrecisionName, ...] = ("float32", "mixed")
    """The first one is what the others are compared with."""
    stages: tuple[Literal["sft", "reward_model", "ppo"], ...] = ("sft", "reward_model", "ppo")
    """The first ones of these."""
    comparisons_used: int = 3000
    """Prompts whose answers the reward model learns from."""
    sft: SFT = field(default_factory=lambda: SFT(steps=500))
    reward_model: RewardModel = field(default_factory=lambda: RewardModel(epochs=1))
    ppo: PPO = field(default_factory=lambda: PPO(steps=25))

    def __post_init__(self) -> None:
        at_least(self, seeds=2, comparisons_used=1)


def one_run(cfg: Config, seed: int, precision: PrecisionName, folder: Path) -> dict[str, float]:
    """Trains; returns what it ends at. A finished run is only read."""
    begun, done = from_first(lambda: [(folder / name).exists() for name in ("config.json", "summary.json")])
    if not done:
        source = replace(cfg, seed=seed, precision=precision)
        with Run(folder, source, resume=begun) as run:
            train(cfg, source, run)
            run.summary(from_first(lambda: results(folder)))
    return from_first(lambda: results(folder))


def train(cfg: Config, source: Source, run: Run) -> None:
    """The stages, in one precision."""
    setting = load_setting(source)
    params = sft.train(cfg.sft, setting, run, source.seed)[-1]
    if "reward_model" not in cfg.stages:
        return
    compared = setting.compare(sft.make_sampler(setting, params, source.seed))
    if compared.pack is None:
        rows = np.arange(min(cfg.comparisons_used, len(compared.train.ranks)))
        compared = compared._replace(train=reward_model.pick(compared.train, rows))
    rewards, _ = reward_model.train(cfg.reward_model, setting, compared, params, run, source.seed)
    if "ppo" in cfg.stages:
        ppo.train(cfg.ppo, setting, params, rewards, run, source.seed)


def results(folder: Path) -> dict[str, float]:
    """What a run ended at, from its metrics."""
    with open(folder / "metrics.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]

    def last(stage: str, name: str, count: int = 1) -> float:
        values = [row[name] for row in rows if row["stage"] == stage and name in row]
        return float(np.mean(values[-count:])) if values else float("nan")

    def most(stage: str, name: str) -> float:
        return max((row[name] for row in rows if row["stage"] == stage), default=float("nan"))

    found = {
        "SFT: validation loss": last("sft", "val_loss"),
        "SFT: true utility": last("sft", "utility"),
        "reward model: held-out accuracy": last("reward_model", "val_accuracy"),
        "PPO: true utility": last("ppo", "utility", LAST),
        "PPO: KL to SFT": last("ppo", "kl_k1", LAST),
        # Those of the worst iteration.
        "PPO: log-probabilities of sampler and trainer differ by, mean": most("ppo", "sampler_gap"),
        "PPO: the same, 95th percentile": most("ppo", "sampler_gap_p95"),
        "PPO: the same, most": most("ppo", "sampler_gap_max"),
    }
    return {name: value for name, value in found.items() if np.isfinite(value)}


def table(cfg: Config, found: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: each seed in each precision, the differences, and what seeds differ by."""
    base, *others = cfg.precisions
    head = "".join(f" {p}: each seed | difference, mean and sd |" for p in others)
    lines = [f"| | {base}: each seed | sd over seeds |{head}", "|---|---|---|" + "---|---|" * len(others)]
    for name in found[base][0]:
        reference = np.array([run[name] for run in found[base]])
        row = f"| {name} | {listed(reference)} | {reference.std(ddof=1):.2g} |"
        for precision in others:
            values = np.array([run[name] for run in found[precision]])
            change = values - reference
            row += f" {listed(values)} | {change.mean():+.2g} ± {change.std(ddof=1):.2g} |"
        lines.append(row)
    return "\n".join(lines) + "\n"


def crossed(cfg: Config, run_dir: Path) -> str:
    """Markdown: SFT's true utility on PPO's prompts, as it was trained and as it is sampled from."""
    lines = ["| trained in | sampled in | true utility of SFT, each seed | standard error |", "|---|---|---|---|"]
    found: dict[tuple[str, str], list[np.ndarray]] = {(t, s): [] for t in cfg.precisions for s in cfg.precisions}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        settings = {name: load_setting(replace(cfg, seed=seed, precision=name)) for name in cfg.precisions}
        likes = {
            name: jax.jit(Transformer(setting.model).init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
            for name, setting in settings.items()
        }
        for trained, sampled in found:
            stored = checkpoint.restore(
                run_dir / f"{trained}-{seed}", "sft_epochs", cfg.sft.steps, like=likes[trained]
            )["params"]
            params = jax.tree.map(lambda x, like: x.astype(like.dtype), stored, likes[sampled]["params"])
            setting = settings[sampled]
            answers = sft.make_sampler(setting, params, seed)(setting.prompts, 0)
            found[trained, sampled].append(setting.judge(setting.prompts, answers))
    for (trained, sampled), utilities in found.items():
        errors = [values.std(ddof=1) / np.sqrt(len(values)) for values in utilities]
        means = listed(np.array([values.mean() for values in utilities]))
        lines.append(f"| {trained} | {sampled} | {means} | {max(errors):.2g} |")
    return "\n".join(lines) + "\n"


def listed(values: np.ndarray) -> str:
    """As they stand in a cell."""
    return ", ".join(f"{value:.4g}" for value in values)


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Trains everything; returns the means over seeds."""
    with Run(cfg.run_dir, cfg, name="precision", resume=cfg.resume) as run:
        found = {
            precision: [
                one_run(cfg, seed, precision, run.dir / f"{precision}-{seed}")
                for seed in range(cfg.seed, cfg.seed + cfg.seeds)
            ]
            for precision in cfg.precisions
        }
        text = table(cfg, found)
        if cfg.model is None and not cfg.sft.lora_rank:
            text += "\n" + crossed(cfg, run.dir)
        if run.first:
            (run.dir / "table.md").write_text(text, encoding="utf-8")
        run.say(text)
        metrics = {
            f"{precision}: {name}": float(np.mean([end[name] for end in found[precision]]))
            for precision in cfg.precisions
            for name in found[precision][0]
        }
        run.summary(metrics)
    return metrics


if __name__ == "__main__":
    run_main(main, Config)
