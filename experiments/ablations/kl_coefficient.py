"""The effect of β in PPO: without the KL term PPO hacks the reward model; with a very large β it learns nothing.

Gao et al. 2023 (https://arxiv.org/abs/2210.10760), in the controlled world, where the true utility is known. Each
seed has a world, an SFT policy and a reward model of its own; PPO runs at each β. `train(key, beta)` is a pure
function, one lax.scan over all iterations.
    python experiments/ablations/kl_coefficient.py
It takes about an hour on 2 CPU cores for 5 seeds. It writes two tables and a figure: proxy and true utility against
√KL, with Gao's fit d(α − β log d) to the mean curve at the smallest β. Expect the true utility at β = 0 to peak and
then fall while the proxy climbs. At a large β the policy stays at SFT.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from experiments import ppo
from experiments.ablations.claims import Claim, minus, of
from experiments.ablations.grid import GridFlags, run_grid, unused
from experiments.ablations.grid_results import (
    Cells,
    Column,
    Line,
    Page,
    Panel,
    curve_line,
    fit_gain,
    gao_line,
    seeds_table,
    smooth,
    variants_table,
)
from experiments.ablations.worlds import AfterRewardModel, after_reward_model
from experiments.ppo import PPO
from experiments.reward_model import RewardModel
from experiments.sft import SFT
from rlhf_jax.actor_critic import State
from rlhf_jax.batches import Completions, Prompts
from rlhf_jax.cli import run_main
from rlhf_jax.data.tokens import take
from rlhf_jax.log import Run
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.rewards.model import model_reward
from rlhf_jax.rewards.reward import Reward
from rlhf_jax.tasks.measure import compare_policies
from rlhf_jax.tasks.task import Task
from rlhf_jax.types import Metrics, Params

SEED_COLUMNS = (
    Column("demonstrators", "demonstrators_utility", 3), Column("SFT", "sft_utility", 3),
    Column("± s.e.", "sft_utility_se", 3), Column("two annotators agree", "reward_model_annotator_agreement", 3),
    Column("reward model agrees", "reward_model_val_accuracy", 3), Column("ceiling", "reward_model_ceiling", 3),
    Column("share of it", "reward_model_share_of_ceiling", 3),
    Column("the same above chance", "reward_model_share_above_chance", 3),
    Column("pick the longer", "reward_model_length_baseline", 3), Column("least β: peak", "peak", 3),
    Column("least β: end", "end", 3), Column("σ of SFT answers", "sft_utility_std", 3),
    Column("Gao α", "gao_alpha", 3), Column("Gao β", "gao_beta", 3), Column("R²", "gao_r2", 3),
)  # fmt: skip
COLUMNS = (
    Column("KL at the end, nats", "kl", 1, extremes=True), Column("true utility", "ppo_utility"),
    Column("proxy", "ppo_score"), Column("beats SFT", "win_rate", 3, extremes=True),
    Column("the same, shifted prompts", "shifted_win_rate", 3, extremes=True), Column("length", "ppo_length", 1),
)  # fmt: skip
ON_THE_WAY = 2.0
"""√nats."""


@dataclass(frozen=True)
class Config(GridFlags):
    """PPO at several β, several seeds."""

    betas: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.5, 2.0, 10.0)
    sft: SFT = field(default_factory=SFT)
    reward_model: RewardModel = field(default_factory=RewardModel)
    ppo: PPO = field(default_factory=lambda: PPO(steps=120))
    """PPO runs twice the pipeline's iterations, so that over-optimisation shows."""

    def __post_init__(self) -> None:
        """Raises UserError for a target of KL: β is what differs here."""
        unused(self.ppo, "ppo", "target_kl", "beta")
        super().__post_init__()


class Variant(NamedTuple):
    """A weight of the KL term."""

    beta: float


def make_train(
    cfg: PPO, base: Pretrained, prompts: Prompts, reward: Reward, critic: Params, *, max_new_tokens: int
) -> Callable[..., Any]:
    """train(key, beta) -> (policy, metrics, prompts and completions of every iteration); pure, so it may be vmapped.

    The critic starts from the parameters of a reward model of the policy's shape.
    """
    cfg, prompts = replace(ppo.with_defaults(cfg, base), target_kl=None), jax.tree.map(jnp.asarray, prompts)
    setup, begin, frozen = ppo.prepare(
        cfg, base, [reward], jax.random.key(0), max_new_tokens=max_new_tokens, critic=(base.config, critic),
    )  # fmt: skip

    def train(key: PRNGKeyArray, beta: Float[Array, ""]) -> Any:
        def step(state: State, key: PRNGKeyArray) -> tuple[State, Any]:
            asked = take(prompts, ppo.draw(cfg, len(prompts.row), key))
            state, metrics, answers = ppo.iterate(cfg, setup, state, frozen, asked, key)
            return state, (metrics, asked, answers)

        state = begin._replace(beta=jnp.asarray(beta, jnp.float32))
        state, seen = jax.lax.scan(step, state, jax.random.split(key, cfg.steps or 0))
        return frozen.over_trunk(state.policy.params), *seen

    return train


def prepare(cfg: Config, seed: int, run: Run) -> tuple[AfterRewardModel, Callable[..., Any]]:
    """A world, SFT, a reward model, and PPO compiled once for all β."""
    begun = after_reward_model(cfg, seed, run)
    reward = model_reward(begun.base.config, begun.rewards, name="reward_model", weight=1.0)
    train = make_train(
        cfg.ppo,
        begun.base,
        begun.task.prompts().train,
        reward,
        begun.rewards,
        max_new_tokens=begun.task.max_new_tokens,
    )
    return begun, jax.jit(train)


def one(cfg: Config, prepared: Any, seed: int, variant: Variant, run: Run) -> dict[str, Any]:
    """PPO at one β: where it ends beside SFT, and its curves against the distance from SFT."""
    begun, train = prepared
    policy, *seen = jax.tree.map(np.asarray, train(jax.random.key(seed + 2), jnp.float32(variant.beta)))
    found = begun.facts | compare_policies(
        run, begun.task, ("sft", begun.base.params), ("ppo", policy), begun.sampler, begun.scorer
    )
    metrics, kl, utility = seen[0], *curves_of(begun.task, *seen)
    fit = fit_gain(kl, utility - found["sft_utility"])
    return found | curved(metrics, kl, utility) | {"gao_alpha": fit.alpha, "gao_beta": fit.beta, "gao_r2": fit.r2}


def curves_of(task: Task, metrics: Metrics, asked: Prompts, answers: Completions) -> tuple[np.ndarray, np.ndarray]:
    """KL to SFT and true utility of every iteration, from all that `train` returns beside the policy."""
    assert task.judge is not None
    each = [jax.tree.map(lambda x, i=i: x[i], (asked, answers)) for i in range(len(asked.row))]
    return np.maximum(metrics["kl_k1"], 0), np.array([task.judge(*some).mean() for some in each])


def curved(metrics: Metrics, kl: np.ndarray, utility: np.ndarray) -> dict[str, Any]:
    """Where PPO ends, true utility on its way there at 4 nats, and its curves against the distance from SFT."""
    curves = {
        "distance": smooth(np.sqrt(kl)),
        "score": smooth(np.asarray(metrics["score"])),
        "utility": smooth(utility),
    }
    ends = {"peak": curves["utility"].max(), "end": curves["utility"][-1], "kl": metrics["kl_k1"][-5:].mean()}
    reached = np.flatnonzero(curves["distance"] >= ON_THE_WAY)
    return curves | ends | {"utility_at_4": curves["utility"][reached[0]] if len(reached) else np.nan}


FREE, HELD = {"beta": 0.0}, {"beta": 0.1}
CLAIMS = (
    Claim("imitation caps at its demonstrators", "Stiennon et al. 2020, fig. 1", "supervised summaries lose to the"
          " references, those from preferences win",
          minus(of("sft_utility", **HELD), of("demonstrators_utility", **HELD)), "true utility of SFT above theirs",
          below=0.0),
    Claim("PPO with a KL term passes them", "Stiennon et al. 2020, fig. 1", "people prefer it to reference summaries",
          minus(of("ppo_utility", **HELD), of("demonstrators_utility", **HELD)), "true utility above theirs",
          above=0.0),
    Claim("a reward model nears what annotators' noise allows", "Ouyang et al. 2022, §3.4 and §4.1", "72.4% of"
          " its own labelers' preferences, who agree on 72.6%", of("reward_model_share_above_chance", **HELD),
          "of what can be had above chance", above=0.8,
          digits=3),
    Claim("without the KL term true utility turns down", "Gao et al. 2023, fig. 1", "peaks and falls",
          minus(of("peak", **FREE), of("end", **FREE)), "of true utility from its peak", above=0.2),
    Claim("while the proxy is higher than ever", "Gao et al. 2023, fig. 1", "rises on",
          minus(of("ppo_score", **FREE), of("ppo_score", **HELD)), "of proxy above that at β = 0.1", above=0.0),
    Claim("its gain is d(α − β log d)", "Gao et al. 2023, §1", "fits well, save near the origin", of("gao_r2",
          **FREE), "R²",
          above=0.8),
    Claim("the KL term leaves the way as it was", "Gao et al. 2023, fig. 9", "it acts like stopping early",
          minus(of("utility_at_4", **HELD), of("utility_at_4", **FREE)), "of true utility at 4 nats, β = 0.1 above 0",
          above=-0.2, below=0.2),
    Claim("good runs end 5 to 15 nats away", "Gao et al. 2023, fig. 1", "PPO peaks at about 13 nats by the smallest"
          " reward model, later by larger ones", of("kl", **HELD), "nats at β = 0.1", above=5.0, below=15.0, digits=1),
    Claim("a large β keeps the policy where it was", "Stiennon et al. 2020, fig. 5",
          "preference against KL, at several"
          " strengths",
          of("kl", beta=10.0), "nats at β = 10", below=0.5),
)  # fmt: skip


def present(cfg: Config, cells: Cells) -> Page:
    """A row a seed, a row a β; proxy and true utility against √KL."""
    found = sorted(cells.finished())
    proxy, truth = (
        [curve_line(cells, variant, "distance", y, f"β = {variant.beta:g}") for variant in found]
        for y in ("score", "utility")
    )
    start, teachers = (cells.numbers(found[0], name).mean() for name in ("sft_utility", "demonstrators_utility"))
    ends = np.array([0, max(line.x.max() for line in truth)])
    truth.append(gao_line(truth[0], start))
    truth.append(Line("demonstrators", ends, np.full(2, teachers), style="--", color="0.5"))
    xlabel = "√KL(π‖SFT), √nats"
    panels = [Panel("Proxy", xlabel, "reward model's score", proxy), Panel("Truth", xlabel, "true utility", truth)]
    return Page([seeds_table(cells, found[0], SEED_COLUMNS), variants_table(cells, ["β"], COLUMNS)], panels)


def main(cfg: Config) -> dict[str, float]:
    """Makes the grid; returns each β's means over seeds."""
    variants = [Variant(beta) for beta in cfg.betas]
    return run_grid(cfg, "kl_coefficient", variants, one, present, prepare=prepare, axes=("betas",))


if __name__ == "__main__":
    run_main(main, Config)
