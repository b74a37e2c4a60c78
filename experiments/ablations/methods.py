"""Every method of this project in one world: what each gains, at which distance from SFT, and what would be possible.

Each seed has a world, SFT, comparisons of SFT's answers and a reward model; every method starts from that SFT. The
frontier is the exact optimum of the reward model's score minus β·KL, from one pool of SFT's answers by reweighting
(`rlhf_jax.frontier`); it ends where fewer than 10 of the 512 answers have weight for a tenth of the prompts. Best of n
is told from the same pool, at its bound of the KL, log n − (n − 1)/n. Constitutional AI has no reward model and no
comparisons by people: a simulated judge with the same bias. `ppo_three_rounds` and `iterated_dpo` have their labels
in three rounds, of the last policy's answers (`experiments/iterate.py`). Samples are answers that a method asks for,
without the comparisons that all share. Memory is told on Linux alone: what a process holds at the most, less what it
held before, compiled programs of earlier methods among it.
    python experiments/ablations/methods.py
It takes about two hours on 2 CPU cores for 5 seeds. It writes a table and a figure: proxy and true utility against KL.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from experiments import (
    cispo,
    constitutional,
    dapo,
    dr_grpo,
    grpo,
    gspo,
    iterate,
    ppo,
    rejection_sampling,
    reward_model,
    rloo,
)
from experiments.ablations import preference_losses
from experiments.ablations.grid import GridFlags, only_words, run_grid
from experiments.ablations.grid_results import (
    Cells,
    Column,
    Page,
    Panel,
    curve_line,
    points_line,
    variants_table,
)
from experiments.ablations.memory import peak_since, start_peak
from experiments.ablations.worlds import AfterSFT, after_sft
from experiments.ppo import PPO
from experiments.reward_model import RewardModel
from experiments.sft import SFT
from experiments.stages import train_preference, train_without_critic
from rlhf_jax.best_of_n import Pool, best_of_n_metrics, powers_up_to, sample_pools
from rlhf_jax.cli import run_main
from rlhf_jax.data.pairs import paired, singly
from rlhf_jax.data.tokens import take
from rlhf_jax.ensemble import ensemble_reward
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate import best_of_n_kl, win_rate
from rlhf_jax.frontier import frontier
from rlhf_jax.log import Run
from rlhf_jax.metrics import read_metrics
from rlhf_jax.rewards.model import model_reward
from rlhf_jax.rewards.reward import Reward
from rlhf_jax.row_file import read_rows
from rlhf_jax.simulation import Annotators, Revisers
from rlhf_jax.tasks.measure import AnswerScorer, compare_policies, make_policy_measure, make_reward_scorer
from rlhf_jax.tasks.simulated import World
from rlhf_jax.types import Params

BETAS = tuple(float(beta) for beta in np.geomspace(0.2, 20.0, 25))
LEAST = 10.0
"""Answers with weight below which the frontier is cut off."""
ROUNDS = 3
"""Rounds of labels of ppo_three_rounds and iterated_dpo, which share the world's prompts."""
COLUMNS = (
    Column("true utility", "policy_utility"), Column("beats SFT", "win_rate", 3),
    Column("on shifted prompts", "shifted_win_rate", 3), Column("proxy", "policy_score"),
    Column("KL to SFT, nats", "kl"), Column("length", "policy_length", 1), Column("samples, thousands", "samples", 1),
    Column("ranked answers, thousands", "labels", 0), Column("seconds", "seconds", 0),
    Column("memory, GB", "memory_gb", 1),
)  # fmt: skip


@dataclass(frozen=True)
class Config(GridFlags):
    """Every method from one SFT policy, several seeds."""

    methods: tuple[str, ...] = (
        "sft", "best_of_16", "rejection_sampling", "dpo", "ipo", "simpo", "orpo", "kto", "grpo", "dr_grpo", "rloo",
        "dapo", "gspo", "cispo", "ppo", "ppo_ensemble", "ppo_three_rounds", "iterated_dpo", "constitutional",
    )  # fmt: skip
    pool: int = 512
    """Answers to each prompt of the pool."""
    pool_prompts: int = 96
    members: int = 4
    """Reward models of ppo_ensemble, whose least score is the reward."""
    sft: SFT = field(default_factory=SFT)
    reward_model: RewardModel = field(default_factory=RewardModel)
    ppo: PPO = field(default_factory=PPO)
    steps: int = 60
    """Iterations of GRPO and the others without a critic."""

    def __post_init__(self) -> None:
        """Raises UserError for a method that is none, and for a pool of fewer than 17 answers."""
        super().__post_init__()
        if unknown := sorted(set(self.methods) - set(METHODS)):
            raise UserError(f"there is no method {unknown[0]}; there are {', '.join(METHODS)}")
        if self.pool < 17:
            raise UserError(f"pool is {self.pool}; best_of_16 needs 16 answers and another one")


class Variant(NamedTuple):
    """A method."""

    method: str


class Begun(NamedTuple):
    """A seed's world, SFT and comparisons, and the reward model from these."""

    after: AfterSFT
    rewards: Params
    reward: Reward
    scorer: AnswerScorer


class Policy(NamedTuple):
    """A method's policy, and its costs: thousands of samples, and of answers that were ranked or judged."""

    params: Params
    samples: float
    labels: float


def prepare(cfg: Config, seed: int, run: Run) -> Begun:
    """A world, SFT, comparisons, and a reward model."""
    after = after_sft(cfg, seed, run)
    task, base = after.task, after.base
    rewards, _ = train_member(cfg, after, run, seed, "reward_model")
    reward = model_reward(base.config, rewards, name="reward_model", weight=1.0)
    return Begun(after, rewards, reward, make_reward_scorer(task, [reward], cfg.ppo.no_end_score))


def train_member(cfg: Config, after: AfterSFT, run: Run, seed: int, stage: str) -> tuple[Params, dict[str, float]]:
    """A reward model from the seed's comparisons."""
    task = after.task
    return reward_model.train(
        cfg.reward_model, after.base, after.comparisons, run, seed, eval_batch_size=task.eval_batch_size,
        zero=task.demonstrations().validation, stage=stage,
    )  # fmt: skip


def ranked(begun: Begun) -> float:
    """Thousands of answers that were ranked."""
    return sum(len(one.ranks) for one in begun.after.comparisons.train) / 1000


# The methods, each from the same SFT policy.


def no_training(cfg: Config, begun: Begun, seed: int, run: Run) -> Policy:
    """SFT as it is."""
    return Policy(begun.after.base.params, 0.0, 0.0)


def by_preference(name: str, cfg: Config, begun: Begun, seed: int, run: Run) -> Policy:
    """A preference loss on the comparisons."""
    module, flags_of = preference_losses.METHODS[name]
    flags, after = flags_of(), begun.after
    examples, single = paired(after.comparisons.train, flags.pairs), name == "kto"
    trained = train_preference(
        flags, partial(module.loss, flags), partial(module.reward, flags), after.base,
        singly(examples) if single else examples, after.comparisons, run, seed, stage=name,
        eval_batch_size=after.task.eval_batch_size, mismatched=single,
    )  # fmt: skip
    return Policy(trained.params, 0.0, ranked(begun))


def by_groups(module: Any, flags_of: Any, cfg: Config, begun: Begun, seed: int, run: Run) -> Policy:
    """An algorithm without a critic, against the reward model."""
    flags, task = flags_of(steps=cfg.steps), begun.after.task
    algorithm = module.algorithm(flags, flags.numbers(task.max_new_tokens))
    policy, _ = train_without_critic(
        flags, algorithm, task, begun.after.base, [begun.reward], run, seed, stage=module.__name__
    )
    return Policy(policy, cfg.steps * flags.groups * flags.group_size / 1000, ranked(begun))


def by_ppo(cfg: Config, begun: Begun, seed: int, run: Run, reward: Reward | None = None) -> Policy:
    """PPO against the reward model, or another reward."""
    task, base = begun.after.task, begun.after.base
    policy, _ = ppo.train(
        cfg.ppo, base, task.prompts(), [reward or begun.reward], run, seed, max_new_tokens=task.max_new_tokens,
        critic=(base.config, begun.rewards), judge=task.judge,
    )  # fmt: skip
    return Policy(policy, ppo_samples(cfg, run, "ppo"), ranked(begun))


def ppo_samples(cfg: Config, run: Run, stage: str) -> float:
    """Thousands of answers that a stage of PPO has sampled."""
    return len(read_metrics(run.dir)[stage]) * (cfg.ppo.responses or 128) / 1000


def by_ppo_with_ensemble(cfg: Config, begun: Begun, seed: int, run: Run) -> Policy:
    """PPO against the least score of several reward models."""
    others = [
        train_member(cfg, begun.after, run, reward_model.member_seed(seed, number), f"reward_model_{number + 1}")[0]
        for number in range(1, cfg.members)
    ]
    members = [begun.rewards, *others]
    config = begun.after.base.config
    reward = ensemble_reward(config, members, combine="min", lam=0.0, name="ensemble", weight=1.0)
    return by_ppo(cfg, begun, seed, run, reward)


def by_rounds(learner: Literal["ppo", "dpo"], cfg: Config, begun: Begun, seed: int, run: Run) -> Policy:
    """PPO or DPO in rounds, each on labels of the last policy's answers, too."""
    task, base, sampler = begun.after.task, begun.after.base, begun.after.sampler
    assert isinstance(task, World)
    flags = iterate.Config(
        seed=seed, rounds=ROUNDS, labels=len(task.prompts().train.row) // ROUNDS, answers=8, learner=learner,
        reward_model=cfg.reward_model, ppo=cfg.ppo,
    )  # fmt: skip
    label = iterate.world_labels(task, partial(sampler, base.params))
    *_, (_, policy, _, _) = iterate.run_rounds(flags, task, run, sampler, label, seed)
    files = sorted(run.dir.glob("round-*/comparisons.jsonl"))
    labels = sum(len(row["responses"]) for file in files for row in read_rows(file)) / 1000
    learned = (ppo_samples(cfg, run, f"ppo-{number + 1}") for number in range(ROUNDS)) if learner == "ppo" else ()
    return Policy(policy, labels + sum(learned), labels)


def by_rejection(cfg: Config, begun: Begun, seed: int, run: Run) -> Policy:
    """SFT on the best of 16 answers to each prompt."""
    task, base = begun.after.task, begun.after.base
    flags = rejection_sampling.Config(seed=seed, control=False)
    score = make_reward_scorer(task, [begun.reward], flags.no_end_score, training=True)
    found = rejection_sampling.train_round(flags, task, base.params, run, begun.after.sampler, score, 1)
    return Policy(found["best"], flags.n * len(task.prompts().train.row) / 1000, ranked(begun))


def by_constitution(cfg: Config, begun: Begun, seed: int, run: Run) -> Policy:
    """Constitutional AI, by the world's assistants and a judge with the annotators' bias."""
    task, sampler, base = begun.after.task, begun.after.sampler, begun.after.base
    assert isinstance(task, World)
    flags = constitutional.Config(seed=seed)
    assistant = constitutional.world_assistant(task, Annotators(noise=constitutional.NOISE), Revisers())
    data = constitutional.own_data(flags, task, run)
    constitutional.revise_prompts(flags, task, run, sampler, assistant, seed)
    constitutional.write_revisions(run, run.dir / "chains.jsonl")
    revised = base._replace(params=constitutional.learn_revisions(flags, task, data, run))
    constitutional.compare_answers(task, run, sampler, revised.params, assistant, seed)
    trained = constitutional.learn_preferences(flags, task, data, run, sampler, revised)
    asked = len(task.prompts().train.row) / 1000
    return Policy(trained.params, 3 * asked, 2 * asked)


METHODS: dict[str, Callable[[Config, Begun, int, Run], Policy]] = {
    "sft": no_training, "best_of_16": no_training, "rejection_sampling": by_rejection,
    **{name: partial(by_preference, name) for name in preference_losses.METHODS},
    "grpo": partial(by_groups, grpo, grpo.GRPO), "dr_grpo": partial(by_groups, dr_grpo, dr_grpo.DrGRPO),
    "rloo": partial(by_groups, rloo, rloo.RLOO), "dapo": partial(by_groups, dapo, dapo.DAPO),
    "gspo": partial(by_groups, gspo, gspo.GSPO), "cispo": partial(by_groups, cispo, cispo.CISPO), "ppo": by_ppo,
    "ppo_ensemble": by_ppo_with_ensemble, "ppo_three_rounds": partial(by_rounds, "ppo"),
    "iterated_dpo": partial(by_rounds, "dpo"), "constitutional": by_constitution,
}  # fmt: skip


def sample_pool(cfg: Config, begun: Begun) -> Pool:
    """One pool of SFT's answers to held-out prompts."""
    task, sampler, base = begun.after.task, begun.after.sampler, begun.after.base
    assert task.judge is not None
    heldout = task.prompts().heldout
    prompts = take(heldout, np.arange(min(cfg.pool_prompts, len(heldout.row))))
    rows = cfg.pool * len(prompts.row)
    (pool,) = sample_pools(
        lambda asked: sampler(base.params, asked, 0), begun.scorer, prompts, cfg.pool, rows=rows,
        judges={"utility": task.judge},
    )  # fmt: skip
    return pool


def curves(pool: Pool, most: int) -> dict[str, Any]:
    """The optimum, NaN where it is cut off, and best of 1, 2, 4, …: KL, proxy and true utility."""
    found = frontier(pool.scores, BETAS, pool.values["utility"], least=LEAST)
    missing = [np.nan] * (len(BETAS) - len(found))
    best = [best_of_n_metrics(pool, n) for n in powers_up_to(most)]
    return {
        **{f"optimum_{name}": [getattr(one, name) for one in found] + missing for name in ("kl", "score", "value")},
        "best_kl": [one["kl_bound"] for one in best], "best_score": [one["score"] for one in best],
        "best_value": [one["utility"] for one in best],
    }  # fmt: skip


def best_of_16(pool: Pool, begun: Begun) -> dict[str, float]:
    """The row of best of 16: the best of the first 16 answers against another one, by the true utility."""
    utilities = pool.values["utility"]
    means, places = best_of_n_metrics(pool, 16), np.arange(len(pool.scores))
    truths = utilities[places, pool.scores[:, :16].argmax(axis=1)]
    chosen = take(pool.answers, places * pool.scores.shape[1] + pool.scores[:, :16].argmax(axis=1))
    return {
        "policy_utility": means["utility"], "policy_score": means["score"], "kl": float(best_of_n_kl(16)),
        "win_rate": win_rate(truths, utilities[:, 16])[0],
        "policy_length": float(chosen.mask.sum(axis=1).mean()), "samples": 0.0, "labels": ranked(begun),
    }  # fmt: skip


def one(cfg: Config, begun: Begun, seed: int, variant: Variant, run: Run) -> dict[str, Any]:
    """One method: where it ends beside SFT. Of SFT and best of 16, the pool's curves, too."""
    task, sampler, base = begun.after.task, begun.after.sampler, begun.after.base
    if variant.method == "best_of_16":
        pool = sample_pool(cfg, begun)
        return best_of_16(pool, begun) | curves(pool, cfg.pool // 2)
    began, held = time.monotonic(), start_peak()
    policy = METHODS[variant.method](cfg, begun, seed, run)
    costs = {"seconds": time.monotonic() - began, "samples": policy.samples, "labels": policy.labels}
    if held is not None:
        costs["memory_gb"] = peak_since(held) / 1e9
    found: dict[str, Any] = compare_policies(
        run, task, ("sft", base.params), ("policy", policy.params), sampler, begun.scorer
    )
    found["kl"] = make_policy_measure(task, sampler, task.eval_batch_size)(policy.params, base.params, 300)["kl_k1"]
    return found | costs


def present(cfg: Config, cells: Cells) -> Page:
    """A row a method; proxy and true utility against KL, with the optimum and best of n."""
    found = cells.finished()
    panels = []
    for title, metric, curve in (("Proxy", "policy_score", "score"), ("Truth", "policy_utility", "value")):
        lines = []
        for variant in found:
            if variant.method == "best_of_16":
                for name, label in (("optimum", "optimum for the proxy"), ("best", "best of n")):
                    lines.append(curve_line(cells, variant, f"{name}_kl", f"{name}_{curve}", label))
            else:
                point = points_line(cells, [variant], "kl", metric, variant.method)
                lines.append(point._replace(style="os^"[len(lines) // 10]))  # colours come again after ten
        ylabel = "reward model's score" if metric == "policy_score" else "true utility"
        panels.append(Panel(title, "KL to SFT, nats a response", ylabel, lines))
    return Page([variants_table(cells, ["method"], COLUMNS)], panels)


def main(cfg: Config) -> dict[str, float]:
    """Makes the grid; returns each method's means over seeds."""
    only_words(cfg, quick=False)
    variants = [Variant(name) for name in cfg.methods]
    return run_grid(cfg, "methods", variants, one, present, prepare=prepare, axes=("methods",))


if __name__ == "__main__":
    run_main(main, Config)
