"""GRPO done right (Dr. GRPO): without the two divisions that favour long wrong answers and easy or hard prompts.

Liu et al. 2025, §3.2 (https://arxiv.org/abs/2503.20783). Against grpo.py: advantages are not divided by the group's
standard deviation. The loss is a sum over tokens, over a constant, not each answer's mean. There is no KL.
    python experiments/dr_grpo.py
    python experiments/dr_grpo.py --model FOLDER --prompts FILE --reward math
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
from rlhf_jax.losses import grpo_loss
from rlhf_jax.masking import constant_mean
from rlhf_jax.types import Metrics


@dataclass(frozen=True)
class DrGRPOFlags(Flags):
    """The flags of Dr. GRPO alone."""

    clip_eps: float = 0.2
    """How far the ratio of new to old policy may count, from 1."""

    def __post_init__(self) -> None:
        at_least(self, clip_eps=0)
        super().__post_init__()


@dataclass(frozen=True)
class DrGRPO(Groups, DrGRPOFlags):
    """The flags of the stage."""


@dataclass(frozen=True)
class Config(GroupConfig, DrGRPO):
    """Dr. GRPO from a policy, a reward and prompts."""


def algorithm(cfg: DrGRPO, numbers: Numbers) -> Algorithm:
    """Dr. GRPO's advantages and loss."""

    advantages = partial(group_advantages, group_size=numbers.group_size, scale_by_std=False)

    def loss(logprobs: Float[Array, "B T"], answers: Answers) -> tuple[Array, Metrics]:
        return grpo_loss(
            logprobs, answers.old_logprobs, answers.old_logprobs, answers.advantages, answers.tokens.mask,
            clip_eps_low=cfg.clip_eps, clip_eps_high=cfg.clip_eps, beta=0.0,
            reduce=partial(constant_mean, length=numbers.max_new_tokens),
        )  # fmt: skip

    return Algorithm(advantages, loss, averaged=lambda mask: jnp.asarray(len(mask)))


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Trains, compares the policy with the one it started from, exports it, and returns the final metrics."""
    return group_stage(cfg, "dr_grpo", "Dr. GRPO", partial(algorithm, cfg))


if __name__ == "__main__":
    run_main(main, Config)
