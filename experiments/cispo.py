"""Clipped importance sampling (CISPO): the weight of a token is clipped, and no token loses its gradient.

MiniMax 2025 (MiniMax-M1), §3.1 (https://arxiv.org/abs/2506.13585). Against grpo.py: a token's gradient is that of
log π, times the clipped ratio as a weight. The loss is a mean over the tokens of the batch. There is no KL.
    python experiments/cispo.py
    python experiments/cispo.py --model FOLDER --prompts FILE --reward math
It takes about 3 minutes on 2 CPU cores. Without files it runs SFT in the controlled world first. It writes policy/ to
the run's folder.
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
from rlhf_jax.errors import at_least
from rlhf_jax.groups import Algorithm, Answers, Numbers
from rlhf_jax.losses import cispo_loss
from rlhf_jax.types import Metrics


@dataclass(frozen=True)
class CISPOFlags(Flags):
    """The flags of CISPO alone."""

    clip_eps_low: float = 1.0
    """How far a weight may be below 1; 1 leaves it as it is."""
    clip_eps_high: float = 4.0
    """How far it may be above 1. Khatri et al. 2025 (ScaleRL, https://arxiv.org/abs/2510.13786) cap it at 5, too."""

    def __post_init__(self) -> None:
        at_least(self, clip_eps_low=0, clip_eps_high=0)
        super().__post_init__()


@dataclass(frozen=True)
class CISPO(Groups, CISPOFlags):
    """The flags of the stage."""

    minibatches: int = 4
    """Parts of an iteration's answers, one optimiser step each."""


@dataclass(frozen=True)
class Config(GroupConfig, CISPO):
    """CISPO from a policy, a reward and prompts."""


def algorithm(cfg: CISPO, numbers: Numbers) -> Algorithm:
    """CISPO's advantages and loss."""

    advantages = partial(group_advantages, group_size=numbers.group_size, scale_by_std=True)

    def loss(logprobs: Float[Array, "B T"], answers: Answers) -> tuple[Array, Metrics]:
        return cispo_loss(
            logprobs, answers.old_logprobs, answers.advantages, answers.tokens.mask,
            clip_eps_low=cfg.clip_eps_low, clip_eps_high=cfg.clip_eps_high,
        )  # fmt: skip

    return Algorithm(advantages, loss, averaged=jnp.sum)


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Trains, compares the policy with the one it started from, exports it, and returns the final metrics."""
    return group_stage(cfg, "cispo", "CISPO", partial(algorithm, cfg))


if __name__ == "__main__":
    run_main(main, Config)
