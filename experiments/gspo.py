"""Group sequence policy optimisation (GSPO): the ratio and its clip are those of a whole answer.

Zheng et al. 2025 (https://arxiv.org/abs/2507.18071). Against grpo.py: the ratio of new to old policy is that of the
answer, to the power of one over its length. It is clipped far more tightly. There is no KL.
    python experiments/gspo.py
    python experiments/gspo.py --model FOLDER --prompts FILE --reward math
It takes about 3 minutes on 2 CPU cores. Without files it runs SFT in the controlled world first. It writes policy/ to
the run's folder.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

from jaxtyping import Array, Bool, Float, Int

from experiments.flags import Flags, GroupConfig
from experiments.stages import group_stage
from experiments.training import Groups
from rlhf_jax.advantages import group_advantages
from rlhf_jax.cli import on_mesh, run_main
from rlhf_jax.errors import at_least
from rlhf_jax.groups import Algorithm, Answers, Numbers
from rlhf_jax.losses import gspo_loss
from rlhf_jax.types import Metrics


@dataclass(frozen=True)
class GSPOFlags(Flags):
    """The flags of GSPO alone."""

    clip_eps_low: float = 3e-4
    """How far the ratio of new to old policy may count below 1."""
    clip_eps_high: float = 4e-4
    """How far it may count above 1."""

    def __post_init__(self) -> None:
        at_least(self, clip_eps_low=0, clip_eps_high=0)
        super().__post_init__()


@dataclass(frozen=True)
class GSPO(Groups, GSPOFlags):
    """The flags of the stage."""

    minibatches: int = 4
    """Parts of an iteration's answers, one optimiser step each."""


@dataclass(frozen=True)
class Config(GroupConfig, GSPO):
    """GSPO from a policy, a reward and prompts."""


def algorithm(cfg: GSPO, numbers: Numbers) -> Algorithm:
    """GSPO's advantages and loss."""

    advantages = partial(group_advantages, group_size=numbers.group_size, scale_by_std=True)

    def loss(logprobs: Float[Array, "B T"], answers: Answers) -> tuple[Array, Metrics]:
        return gspo_loss(
            logprobs, answers.old_logprobs, answers.advantages, answers.tokens.mask,
            clip_eps_low=cfg.clip_eps_low, clip_eps_high=cfg.clip_eps_high,
        )  # fmt: skip

    def rows(mask: Bool[Array, "B T"]) -> Int[Array, ""]:
        return mask.any(axis=1).sum()

    return Algorithm(advantages, loss, averaged=rows, metrics_averaged=rows)


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Trains, compares the policy with the one it started from, exports it, and returns the final metrics."""
    return group_stage(cfg, "gspo", "GSPO", partial(algorithm, cfg))


if __name__ == "__main__":
    run_main(main, Config)
