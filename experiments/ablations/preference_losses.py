"""What β does in direct preference optimisation, and its kin beside it: true utility against the distance from SFT.

Rafailov et al. 2024 (https://arxiv.org/abs/2406.02900) find that these losses are over-optimised as reward models are:
a smaller β goes further from the reference, and from some point on gets worse there. Here the true utility is known.
For each seed a world, SFT and comparisons of its own; then a run for each loss, β and learning rate.
    python experiments/ablations/preference_losses.py
    python experiments/ablations/preference_losses.py --losses dpo ipo simpo orpo kto --betas
Without a number after --betas each loss has its own. Finished runs are kept: --resume goes on after them.
"""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments import dpo, pipeline, sft
from experiments.dpo import DPO
from experiments.setting import keep_freed_memory, world_setting
from experiments.sft import SFT
from rlhf_jax.cli import run_main
from rlhf_jax.errors import at_least
from rlhf_jax.log import Run
from rlhf_jax.metrics import read_metrics


@dataclass(frozen=True)
class Config:
    """Preference losses at several β and learning rates, several seeds."""

    run_dir: str | None = None
    seed: int = 0
    """The first one."""
    seeds: int = 2
    resume: bool = False
    losses: tuple[Literal["dpo", "ipo", "simpo", "orpo", "kto"], ...] = ("dpo",)
    betas: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    learning_rates: tuple[float, ...] = ()
    jobs: int = 2
    """Processes at once, a seed each."""
    sft: SFT = field(default_factory=SFT)
    dpo: DPO = field(default_factory=DPO)


def variants(cfg: Config) -> list[DPO]:
    """Every loss with every β and learning rate."""
    return [
        replace(cfg.dpo, loss=loss, beta=beta, learning_rate=rate)
        for loss in cfg.losses
        for beta in cfg.betas or (cfg.dpo.beta,)
        for rate in cfg.learning_rates or (cfg.dpo.learning_rate,)
    ]


def name(variant: DPO) -> str:
    """A variant's folder."""
    return f"{variant.loss}-{variant.beta_used:g}-{variant.learning_rate:g}"


def one_seed(seed: int, *, cfg: Config, folder: Path) -> list[dict[str, float]]:
    """SFT, comparisons, and every variant; each one's result is also in its folder."""
    folder = folder / f"seed-{seed}"
    keep_freed_memory()
    setting = world_setting(seed)
    with Run(folder / "sft", cfg, resume=(folder / "sft" / "config.json").exists()) as run:
        start = sft.train(cfg.sft, setting, run, seed)[-1]
        comparisons = setting.compare(sft.make_sampler(setting, start, seed))
    results = []
    for variant in variants(cfg):
        path = folder / name(variant)
        if not (path / "result.json").exists():
            with Run(path, variant, resume=(path / "config.json").exists()) as run:
                policy, reward, metrics = dpo.train(variant, setting, comparisons, start, run, seed)
                metrics |= pipeline.evaluate(setting, start, policy, reward, run, seed, stage="dpo")
                logged = [row["utility"] for row in read_metrics(path)["dpo"] if "utility" in row]
                metrics["peak_utility"] = max(logged)
                (path / "result.json").write_text(json.dumps(metrics), encoding="utf-8")
        results.append(json.loads((path / "result.json").read_text(encoding="utf-8")))
    return results


COLUMNS = {
    "KL to SFT, nats": ("dpo_kl_k1", 1), "true utility": ("dpo_utility", 2), "its peak": ("peak_utility", 2),
    "beats SFT": ("win_rate", 3), "on shifted prompts": ("shifted_win_rate", 3),
    "held-out accuracy": ("dpo_val_accuracy", 3), "log π chosen": ("dpo_val_chosen_change", 1),
    "log π rejected": ("dpo_val_rejected_change", 1), "length": ("dpo_length", 1), "ended": ("dpo_ended", 3),
    "copies": ("dpo_duplicates", 3),
}  # fmt: skip


def markdown(cfg: Config, results: list[list[dict[str, float]]]) -> str:
    """A row a variant: the mean over seeds, with the least and the most of them where there are several."""
    lines = ["| loss | β | learning rate | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (3 + len(COLUMNS))]
    for i, variant in enumerate(variants(cfg)):
        cells = [variant.loss, f"{variant.beta_used:g}", f"{variant.learning_rate:g}"]
        for key, digits in COLUMNS.values():
            values = [result[i][key] for result in results]
            spread = f" ({min(values):.{digits}f}, {max(values):.{digits}f})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.{digits}f}{spread}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> dict[str, float]:
    """Runs all seeds; returns each variant's true utility and KL, means over seeds."""
    at_least(cfg, seed=0, seeds=1, jobs=1)
    with Run(cfg.run_dir, cfg, name="preference_losses", resume=cfg.resume) as run:
        work = partial(one_seed, cfg=cfg, folder=run.dir)
        with ProcessPoolExecutor(cfg.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            results = list(pool.map(work, range(cfg.seed, cfg.seed + cfg.seeds)))
        table = markdown(cfg, results)
        (run.dir / "table.md").write_text(table, encoding="utf-8")
        run.say(table)
        metrics: dict[str, Any] = {}
        for i, variant in enumerate(variants(cfg)):
            for key, _ in COLUMNS.values():
                metrics[f"{name(variant)}_{key}"] = float(np.mean([result[i][key] for result in results]))
        metrics["sft_utility"] = float(np.mean([result[0]["sft_utility"] for result in results]))
        run.summary(metrics)
    return metrics


if __name__ == "__main__":
    run_main(main, Config)
