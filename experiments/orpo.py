"""ORPO: the SFT loss of chosen answers plus a log-odds ratio of chosen against rejected ones, without a reference.

Hong et al. 2024, eq. 6 (https://arxiv.org/abs/2403.07691). Its authors run it instead of SFT. In the controlled world
it runs after SFT.
    python experiments/orpo.py
    python experiments/orpo.py --model FOLDER --comparisons FILE
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
from rlhf_jax.errors import UserError
from rlhf_jax.losses import orpo_loss
from rlhf_jax.types import Metrics


@dataclass(frozen=True)
class ORPOFlags(Flags):
    """The flags of ORPO alone."""

    beta: float = 3.0
    """λ in the paper, the weight of the log-odds ratio."""

    def __post_init__(self) -> None:
        """Raises UserError for a β that is not positive."""
        if not self.beta > 0:
            raise UserError(f"beta is {self.beta}; it must be more than 0")
        super().__post_init__()


@dataclass(frozen=True)
class ORPO(Preference, ORPOFlags):
    """The flags of the stage."""


@dataclass(frozen=True)
class Config(RunFlags, SamplingFlags, PromptFlags, ReferenceFlags, ModelFlags, ComparisonFlags, ORPO):
    """ORPO from comparisons."""


def loss(cfg: ORPO, logprobs: Float[Array, " B"], batch: AnswerBatch, _: None) -> tuple[Array, Metrics]:
    """ORPO's loss of a batch: the chosen answers' SFT loss and the log-odds ratio."""
    return orpo_loss(*jnp.split(logprobs, 2), *jnp.split(batch.lengths, 2), beta=cfg.beta)


def reward(cfg: ORPO, logprobs: Any, ref_logprobs: Any, lengths: Any) -> Any:
    """The implicit reward: β times the mean log-probability a token."""
    return cfg.beta * logprobs / np.maximum(lengths, 1)


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Trains, compares the policy with the one it started from, exports it, and returns the final metrics."""
    return preference_stage(cfg, "orpo", "ORPO", partial(loss, cfg), partial(reward, cfg))


if __name__ == "__main__":
    run_main(main, Config)
