"""SimPO: compares mean log-probabilities a token, with a margin and without a reference.

Meng et al. 2024, eq. 6 (https://arxiv.org/abs/2405.14734).
    python experiments/simpo.py
    python experiments/simpo.py --model FOLDER --comparisons FILE
It takes about 3 minutes on 2 CPU cores. In the controlled world it runs SFT first. experiments/results/dpo.md compares
it with the other losses there. It writes policy/ to the run's folder.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.flags import (
    ComparisonFlags,
    Flags,
    ModelFlags,
    PromptFlags,
    ReferenceFlags,
    RunFlags,
    SamplingFlags,
)
from experiments.stages import preference_stage
from experiments.training import Preference
from rlhf_jax.cli import on_mesh, run_main
from rlhf_jax.data.pairs import AnswerBatch
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.losses import simpo_loss
from rlhf_jax.types import Metrics


@dataclass(frozen=True)
class SimPOFlags(Flags):
    """The flags of SimPO alone."""

    beta: float = 2.0
    """The scale of the mean log-probability a token."""
    gamma: float = 1.0
    """The margin between chosen and rejected answers."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range."""
        at_least(self, gamma=0)
        if not self.beta > 0:
            raise UserError(f"beta is {self.beta}; it must be more than 0")
        super().__post_init__()


@dataclass(frozen=True)
class SimPO(Preference, SimPOFlags):
    """The flags of the stage."""


@dataclass(frozen=True)
class Config(RunFlags, SamplingFlags, PromptFlags, ReferenceFlags, ModelFlags, ComparisonFlags, SimPO):
    """SimPO from comparisons."""


def loss(cfg: SimPO, logprobs: Float[Array, " B"], batch: AnswerBatch, _: None) -> tuple[Array, Metrics]:
    """SimPO's loss of a batch: the difference of mean log-probabilities a token, minus the margin."""
    return simpo_loss(*jnp.split(logprobs, 2), *jnp.split(batch.lengths, 2), beta=cfg.beta, gamma=cfg.gamma)


def reward(cfg: SimPO, logprobs: Any, ref_logprobs: Any, lengths: Any) -> Any:
    """The implicit reward: β times the mean log-probability a token."""
    return cfg.beta * logprobs / np.maximum(lengths, 1)


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Trains, compares the policy with the one it started from, exports it, and returns the final metrics."""
    return preference_stage(cfg, "simpo", "SimPO", partial(loss, cfg), partial(reward, cfg))


if __name__ == "__main__":
    run_main(main, Config)
