"""PPO on answers of the policy that was there k iterations before, with and without importance weights.

Noukhovitch et al. 2024 (https://arxiv.org/abs/2410.18252) find that PPO gets worse the older its answers are, and that
one step costs next to nothing. Fu et al. 2025 (AReaL, https://arxiv.org/abs/2505.24298) keep the performance up to a
staleness of 4 to 8 by a decoupled objective. Espeholt et al. 2018 (https://arxiv.org/abs/1802.01561) truncate weights.
With μ for the policy that sampled, π_old for the one before the update and ρ(a, b) for a/b, a token's term is
    none         the clip of ρ(π, π_old) · Â: old answers are taken for the policy's own
    importance   the clip of ρ(π, μ) · Â: it weighs, and it clips around μ
    decoupled    ρ(π_old, μ) · the clip of ρ(π, π_old) · Â (AReaL, eq. 5)
Advantages and the KL in the reward are the same in all three: the KL is that of π_old, whose reward it is part of, and
the critic is the present one, without a correction for answers that π_old would not give (no V-trace). An iteration is
eight steps of the optimiser. Until there are k policies SFT samples.
    python experiments/ablations/staleness.py
Expect about 15 minutes on 2 CPU cores for 5 seeds.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from experiments import ppo
from experiments.ablations.claims import Claim, minus, of
from experiments.ablations.grid import GridFlags, run_grid, unused
from experiments.ablations.grid_results import Cells, Column, Page, Panel, curve_line, smooth, variants_table
from experiments.ablations.kl_coefficient import curves_of
from experiments.ablations.online import ahead, at_distance
from experiments.ablations.worlds import AfterRewardModel, after_reward_model
from experiments.ppo import PPO
from experiments.reward_model import RewardModel
from experiments.sft import SFT
from rlhf_jax.batches import Completions, Experience
from rlhf_jax.cli import run_main
from rlhf_jax.data.tokens import join, take
from rlhf_jax.diagnostics import sampler_gap
from rlhf_jax.errors import UserError
from rlhf_jax.kl import kl_k1
from rlhf_jax.log import Run
from rlhf_jax.masking import masked_sum
from rlhf_jax.rewards.model import model_reward
from rlhf_jax.tasks.measure import compare_policies, make_policy_measure
from rlhf_jax.types import Metrics

Weights = Literal["none", "importance", "decoupled"]
WEIGHTS: tuple[Weights, ...] = ("none", "importance", "decoupled")
MOST = 5.0
"""A larger weight ρ(π_old, μ) counts as this. AReaL's code leaves such tokens out."""
COLUMNS = (
    Column("true utility", "policy_utility"), Column("beats SFT", "win_rate", 3), Column("proxy", "policy_score"),
    Column("KL, nats", "kl", 1), Column("at the most", "most_kl", 1), Column("true utility at 4 nats", "utility_at_4"),
    Column("proxy − β · KL", "objective"),
    Column("from the sampler, nats a token", "gap", 3), Column("ratios clipped", "clip_fraction", 3),
)  # fmt: skip


@dataclass(frozen=True)
class Config(GridFlags):
    """PPO at several ages of its answers, several seeds."""

    ages: tuple[int, ...] = (0, 1, 4, 16)
    """Iterations between the policy that samples and the one that learns."""
    weights: tuple[Weights, ...] = WEIGHTS
    sft: SFT = field(default_factory=SFT)
    reward_model: RewardModel = field(default_factory=RewardModel)
    ppo: PPO = field(default_factory=PPO)

    def __post_init__(self) -> None:
        """Raises UserError for an age below 0, without any, and for a target of KL."""
        unused(self.ppo, "ppo", "target_kl")
        if not self.ages or min(self.ages) < 0:
            raise UserError(f"--ages are {self.ages}; there must be some, and none below 0")
        super().__post_init__()


class Variant(NamedTuple):
    """The age of the answers, in iterations, and their weights."""

    k: int
    weights: Weights


def variants(cfg: Config) -> list[Variant]:
    """All ages with all weights; fresh answers have no weights but 1."""
    return [Variant(k, weights) for k in cfg.ages for weights in (cfg.weights if k else ("none",))]


def kept_policies(params: Any, number: int) -> Any:
    """The ring of so many policies, [number, …], that all are this one."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (number, *x.shape)), params)


def put(ring: Any, params: Any, step: Int[Array, ""]) -> Any:
    """The ring with the policy of this step in the place of the oldest one."""
    return jax.tree.map(lambda all, x: all.at[step % len(all)].set(x), ring, params)


def before(ring: Any, step: Int[Array, ""], k: Int[Array, ""]) -> Any:
    """The policy of k steps before this one, k being less than the ring's length; the first one until there is one."""
    return jax.tree.map(lambda all: all[(step - k) % len(all)], ring)


def weighted(experience: Experience, answers: Completions, weights: Int[Array, ""]) -> tuple[Experience, Metrics]:
    """The experience as one of `WEIGHTS`, by its place, has it; KL of the answers' sampler to the reference.

    `experience` has the log-probabilities of the policy before the update.
    """
    mask, current = experience.tokens.mask, experience.old_logprobs
    start, columns = mask.shape[1] - answers.tokens.shape[1] - 1, answers.tokens.shape[1]
    sampled = current.at[:, start : start + columns].set(answers.logprobs)
    rho = jnp.exp(jnp.minimum(jnp.where(mask, current - sampled, 0.0), jnp.log(MOST)))
    kl = masked_sum(kl_k1(sampled, experience.ref_logprobs), mask, axis=1).mean()
    found = experience._replace(
        old_logprobs=jnp.where(weights == WEIGHTS.index("importance"), sampled, current),
        advantages=experience.advantages * jnp.where(weights == WEIGHTS.index("decoupled"), rho, 1.0),
    )
    return found, {"kl_k1": kl, **sampler_gap(answers, current[:, start : start + columns])}


def make_train(cfg: PPO, begun: AfterRewardModel, oldest: int) -> Callable[..., Any]:
    """train(key, k, weights) -> (policy, metrics, prompts and completions of every iteration); pure.

    `k` is at most `oldest`; `weights` is a place in `WEIGHTS`. Of the metrics "kl_k1" is the sampler's.
    """
    base = begun.base
    cfg = replace(ppo.with_defaults(cfg, base), target_kl=None)
    prompts = jax.tree.map(jnp.asarray, begun.task.prompts().train)
    reward = model_reward(base.config, begun.rewards, name="reward_model", weight=1.0)
    setup, begin, frozen = ppo.prepare(
        cfg, base, [reward], jax.random.key(0), max_new_tokens=begun.task.max_new_tokens,
        critic=(base.config, begun.rewards),
    )  # fmt: skip

    def train(key: PRNGKeyArray, k: Int[Array, ""], weights: Int[Array, ""]) -> Any:
        def step(carry: Any, xs: Any) -> tuple[Any, Any]:
            (state, ring), (number, key) = carry, xs
            _, sample_key, update_key = ppo.keys_of(key)
            ring = put(ring, state.policy.params, number)
            sampler = state._replace(policy=state.policy.replace(params=before(ring, number, k)))
            asked = take(prompts, ppo.draw(cfg, len(prompts.row), key))
            answers = ppo.rollout(cfg, setup, sampler, frozen, asked, sample_key)
            tokens = join(asked, answers, pad_id=setup.pad_id)
            scores, metrics = ppo.score(cfg, setup, frozen, tokens, answers, {})
            experience, shaped = ppo.shape(cfg, setup, state, frozen, tokens, scores)
            experience, sampled = weighted(experience, answers, weights)
            state, updated = ppo.update(cfg, setup, state, frozen, experience, update_key)
            return (state, ring), (metrics | shaped | sampled | updated, asked, answers)

        carry = begin, kept_policies(begin.policy.params, oldest + 1)
        steps = jnp.arange(cfg.steps or 0), jax.random.split(key, cfg.steps or 0)
        (state, _), seen = jax.lax.scan(step, carry, steps)
        return frozen.over_trunk(state.policy.params), *seen

    return train


def prepare(cfg: Config, seed: int, run: Run) -> tuple[AfterRewardModel, Callable[..., Any]]:
    """A world, SFT, a reward model, and PPO compiled once for all ages and weights."""
    begun = after_reward_model(cfg, seed, run)
    return begun, jax.jit(make_train(cfg.ppo, begun, max(cfg.ages)))


def one(cfg: Config, prepared: Any, seed: int, variant: Variant, run: Run) -> dict[str, Any]:
    """PPO at one age: where it ends beside SFT, and its curves, which are those of the policies that sampled."""
    (begun, train), place = prepared, WEIGHTS.index(variant.weights)
    task, sft = begun.task, begun.base.params
    given = jax.random.key(seed + 2), jnp.int32(variant.k), jnp.int32(place)
    policy, metrics, *seen = jax.tree.map(np.asarray, train(*given))
    ends = compare_policies(run, task, ("sft", sft), ("policy", policy), begun.sampler, begun.scorer)
    kl = make_policy_measure(task, begun.sampler, task.eval_batch_size)(policy, sft, 300)["kl_k1"]
    nats, utility = map(smooth, curves_of(task, metrics, *seen))
    reached = {"utility_at_4": at_distance(nats, utility, 4.0)} if nats.max() >= 4.0 else {}
    return begun.facts | ends | reached | {
        "kl": kl, "most_kl": nats.max(), "objective": ends["policy_score"] - cfg.ppo.beta * kl,
        "gap": metrics["sampler_gap"].mean(), "clip_fraction": metrics["clip_fraction"].mean(),
        "nats": nats, "utility": utility,
    }  # fmt: skip


def ends_above(first: Variant, other: Variant) -> Any:
    """True utility of a variant above another's."""
    return minus(*(of("policy_utility", **variant._asdict()) for variant in (first, other)))


FRESH, OLD = Variant(0, "none"), Variant(16, "none")
CURVES = ("nats", "utility")
"""Curves of the cells that claims are decided by."""
CLAIMS = (
    Claim("PPO gets worse with old answers", "Noukhovitch et al. 2024, fig. 3", "the win rate falls with staleness",
          ends_above(FRESH, OLD), "true utility, fresh above 16 iterations old without weights", above=0.0),
    Claim("PPO of old answers pays more KL for as much utility", "against Noukhovitch et al. 2024,"
          " fig. 3", "all on one curve of win rate against KL", ahead(
          FRESH._asdict(), OLD._asdict()), "true utility at the largest KL that both reach, the same two", above=0.0),
    Claim("answers one iteration old cost next to nothing", "Noukhovitch et al. 2024, fig. 1", "asynchronous RLHF"
          " matches the win rate of its synchronous run", ends_above(Variant(1, "none"), FRESH),
          "true utility, one iteration old"
          " above fresh", above=-0.1),
    Claim("truncated importance weights make up for some of the age", "Espeholt et al. 2018, table 2", "they beat no"
          " correction", ends_above(Variant(16, "decoupled"), OLD), "true utility, 16 iterations old, with above"
          " without", above=0.0),
    Claim("the decoupled objective loses nothing at an age of 4", "Fu et al. 2025, table 2", "AIME24 of 42.0"
          " fresh, 42.2 at 4 versions, 41.0 at 8",
          ends_above(Variant(4, "decoupled"), FRESH), "true utility, 4 iterations old above fresh", above=-0.1),
    Claim("the decoupled objective beats a clip around the sampler", "Fu et al. 2025, fig. 5", "PPO of old"
          " answers falls behind, the decoupled one does not", ends_above(Variant(16, "decoupled"),
          Variant(16, "importance")), "true utility, 16 iterations old", above=0.0),
)  # fmt: skip


def present(cfg: Config, cells: Cells) -> Page:
    """A row a variant; true utility of the sampling policies by iteration, and against their KL to SFT."""
    found = cells.finished()
    by_step, by_kl = (
        [curve_line(cells, variant, x, "utility", f"{variant.k} old, {variant.weights}") for variant in found]
        for x in (None, "nats")
    )
    panels = [
        Panel("By iteration", "iteration", "true utility", by_step),
        Panel("By distance", "KL to SFT, nats", "true utility", by_kl),
    ]
    return Page([variants_table(cells, ["iterations old", "weights"], COLUMNS)], panels)


def main(cfg: Config) -> dict[str, float]:
    """Makes the grid; returns each variant's means over seeds."""
    return run_grid(cfg, "staleness", variants(cfg), one, present, prepare=prepare, axes=("ages", "weights"))


if __name__ == "__main__":
    run_main(main, Config)
