"""Decoupled clip and dynamic sampling (DAPO): four changes to GRPO for long answers.

Yu et al. 2025, §3 (https://arxiv.org/abs/2503.14476). Against grpo.py: the ratio is clipped further above than below
(clip-higher); prompts whose answers all score alike are drawn again (dynamic sampling); the loss is a mean over the
tokens of the batch; answers near the length limit are punished (soft overlong punishment, eq. 13). There is no KL.
    python experiments/dapo.py
    python experiments/dapo.py --model FOLDER --prompts FILE --reward math
It takes about 3 minutes on 2 CPU cores. Without files it runs SFT in the controlled world first. The metric `groups`
counts all groups that were sampled. It writes policy/ to the run's folder.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments.flags import Flags, GroupConfig
from experiments.stages import group_stage
from experiments.training import Groups
from rlhf_jax.advantages import group_advantages
from rlhf_jax.cli import on_mesh, run_main
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.groups import Algorithm, Answers, Numbers
from rlhf_jax.losses import grpo_loss
from rlhf_jax.rewards.lengths import overlong_penalty
from rlhf_jax.types import Metrics


@dataclass(frozen=True)
class DAPOFlags(Flags):
    """The flags of DAPO alone."""

    clip_eps_low: float = 0.2
    """How far the ratio of new to old policy may count below 1."""
    clip_eps_high: float = 0.28
    """How far it may count above 1."""
    rounds: int = 4
    """So many times prompts are drawn, at most, until every group has a signal; 1 draws once."""
    overlong_buffer: int | None = None
    """Tokens before the limit over which the punishment grows to −1. An answer's end
    counts as a token. By default a fifth of max-new-tokens; 0: no punishment."""

    def __post_init__(self) -> None:
        at_least(self, clip_eps_low=0, clip_eps_high=0, rounds=1)
        if self.overlong_buffer is not None:
            at_least(self, overlong_buffer=0)
        super().__post_init__()


@dataclass(frozen=True)
class DAPO(Groups, DAPOFlags):
    """The flags of the stage."""

    minibatches: int = 4
    """Parts of an iteration's answers, one optimiser step each. In a single step no ratio leaves 1."""


@dataclass(frozen=True)
class Config(GroupConfig, DAPO):
    """DAPO from a policy, a reward and prompts."""


def algorithm(cfg: DAPO, numbers: Numbers) -> Algorithm:
    """DAPO's advantages, loss, punishment and rounds.

    Raises UserError for a buffer that is longer than an answer may be.
    """
    longest = numbers.max_new_tokens
    buffer = longest // 5 if cfg.overlong_buffer is None else cfg.overlong_buffer
    if buffer > longest:
        raise UserError(f"--overlong-buffer {buffer} is more than --max-new-tokens {longest}")

    advantages = partial(group_advantages, group_size=numbers.group_size, scale_by_std=True)

    def loss(logprobs: Float[Array, "B T"], answers: Answers) -> tuple[Array, Metrics]:
        return grpo_loss(
            logprobs, answers.old_logprobs, answers.old_logprobs, answers.advantages, answers.tokens.mask,
            clip_eps_low=cfg.clip_eps_low, clip_eps_high=cfg.clip_eps_high, beta=0.0,
        )  # fmt: skip

    penalty = partial(overlong_penalty, max_length=longest, buffer=buffer) if buffer else None
    return Algorithm(advantages, loss, averaged=jnp.sum, penalty=penalty, rounds=cfg.rounds)


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Trains, compares the policy with the one it started from, exports it, and returns the final metrics."""
    return group_stage(cfg, "dapo", "DAPO", partial(algorithm, cfg))


if __name__ == "__main__":
    run_main(main, Config)
