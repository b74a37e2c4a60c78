"""REINFORCE with the other answers as baseline (RLOO): the plain policy gradient of whole answers.

Ahmadian et al. 2024 (https://arxiv.org/abs/2402.14740). The advantage of an answer is its score minus the mean score
of the other answers to its prompt. The KL to the reference is in the score. There is no clip, so each iteration makes
one step, with answers of the policy itself.
    python experiments/rloo.py
    python experiments/rloo.py --model FOLDER --prompts FILE --reward math
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
from rlhf_jax.advantages import leave_one_out_advantages
from rlhf_jax.cli import on_mesh, run_main
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.groups import Algorithm, Answers, Numbers
from rlhf_jax.losses import reinforce_loss
from rlhf_jax.masking import constant_mean
from rlhf_jax.types import Metrics


@dataclass(frozen=True)
class RLOOFlags(Flags):
    """The flags of RLOO alone."""

    beta: float = 0.03
    """Weight of the KL to the reference in the score, nats a response (k₁)."""

    def __post_init__(self) -> None:
        at_least(self, beta=0)
        super().__post_init__()


@dataclass(frozen=True)
class RLOO(Groups, RLOOFlags):
    """The flags of the stage."""

    def __post_init__(self) -> None:
        """Raises UserError for a second step on the same answers."""
        super().__post_init__()
        if self.epochs * self.minibatches > 1:
            raise UserError(
                "without a clip RLOO makes one step with each iteration's answers: leave epochs and minibatches at 1"
            )


@dataclass(frozen=True)
class Config(GroupConfig, RLOO):
    """RLOO from a policy, a reward and prompts."""


def algorithm(cfg: RLOO, numbers: Numbers) -> Algorithm:
    """RLOO's advantages and loss: the sum of an answer's log-probabilities is that of the answer."""

    advantages = partial(leave_one_out_advantages, group_size=numbers.group_size)

    def loss(logprobs: Float[Array, "B T"], answers: Answers) -> tuple[Array, Metrics]:
        return reinforce_loss(
            logprobs, answers.advantages, answers.tokens.mask, reduce=partial(constant_mean, length=1)
        )

    return Algorithm(advantages, loss, averaged=lambda mask: jnp.asarray(len(mask)), kl_in_reward=cfg.beta)


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Trains, compares the policy with the one it started from, exports it, and returns the final metrics."""
    return group_stage(cfg, "rloo", "RLOO", partial(algorithm, cfg))


if __name__ == "__main__":
    run_main(main, Config)
