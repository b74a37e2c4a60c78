"""PPO against a reward minus β·KL to a reference policy, token by token.

Ouyang et al. 2022, eq. 2 (https://arxiv.org/abs/2203.02155), Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593),
Schulman et al. 2017 (https://arxiv.org/abs/1707.06347). This file has the algorithm in the papers' order: `rollout` →
`score` → `shape` (KL and advantages) → `update` in epochs of minibatches. `iterate` is one iteration of all four.
    python experiments/ppo.py
    python experiments/ppo.py --model FOLDER --reward-model FOLDER --prompts FILE
    python experiments/ppo.py --model FOLDER --reward FILE.py:NAME --prompts FILE
It takes about 4 minutes on 2 CPU cores. In the controlled world it runs SFT and the reward model first. Its answers
then beat SFT's by true utility on 19 of 20 held-out prompts, at a KL of 7 nats. It writes policy/ to the run's folder.

PPO-ptx (`ptx_coef`) mixes demonstrations in, where Ouyang et al. mix pretraining text.
An answer that reaches the length limit without EOS scores `no_end_score`, whatever its reward is. Its tokens are
trained on like any others.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState
from jaxtyping import Array, Float, Int, PRNGKeyArray

from experiments.flags import (
    DemonstrationFlags,
    Flags,
    ModelFlags,
    PromptFlags,
    ReferenceFlags,
    RewardFlags,
    RunFlags,
    SamplingFlags,
)
from experiments.reports import PPO_REPORT
from experiments.stages import (
    open_reference,
    open_rewards,
    open_task,
    or_default,
    policy_sampler,
    pretrained_defaults,
    say_defaults,
)
from experiments.training import Adapters, Training
from rlhf_jax.actor_critic import Frozen, Setup, State, start_actor_critic
from rlhf_jax.advantages import gae
from rlhf_jax.batches import Completions, Experience, Prompts, Tokens
from rlhf_jax.cli import on_mesh, run_main, run_with_report
from rlhf_jax.compiled import count_compilations
from rlhf_jax.data.tokens import SMALLEST_BUCKET, join, narrowed, take, trimmed
from rlhf_jax.diagnostics import explained_variance, sampler_gap
from rlhf_jax.drawn import DrawnPrompts
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.export import export_policy
from rlhf_jax.kl import adaptive_beta, kl_k1, kl_k2, kl_k3, kl_shaped_rewards
from rlhf_jax.log import Run
from rlhf_jax.loop import shard_microbatches
from rlhf_jax.losses import ppo_clip_loss, value_clip_loss
from rlhf_jax.masking import masked_mean, masked_sum, masked_whiten
from rlhf_jax.models import ModelConfig
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.rewards.reward import (
    HostScores,
    Reward,
    host_metrics,
    score_metrics,
    score_texts,
    score_tokens,
    weighted_sum,
    weights_of,
)
from rlhf_jax.rewards.watch import answer_statistics
from rlhf_jax.sampling import ended, generate
from rlhf_jax.scoring import Joined, in_parts, response_logprobs, sft_objective, token_scores, token_values
from rlhf_jax.sharding import check_rows, shard_batch, to_host
from rlhf_jax.tasks.measure import as_texts, compare_policies, make_reward_scorer
from rlhf_jax.tasks.task import Judge, PromptRow, PromptSets
from rlhf_jax.train import keep_freed_memory, make_train_step, ppo_update
from rlhf_jax.types import Metrics, Params


@dataclass(frozen=True)
class PPOFlags(Flags):
    """The flags of PPO alone."""

    steps: int | None = None
    """Iterations of rollout and update. By default 60 in the controlled world, else 100."""
    responses: int | None = None
    """Answers an iteration. By default 128 in the controlled world, else 32."""
    epochs: int = 2
    """Passes over an iteration's answers."""
    minibatches: int = 4
    """Parts of an iteration's answers, one optimiser step each."""
    beta: float = 0.1
    """Weight of the KL to the reference in the reward, per nat; where it starts if adaptive."""
    target_kl: float | None = None
    """Nats a response; when given, β adapts to hold the KL there (Ziegler et al. 2019)."""
    kl_horizon: float = 2000.0
    """Responses over which an adaptive β moves."""
    temperature: float = 1.0
    """The temperature of sampling and of every log-probability."""
    gamma: float = 1.0
    """Discount of rewards, a token."""
    lam: float = 0.95
    """λ of the advantages: 1 trusts returns alone, 0 the critic alone."""
    whiten: bool = True
    """Shift and scale an iteration's advantages to mean 0 and variance 1."""
    clip_eps: float = 0.2
    """How far the ratio of new to old policy may count, from 1."""
    value_clip_eps: float = 0.2
    """How far a value may count, from the old one."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus, a token."""
    ptx_coef: float = 0.0
    """Weight of the SFT loss of demonstrations in the policy's (PPO-ptx). Ouyang et al. mix pretraining text: give
    rows with a column text as demonstrations for that."""
    no_end_score: float = -3.0
    """Score of an answer that does not end."""

    def __post_init__(self) -> None:
        at_least(self, epochs=1, minibatches=1, beta=0, kl_horizon=1, ptx_coef=0)
        at_least(self, gamma=0, lam=0, clip_eps=0, value_clip_eps=0, temperature=1e-3)
        if self.steps is not None:
            at_least(self, steps=1)
        if self.target_kl is not None:
            self.check_target()
        super().__post_init__()

    def check_target(self) -> None:
        """Raises UserError for a target that β cannot hold."""
        if not self.beta > 0:
            raise UserError(f"target-kl needs a beta above 0 to begin with, not {self.beta}: 0 stays 0")
        if self.responses is not None and self.responses > 5 * self.kl_horizon:
            raise UserError(
                f"{self.responses} responses are more than 5 × kl-horizon {self.kl_horizon:g}; β could not be held"
            )


@dataclass(frozen=True)
class PPO(Adapters, Training, PPOFlags):
    """The flags of the stage."""

    @property
    def parts(self) -> int:
        """Microbatches of an iteration's answers: as many as are learned from, or scored, one after the other."""
        return self.minibatches * self.accumulate

    schedule: Literal["cosine", "linear", "constant"] = "constant"
    warmup: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Raises UserError for responses that do not divide into minibatches."""
        super().__post_init__()
        if self.responses is not None:
            at_least(self, responses=self.minibatches)
            if self.responses % self.minibatches:
                raise UserError(f"{self.responses} responses do not divide into {self.minibatches} minibatches")
            self.check_parts(self.responses // self.minibatches, "responses")


@dataclass(frozen=True)
class Config(RunFlags, SamplingFlags, DemonstrationFlags, ReferenceFlags, ModelFlags, PromptFlags, RewardFlags, PPO):
    """PPO from a policy, a reward, and prompts."""

    streams_prompts = True

    def __post_init__(self) -> None:
        """Raises UserError for prompts without a reward."""
        super().__post_init__()
        if self.prompts and not (self.reward_model or self.reward):
            raise UserError("there is no reward: give --reward-model FOLDER, --reward FILE.py:NAME, or both")


def with_defaults(cfg: PPO, base: Pretrained) -> PPO:
    """The flags, with numbers for the model where none are given."""
    if base.name is None:
        return or_default(cfg, steps=60, responses=128, learning_rate=5e-4, lora_rank=0)
    return or_default(cfg, steps=100, responses=32, **pretrained_defaults(cfg, base, slower=10.0))


# 1. Rollout: prompts are drawn, and the policy answers them.


def draw(cfg: PPO, count: int, key: PRNGKeyArray) -> Int[Array, " B"]:
    """The rows of `cfg.responses` prompts, of `count` that there are, for the iteration of that key."""
    assert cfg.responses is not None
    return jax.random.randint(keys_of(key)[0], (cfg.responses,), 0, count)


def rollout(cfg: PPO, setup: Setup, state: State, frozen: Frozen, prompts: Prompts, key: PRNGKeyArray) -> Completions:
    """An answer to each prompt."""
    prompts = shard_batch(prompts)
    return generate(
        setup.policy, frozen.over_trunk(state.policy.params), prompts.tokens, prompts.mask, key,
        max_new_tokens=setup.max_new_tokens, temperature=cfg.temperature, eos_id=setup.eos_id, pad_id=setup.pad_id,
    )  # fmt: skip


# 2. Score: a number for each whole answer.


def score(
    cfg: PPO,
    setup: Setup,
    frozen: Frozen,
    tokens: Tokens,
    completions: Completions,
    host_scores: Mapping[str, Float[Array, " B"]],
) -> tuple[Float[Array, " B"], Metrics]:
    """The weighted sum of all rewards, [B], and `no_end_score` for answers that do not end.

    `host_scores` are those of the rewards that are no models of ours, by name.
    """
    models = {name: frozen.over_trunk(own) for name, own in frozen.rewards.items()}
    each = in_parts(partial(score_tokens, setup.rewards, models), tokens, cfg.parts) | dict(host_scores)
    total = weighted_sum(each, weights_of(setup.rewards))
    whole = ended(completions, setup.eos_id)
    scores = jnp.where(whole, total, cfg.no_end_score)
    share = whole.mean(dtype=jnp.float32)
    return scores, {"score": scores.mean(), "ended": share, "no_end": 1.0 - share, **score_metrics(each)}


# 3. Shape: the KL enters the reward token by token; advantages are estimated from it.


def shape(
    cfg: PPO, setup: Setup, state: State, frozen: Frozen, tokens: Tokens, scores: Float[Array, " B"]
) -> tuple[Experience, Metrics]:
    """Experience [B, T] whose rewards are the scores minus β·KL."""
    mask = tokens.mask
    # Re-scored at training shapes, so that the first ratio is 1.
    policy, reference = frozen.over_trunk(state.policy.params), frozen.over_trunk(frozen.reference)
    known: dict[str, Any] = {"temperature": cfg.temperature, "joined": Joined(mask.shape[1] - setup.max_new_tokens)}

    def scores_of(tokens: Tokens) -> tuple[Array, ...]:
        values = token_values(setup.critic, frozen.critic(state.critic.params), tokens)
        ref_logprobs = response_logprobs(setup.policy, reference, tokens, **known)
        return *token_scores(setup.policy, policy, tokens, **known), ref_logprobs, values

    old_logprobs, entropy, ref_logprobs, values = in_parts(scores_of, tokens, cfg.parts)
    rewards = kl_shaped_rewards(scores, old_logprobs, ref_logprobs, mask, beta=state.beta)
    advantages, returns = gae(rewards, values, mask, gamma=cfg.gamma, lam=cfg.lam)
    if cfg.whiten:
        advantages = masked_whiten(advantages, mask)
    experience = Experience(tokens, old_logprobs, ref_logprobs, values, rewards, advantages, returns)

    def per_response(x: Array) -> Array:
        return masked_sum(x, mask, axis=1).mean()

    return experience, {
        "kl_k1": per_response(kl_k1(old_logprobs, ref_logprobs)),
        "kl_k2": per_response(kl_k2(old_logprobs, ref_logprobs)),
        "kl_k3": per_response(kl_k3(old_logprobs, ref_logprobs)),
        "beta": state.beta,
        "entropy": masked_mean(entropy, mask),
        "length": mask.sum(axis=1).mean(dtype=jnp.float32),
        "explained_variance": explained_variance(values, returns, mask),
    }


# 4. Update: clipped policy and value losses, over epochs of minibatches.


def policy_loss(
    cfg: PPO, setup: Setup, trainable: Params, batch: tuple[Experience, Tokens | None], frozen: Frozen
) -> tuple[Any, Metrics]:
    """The clipped surrogate, minus an entropy bonus, plus the SFT loss of demonstrations (PPO-ptx)."""
    experience, demonstrations = batch
    params, mask = frozen.over_trunk(trainable), experience.tokens.mask
    bonus: Any = 0.0
    numbers: Any = {"temperature": cfg.temperature, "joined": Joined(mask.shape[1] - setup.max_new_tokens)}
    if cfg.entropy_coef:
        logprobs, entropy = token_scores(setup.policy, params, experience.tokens, **numbers)
        bonus = cfg.entropy_coef * masked_mean(entropy, mask)
    else:
        logprobs = response_logprobs(setup.policy, params, experience.tokens, **numbers)
    loss, metrics = ppo_clip_loss(
        logprobs, experience.old_logprobs, experience.advantages, mask, clip_eps=cfg.clip_eps
    )
    loss -= bonus
    if demonstrations is None:
        return loss, metrics
    ptx, _ = sft_objective(setup.policy, params, demonstrations)
    return {"loss": loss, "ptx_loss": cfg.ptx_coef * ptx}, metrics | {"ptx_loss": ptx}


def value_loss(
    cfg: PPO, setup: Setup, trainable: Params, experience: Experience, frozen: Frozen
) -> tuple[Array, Metrics]:
    """The clipped squared error of the critic."""
    values = token_values(setup.critic, frozen.critic(trainable), experience.tokens)
    return value_clip_loss(
        values, experience.old_values, experience.returns, experience.tokens.mask, clip_eps=cfg.value_clip_eps
    )


def update(
    cfg: PPO, setup: Setup, state: State, frozen: Frozen, experience: Experience, key: PRNGKeyArray
) -> tuple[State, Metrics]:
    """The state after `epochs` × `minibatches` steps of policy and critic, and after β has adapted."""
    counts = (policy_counts, critic_counts) if cfg.accumulate > 1 else (None, None)
    policy_step = make_train_step(partial(policy_loss, cfg, setup), counts=counts[0])
    critic_step = make_train_step(partial(value_loss, cfg, setup), counts=counts[1])

    def step(states: tuple[TrainState, TrainState], batch: Any) -> tuple[tuple[TrainState, TrainState], Metrics]:
        batch = shard_microbatches(batch, cfg.accumulate)
        policy, metrics = policy_step(states[0], batch, frozen)
        critic, value_metrics = critic_step(states[1], batch[0], frozen)
        return (policy, critic), metrics | {"value_" + name: value for name, value in value_metrics.items()}

    shuffle_key, ptx_key = jax.random.split(key)
    (policy, critic), metrics = ppo_update(
        step, (state.policy, state.critic), experience, draw_demonstrations(cfg, frozen, ptx_key), shuffle_key,
        epochs=cfg.epochs, minibatches=cfg.minibatches,
    )  # fmt: skip
    beta = state.beta
    if cfg.target_kl is not None:
        assert cfg.responses is not None
        kl = kl_k1(experience.old_logprobs, experience.ref_logprobs)
        observed = masked_sum(kl, experience.tokens.mask, axis=1).mean()
        adapted = adaptive_beta(
            beta, observed, target_kl=cfg.target_kl, horizon=cfg.kl_horizon, batch_size=cfg.responses
        )
        beta = jnp.where(jnp.isfinite(adapted), adapted, beta)
    return State(policy, critic, beta), {
        name: x.sum() if name.endswith("skipped") else x.mean() for name, x in metrics.items()
    }


def draw_demonstrations(cfg: PPO, frozen: Frozen, key: PRNGKeyArray) -> Tokens | None:
    """Demonstrations for every minibatch, as many as it has answers; None without a `ptx_coef`."""
    if not cfg.ptx_coef:
        return None
    assert frozen.demonstrations is not None and cfg.responses is not None
    counts = (cfg.epochs * cfg.minibatches, cfg.responses // cfg.minibatches)
    return take(frozen.demonstrations, jax.random.randint(key, counts, 0, len(frozen.demonstrations.mask)))


def policy_counts(batch: tuple[Experience, Tokens | None]) -> dict[str, Array]:
    """How many tokens the policy's losses are means over."""
    tokens = [part.mask.sum() for part in (batch[0].tokens, batch[1]) if part is not None]
    return dict(zip(("loss", "ptx_loss"), tokens, strict=False))


def critic_counts(experience: Experience) -> dict[str, Array]:
    """How many tokens the critic's loss is a mean over."""
    return {"loss": experience.tokens.mask.sum()}


# One iteration: one program, or cut in two where rewards read text, and where answers may be shorter than they can be.


def keys_of(key: PRNGKeyArray) -> tuple[PRNGKeyArray, PRNGKeyArray, PRNGKeyArray]:
    """An iteration's keys: for its prompts, for sampling, and for the update."""
    rollout_key, update_key = jax.random.split(key)
    return *jax.random.split(rollout_key), update_key


def learn(
    cfg: PPO,
    setup: Setup,
    state: State,
    frozen: Frozen,
    prompts: Prompts,
    completions: Completions,
    host_scores: Mapping[str, Float[Array, " B"]],
    key: PRNGKeyArray,
) -> tuple[State, Metrics]:
    """Everything after the rollout. Answers may be `trimmed`: their columns are counted here."""
    setup = setup._replace(max_new_tokens=completions.tokens.shape[1])
    tokens = join(prompts, completions, pad_id=setup.pad_id)
    scores, metrics = score(cfg, setup, frozen, tokens, completions, host_scores)
    experience, shaped = shape(cfg, setup, state, frozen, tokens, scores)
    state, updated = update(cfg, setup, state, frozen, experience, key)
    start = prompts.tokens.shape[1] - 1
    gap = sampler_gap(completions, experience.old_logprobs[:, start : start + setup.max_new_tokens])
    return state, metrics | shaped | gap | updated


def iterate(
    cfg: PPO, setup: Setup, state: State, frozen: Frozen, prompts: Prompts, key: PRNGKeyArray
) -> tuple[State, Metrics, Completions]:
    """Rollout, score, shape, update; pure."""
    _, sample_key, update_key = keys_of(key)
    completions = rollout(cfg, setup, state, frozen, prompts, sample_key)
    state, metrics = learn(cfg, setup, state, frozen, prompts, completions, {}, update_key)
    return state, metrics, completions


# The stage: what it starts with, its loop, and its command line.


def prepare(
    cfg: PPO,
    base: Pretrained,
    rewards: Sequence[Reward],
    key: PRNGKeyArray,
    *,
    max_new_tokens: int,
    critic: tuple[ModelConfig, Params] | None = None,
    reference: Params | None = None,
    demonstrations: Tokens | None = None,
) -> tuple[Setup, State, Frozen]:
    """The models as training begins; `start_actor_critic` with these flags."""
    assert cfg.steps is not None
    return start_actor_critic(
        base, rewards, key, split=cfg.split_trainable, adapters=bool(cfg.lora_rank),
        optimizer=cfg.make_optimizer(cfg.steps * cfg.epochs * cfg.minibatches), beta=cfg.beta,
        max_new_tokens=max_new_tokens, critic=critic, reference=reference, demonstrations=demonstrations,
    )  # fmt: skip


def make_iteration(
    cfg: PPO, setup: Setup, base: Pretrained, warn: Callable[[str], None]
) -> Callable[..., tuple[State, dict[str, Any], Completions]]:
    """Returns iteration(state, frozen, prompts, key, rows=()): `iterate` compiled, or its two parts.

    Between them answers to the `rows` of the prompts are scored as text, where a reward reads text, and answers lose
    the columns after the longest of them. `warn` is told each host reward's first error.
    """
    if all(reward.traceable for reward in setup.rewards) and setup.max_new_tokens <= SMALLEST_BUCKET:
        iterate_fn = jax.jit(partial(iterate, cfg, setup), donate_argnums=0)
        return lambda state, frozen, prompts, key, rows=(): iterate_fn(state, frozen, prompts, key)
    rollout_fn = jax.jit(partial(rollout, cfg, setup))
    learn_fn = jax.jit(partial(learn, cfg, setup), donate_argnums=0)
    warned: set[str] = set()

    def iteration(
        state: State, frozen: Frozen, prompts: Prompts, key: PRNGKeyArray, rows: Sequence[PromptRow] = ()
    ) -> Any:
        _, sample_key, update_key = keys_of(key)
        completions = to_host(rollout_fn(state, frozen, prompts, sample_key))
        found: dict[str, HostScores] = {}
        if not all(reward.traceable for reward in setup.rewards):
            found = score_texts(setup.rewards, *as_texts(base, rows, prompts, completions))
        for name, some in found.items():
            if some.first_error and name not in warned:
                warn(f"reward {name}: {some.first_error}")
                warned.add(name)
        scores = {name: shard_batch(np.float32(some.scores)) for name, some in found.items()}
        batch = shard_batch((prompts, trimmed(completions)))
        state, metrics = learn_fn(state, frozen, *batch, scores, update_key)
        return state, metrics | host_metrics(found), completions

    return iteration


def train(
    cfg: PPO,
    base: Pretrained,
    prompts: PromptSets,
    rewards: Sequence[Reward],
    run: Run,
    seed: int,
    *,
    max_new_tokens: int,
    critic: tuple[ModelConfig, Params] | None = None,
    reference: Params | None = None,
    demonstrations: Tokens | None = None,
    judge: Judge | None = None,
    watch: Callable[[Params, int], dict[str, Any]] | None = None,
    stage: str = "ppo",
) -> tuple[Params, dict[str, float]]:
    """Trains `base`; returns the policy's parameters, adapters unmerged, and the last iteration's metrics.

    `reference` is what the KL is measured to, by default `base`; `critic` is the reward model that the critic starts
    from. `watch(params, number)` measures the policy on held-out prompts now and then.
    """
    given, cfg = cfg, with_defaults(cfg, base)
    say_defaults(run, stage, given, cfg, base)
    assert cfg.steps is not None and cfg.responses is not None
    keep_freed_memory(base.params)  # one program an iteration has it back whole
    check_rows(cfg.responses, "responses")
    cfg.check_parts(cfg.responses // cfg.minibatches, "responses")
    setup, state, frozen = prepare(
        cfg, base, rewards, jax.random.key(seed + 4), max_new_tokens=max_new_tokens, critic=critic,
        reference=reference, demonstrations=demonstrations,
    )  # fmt: skip
    iteration = make_iteration(cfg, setup, base, run.warn)
    key = jax.random.key(seed + 2)
    updates = cfg.epochs * cfg.minibatches
    loop = cfg.make_loop(
        run, stage, cfg.steps, show=("score", "utility", "kl_k1", "length"), log_every=1, updates=updates
    )
    state = loop.restore(state)
    drawn = DrawnPrompts(
        prompts.train, prompts.rows,
        lambda step, _: np.asarray(draw(cfg, len(prompts.train.row), jax.random.fold_in(key, step))), prompts.stream,
        cfg.responses, seed, loop,
    )  # fmt: skip
    rows = cfg.responses // cfg.minibatches // cfg.accumulate
    shape = rows, prompts.train.tokens.shape[1] + max_new_tokens
    trained = state.policy.params, state.critic.params
    loop.say_memory(
        base.config, trained, (state, frozen), shape, adapters=bool(frozen.trunk),
        sampled=(frozen.over_trunk(state.policy.params), cfg.responses, "--responses"),
    )  # fmt: skip
    with count_compilations() as compilations:
        for step in loop:
            began = time.perf_counter()
            step_key = jax.random.fold_in(key, step)
            asked, asked_rows = drawn.asked(step)
            asked = narrowed(asked)
            state, metrics, completions = iteration(state, frozen, asked, step_key, asked_rows)
            completions, metrics = to_host((completions, metrics))  # which waits for the update
            sampled, seconds = int(completions.mask.sum()), time.perf_counter() - began
            loop.watch_skipped(step, metrics["skipped"] + metrics["value_skipped"], (asked, completions))
            evaluated = (step + 1) % 20 == 0 or loop.is_last(step)
            metrics |= answer_statistics(asked, completions)
            if judge is not None:
                metrics["utility"] = judge(asked, completions).mean()
            if watch is not None and evaluated:
                metrics |= watch(frozen.over_trunk(state.policy.params), step + 1)
            metrics |= {
                "skipped": (step + 1) * updates - int(state.policy.step),
                "value_skipped": (step + 1) * updates - int(state.critic.step),
                "seconds": seconds,
                "tokens_per_second": sampled / seconds,
                "compilations": compilations(),
            }
            shaped = float(metrics["score"]) - float(metrics["beta"]) * float(metrics["kl_k1"])
            loop.end_step(step, state, metrics, evaluated=evaluated, best=shaped, data_state=drawn.data_state)
    found = {f"{stage}_{name}": value for name, value in loop.last_metrics().items()}
    return frozen.over_trunk(state.policy.params), found


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Trains, compares the policy with the one it started from, exports it, and returns the final metrics."""
    with run_with_report(cfg, "ppo", PPO_REPORT) as run:
        task = open_task(cfg, run, first="sft")
        with open_rewards(cfg, run, task, failed_score=cfg.no_end_score) as (rewards, critic, watch, _):
            policy, metrics = train(
                cfg, task.base, task.prompts(), rewards, run, cfg.seed, max_new_tokens=task.max_new_tokens,
                critic=critic, reference=open_reference(cfg, run, task), judge=task.judge, watch=watch,
                demonstrations=task.demonstrations().train if cfg.ptx_coef else None,
            )  # fmt: skip
            task.finish()
            metrics |= compare_policies(
                run, task, ("start", task.base.params), ("ppo", policy), policy_sampler(cfg, task),
                make_reward_scorer(task, rewards, cfg.no_end_score),
            )  # fmt: skip
        run.summary(metrics)
        export_policy(run, task.base, policy, algorithm="PPO", metrics=metrics)
    return metrics


if __name__ == "__main__":
    run_main(main, Config)
