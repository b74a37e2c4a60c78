"""Group relative policy optimisation (GRPO): answers to one prompt are each other's baseline; there is no critic.

Shao et al. 2024, §4.1 (https://arxiv.org/abs/2402.03300). Each iteration samples a group of answers to each prompt and
scores them. The advantage of an answer is how far its score is above the group's mean, in standard deviations. The
loss is PPO's clipped surrogate, averaged within each answer first, plus β times the KL to the reference.
    python experiments/grpo.py
    python experiments/grpo.py --model FOLDER --prompts FILE --reward math
    python experiments/grpo.py --model FOLDER --prompts FILE --reward FILE.py:NAME
It takes about 3 minutes on 2 CPU cores. Without files it runs SFT in the controlled world first. There the reward is a
checker, which says whether an answer is right and nothing of its form. It writes policy/ to the run's folder. The
files rloo.py, dr_grpo.py, dapo.py, gspo.py and cispo.py run the related algorithms.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

from jaxtyping import Array, Float

from experiments.flags import Flags, GroupConfig
from experiments.stages import group_stage
from experiments.training import Groups
from rlhf_jax.advantages import group_advantages
from rlhf_jax.cli import on_mesh, run_main
from rlhf_jax.errors import at_least
from rlhf_jax.groups import Algorithm, Answers, Numbers
from rlhf_jax.losses import grpo_loss, truncated_importance_weights
from rlhf_jax.masking import sequence_mean
from rlhf_jax.types import Metrics


@dataclass(frozen=True)
class GRPOFlags(Flags):
    """The flags of GRPO alone."""

    beta: float = 0.04
    """Weight of the KL to the reference in the loss (k₃), a token."""
    clip_eps: float = 0.2
    """How far the ratio of new to old policy may count, from 1."""
    sampler_cap: float | None = None
    """The most that a token may weigh for π/π_sampler, where the sampler computes otherwise than the trainer
    (truncated importance sampling). By default there are no such weights."""

    def __post_init__(self) -> None:
        at_least(self, beta=0, clip_eps=0)
        if self.sampler_cap is not None:
            at_least(self, sampler_cap=1)
        super().__post_init__()


@dataclass(frozen=True)
class GRPO(Groups, GRPOFlags):
    """The flags of the stage."""


@dataclass(frozen=True)
class Config(GroupConfig, GRPO):
    """GRPO from a policy, a reward and prompts."""


def algorithm(cfg: GRPO, numbers: Numbers) -> Algorithm:
    """GRPO's advantages and loss."""

    advantages = partial(group_advantages, group_size=numbers.group_size, scale_by_std=True)

    def loss(logprobs: Float[Array, "B T"], answers: Answers) -> tuple[Array, Metrics]:
        mask, old = answers.tokens.mask, answers.old_logprobs
        reference = old if answers.ref_logprobs is None else answers.ref_logprobs
        weights = None
        if cfg.sampler_cap is not None:
            weights = truncated_importance_weights(old, answers.sampler_logprobs, mask, cap=cfg.sampler_cap)
        return grpo_loss(
            logprobs, old, reference, answers.advantages, mask, clip_eps_low=cfg.clip_eps, clip_eps_high=cfg.clip_eps,
            beta=cfg.beta, reduce=sequence_mean, weights=weights,
        )  # fmt: skip

    return Algorithm(advantages, loss, averaged=lambda mask: mask.any(axis=1).sum(), kl_in_loss=cfg.beta > 0)


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Trains, compares the policy with the one it started from, exports it, and returns the final metrics."""
    return group_stage(cfg, "grpo", "GRPO", partial(algorithm, cfg))


if __name__ == "__main__":
    run_main(main, Config)
