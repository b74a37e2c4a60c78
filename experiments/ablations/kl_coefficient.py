"""What β does: without the KL term PPO hacks the reward model, with too much of it nothing is learned.

Gao et al. 2023 (https://arxiv.org/abs/2210.10760), in the controlled world, where the true utility is known. For each
seed, a world, SFT and a reward model of its own; then PPO at each β. `train(key, beta)` is a pure function, one
lax.scan over all iterations.
    python experiments/ablations/kl_coefficient.py
About an hour on 2 CPU cores for 5 seeds. Writes a figure (proxy and true utility against √KL, bands over seeds,
with Gao's fit d(α − β log d)) and a table. Expect true utility at β = 0 to peak and then fall while the proxy climbs,
and the policy to stay at SFT where β is large. Finished seeds are kept in the run folder: --resume goes on after them.

One program vmapped over all β, or one after the other: on 2 cores vmap does not pay, 0.37 against 0.27 seconds an
iteration and β (--vmap measures both). Seeds run in processes of their own, two at a time.
"""

import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from matplotlib.figure import Figure

from experiments import pipeline, ppo, reward_model, sft
from experiments.ppo import PPO
from experiments.reward_model import RewardModel
from experiments.setting import Setting, world_setting
from experiments.sft import SFT
from rlhf_jax.batches import Completions, Prompts
from rlhf_jax.cli import run_main
from rlhf_jax.diagnostics import gao_fit
from rlhf_jax.errors import at_least
from rlhf_jax.log import Run
from rlhf_jax.models import Transformer, from_language_model, with_lora

CURVES = ("score", "utility", "kl_k1", "length", "entropy")


@dataclass(frozen=True)
class Config:
    """PPO at several β, several seeds."""

    run_dir: str | None = None
    seed: int = 0
    """The first one."""
    seeds: int = 5
    resume: bool = False
    betas: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.5, 2.0, 10.0)
    jobs: int = 2
    """Processes at once, a seed each."""
    vmap: bool = False
    """Only measure one program over all β against one after the other, on the first seed."""
    sft: SFT = field(default_factory=SFT)
    reward_model: RewardModel = field(default_factory=RewardModel)
    ppo: PPO = field(default_factory=lambda: PPO(steps=120))
    """Twice the pipeline's iterations: over-optimisation takes its time."""


def make_train(cfg: PPO, setting: Setting, start: Any, reward_params: Any) -> Callable[..., Any]:
    """train(key, beta) -> (policy, metrics and completions of every iteration); pure, so it may be vmapped."""
    iteration = ppo.make_iteration(
        replace(cfg, target_kl=None),
        setting.model,
        max_new_tokens=setting.max_new_tokens,
        eos_id=setting.eos_id,
        pad_id=setting.pad_id,
    )
    policy, frozen = ppo.prepare(cfg, setting, start, reward_params, jax.random.key(0))

    def train(key: PRNGKeyArray, beta: Float[Array, ""]) -> tuple[Any, dict[str, Array], Prompts, Completions]:
        def step(state: ppo.State, key: PRNGKeyArray) -> tuple[ppo.State, Any]:
            state, metrics, prompts, completions = iteration.whole(state, frozen, key)
            return state, (metrics, prompts, completions)

        state = ppo.init_state(cfg, setting.model, policy, frozen.reward_model, beta=beta)
        state, (metrics, prompts, completions) = jax.lax.scan(step, state, jax.random.split(key, cfg.steps))
        return with_lora(frozen.trunk, state.policy.params), metrics, prompts, completions

    return train


def one_seed(seed: int, *, cfg: Config, folder: Path) -> dict[str, Any]:
    """SFT, reward model, and PPO at each β; the result is also in the seed's folder."""
    done = folder / f"seed-{seed}" / "result.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    setting = world_setting(seed)
    with Run(folder / f"seed-{seed}", cfg, resume=(folder / f"seed-{seed}" / "config.json").exists()) as run:
        epochs = sft.train(cfg.sft, setting, run, seed)
        comparisons = setting.compare(sft.make_sampler(setting, epochs[-1], seed))
        reward_params, facts = reward_model.train(cfg.reward_model, setting, comparisons, epochs[-1], run, seed)
        # On one trunk PPO starts where the reward model did.
        start = epochs[-1 if cfg.ppo.lora_rank else pipeline.choose_epoch(setting, epochs, reward_params, run, seed)]
        train = jax.jit(make_train(cfg.ppo, setting, start, reward_params))
        score = partial(reward_model.make_scorer(setting), reward_params)
        assert setting.judge is not None
        curves, finals = [], []
        for beta in cfg.betas:
            policy, metrics, prompts, completions = jax.tree.map(
                np.asarray, train(jax.random.key(seed + 2), jnp.float32(beta))
            )
            flat = [jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), part) for part in (prompts, completions)]
            metrics["utility"] = setting.judge(*flat).reshape(cfg.ppo.steps, -1).mean(axis=1)
            curves.append({name: metrics[name].tolist() for name in CURVES})
            finals.append(pipeline.evaluate(setting, start, policy, score, run, seed, stage="ppo"))
            run.say(f"seed {seed}, β {beta:g}: true utility {finals[-1]['ppo_utility']:.3f}")
        result = {"seed": seed, "facts": facts | setting.facts, "curves": curves, "finals": finals}
        done.write_text(json.dumps(result), encoding="utf-8")
    return result


def fits(cfg: Config, results: list[dict[str, Any]]) -> list[Any]:
    """Gao's form at β = 0, or the smallest there is, for each seed: true utility gained over SFT against √KL."""
    i = int(np.argmin(cfg.betas))
    pairs = [(np.array(r["curves"][i]["kl_k1"]), np.array(r["curves"][i]["utility"])) for r in results]
    sft_utility = [r["finals"][i]["sft_utility"] for r in results]
    return [gao_fit(np.maximum(kl, 0), u - u0) for (kl, u), u0 in zip(pairs, sft_utility, strict=True)]


def table(cfg: Config, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The claims: a row a seed, a row a β (mean and standard deviation over seeds)."""
    rows = []
    for result, fit in zip(results, fits(cfg, results), strict=True):
        facts = result["facts"]
        free = smooth(np.array(result["curves"][int(np.argmin(cfg.betas))]["utility"]))
        rows.append(
            {
                "seed": result["seed"],
                "demonstrators_utility": facts["demonstrators_utility"],
                "sft_utility": result["finals"][0]["sft_utility"],
                "sft_utility_se": result["finals"][0]["sft_utility_se"],
                "sft_utility_std": result["finals"][0]["sft_utility_std"],
                "annotator_agreement": facts["reward_model_annotator_agreement"],
                "reward_model_accuracy": facts["reward_model_val_accuracy"],
                "ceiling": facts["reward_model_ceiling"],
                "share_of_ceiling": facts["reward_model_share_of_ceiling"],
                "longer": facts["reward_model_length_baseline"],
                "peak_at_least_beta": float(free.max()),
                "end_at_least_beta": float(free[-1]),
                "gao_alpha": fit.alpha,
                "gao_beta": fit.beta,
                "gao_r2": fit.r2,
            }
        )
    by_beta = []
    for i, beta in enumerate(cfg.betas):
        finals = [result["finals"][i] for result in results]
        ends = [np.mean(result["curves"][i]["kl_k1"][-5:]) for result in results]
        row: dict[str, Any] = {"beta": beta, "kl": np.mean(ends), "kl_min": min(ends), "kl_max": max(ends)}
        for name in ("ppo_utility", "ppo_score", "win_rate", "shifted_win_rate", "ppo_length"):
            values = [final[name] for final in finals]
            row |= {name: np.mean(values), f"{name}_std": np.std(values), f"{name}_min": min(values)}
        by_beta.append({name: float(value) for name, value in row.items()})
    return {"seeds": rows, "betas": by_beta}


def markdown(claims: dict[str, Any]) -> str:
    """The table as people read it."""
    columns = {
        "seed": "seed", "demonstrators": "demonstrators_utility", "SFT": "sft_utility", "± s.e.": "sft_utility_se",
        "two annotators agree": "annotator_agreement", "reward model agrees": "reward_model_accuracy",
        "ceiling": "ceiling", "share of it": "share_of_ceiling", "pick the longer": "longer",
        "least β: peak": "peak_at_least_beta", "least β: end": "end_at_least_beta",
        "σ of SFT answers": "sft_utility_std",
        "Gao α": "gao_alpha", "Gao β": "gao_beta", "R²": "gao_r2",
    }  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in claims["seeds"]:
        cells = [row[key] if key == "seed" else f"{row[key]:.3f}" for key in columns.values()]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "| β | KL at the end, nats (least, most) | true utility (σ over seeds) | proxy | beats SFT (least) "
        "| the same, shifted prompts (least) | length |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in claims["betas"]:
        lines.append(
            f"| {row['beta']:g} | {row['kl']:.1f} ({row['kl_min']:.1f}, {row['kl_max']:.1f}) "
            f"| {row['ppo_utility']:.2f} ({row['ppo_utility_std']:.2f}) | {row['ppo_score']:.2f} "
            f"| {row['win_rate']:.3f} ({row['win_rate_min']:.3f}) "
            f"| {row['shifted_win_rate']:.3f} ({row['shifted_win_rate_min']:.3f}) | {row['ppo_length']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def smooth(x: np.ndarray, width: int = 5) -> np.ndarray:
    """Running mean over iterations, each of which sees few answers."""
    return np.convolve(x, np.ones(width) / width, mode="valid")


def draw(cfg: Config, results: list[dict[str, Any]], path: Path) -> None:
    """Proxy and true utility against √KL, a colour a β; bands are one standard deviation over seeds."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for i, beta in enumerate(cfg.betas):
        distance = np.array([smooth(np.sqrt(np.maximum(r["curves"][i]["kl_k1"], 0))) for r in results])
        for axis, name in zip(axes, ("score", "utility"), strict=True):
            curve = np.array([smooth(np.array(r["curves"][i][name])) for r in results])
            x, y, spread = distance.mean(axis=0), curve.mean(axis=0), curve.std(axis=0)
            axis.plot(x, y, color=f"C{i}", label=f"β = {beta:g}")
            axis.fill_between(x, y - spread, y + spread, color=f"C{i}", alpha=0.15, linewidth=0)
    found = fits(cfg, results)
    alpha, slope = np.mean([f.alpha for f in found]), np.mean([f.beta for f in found])
    free = np.array([r["curves"][int(np.argmin(cfg.betas))]["kl_k1"] for r in results])
    d = np.linspace(0.05, np.sqrt(free.max()), 200)
    sft_utility = np.mean([r["finals"][0]["sft_utility"] for r in results])
    r2 = np.mean([f.r2 for f in found])
    axes[1].plot(d, sft_utility + d * (alpha - slope * np.log(d)), "k:", label=f"d(α − β log d), R² {r2:.2f}")
    teachers = np.mean([r["facts"]["demonstrators_utility"] for r in results])
    axes[1].axhline(teachers, color="0.5", linewidth=1, linestyle="--", label="demonstrators")
    axes[0].set(xlabel="√KL(π‖SFT), nats", ylabel="reward model's score", title="Proxy")
    axes[1].set(xlabel="√KL(π‖SFT), nats", ylabel="true utility", title="Truth")
    axes[1].legend(fontsize=8)
    figure.savefig(path)


def measure_vmap(cfg: Config) -> dict[str, float]:
    """Seconds an iteration and β: one program over all β, and one β after the other. Compilation not counted."""
    cfg = replace(cfg, ppo=replace(cfg.ppo, steps=4))
    setting = world_setting(cfg.seed)
    model = Transformer(setting.model)
    start = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    reward_params = from_language_model(start, jax.random.key(1), setting.model)
    train = make_train(cfg.ppo, setting, start, reward_params)
    betas = jnp.array(cfg.betas)
    together = jax.jit(jax.vmap(partial(train, jax.random.key(2))))
    alone = jax.jit(partial(train, jax.random.key(2)))

    def seconds(run: Callable[[], Any]) -> float:
        jax.block_until_ready(run())
        began = time.perf_counter()
        jax.block_until_ready(run())
        return (time.perf_counter() - began) / cfg.ppo.steps / len(betas)

    return {
        "vmap_seconds": seconds(lambda: together(betas)[1]),
        "loop_seconds": seconds(lambda: [alone(beta)[1] for beta in betas]),
    }


def main(cfg: Config) -> dict[str, float]:
    """Runs all seeds; returns the claims' numbers, means over seeds unless they say otherwise."""
    at_least(cfg, seed=0, seeds=1, jobs=1)
    if cfg.vmap:
        metrics = measure_vmap(cfg)
        print(metrics)
        return metrics
    with Run(cfg.run_dir, cfg, name="kl_coefficient", resume=cfg.resume) as run:
        seeds = range(cfg.seed, cfg.seed + cfg.seeds)
        work = partial(one_seed, cfg=cfg, folder=run.dir)
        with ProcessPoolExecutor(cfg.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            results = list(pool.map(work, seeds))
        claims = table(cfg, results)
        (run.dir / "table.json").write_text(json.dumps(claims, indent=1), encoding="utf-8")
        (run.dir / "table.md").write_text(markdown(claims), encoding="utf-8")
        draw(cfg, results, run.dir / "kl_coefficient.svg")
        rows = claims["seeds"]
        metrics = {name: float(np.mean([row[name] for row in rows])) for name in rows[0] if name != "seed"}
        metrics |= {f"beta_{row['beta']:g}_{k}": v for row in claims["betas"] for k, v in row.items() if k != "beta"}
        run.summary(metrics)
        run.say(f"figure: {run.dir / 'kl_coefficient.svg'}")
    return metrics


if __name__ == "__main__":
    run_main(main, Config)
