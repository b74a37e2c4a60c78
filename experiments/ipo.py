"""Identity preference optimisation (IPO): regresses DPO's log-odds to a finite target, so that they stop growing.

Azar et al. 2023, eq. 17 (https://arxiv.org/abs/2310.12036). The policy starts from the reference model.
    python experiments/ipo.py
    python experiments/ipo.py --model FOLDER --comparisons FILE
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
from rlhf_jax.losses import ipo_loss
from rlhf_jax.types import Metrics


@dataclass(frozen=True)
class IPOFlags(Flags):
    """The flags of IPO alone."""

    beta: float = 0.03
    """τ in the paper. The target of the log-odds of chosen against rejected answers is 1/(2τ)."""

    def __post_init__(self) -> None:
        """Raises UserError for a β that is not positive."""
        if not self.beta > 0:
            raise UserError(f"beta is {self.beta}; it must be more than 0")
        super().__post_init__()


@dataclass(frozen=True)
class IPO(Preference, IPOFlags):
    """The flags of the stage."""


@dataclass(frozen=True)
class Config(RunFlags, SamplingFlags, PromptFlags, ReferenceFlags, ModelFlags, ComparisonFlags, IPO):
    """IPO from comparisons."""


def loss(cfg: IPO, logprobs: Float[Array, " B"], batch: AnswerBatch, _: None) -> tuple[Array, Metrics]:
    """IPO's loss of a batch: the squared distance of the log-odds, minus the reference's, from 1/(2β)."""
    doubt = jnp.split(batch.doubt, 2)[0]
    return ipo_loss(*jnp.split(logprobs, 2), *jnp.split(batch.ref_logprobs, 2), beta=cfg.beta, label_smoothing=doubt)


def reward(cfg: IPO, logprobs: Any, ref_logprobs: Any, lengths: Any) -> Any:
    """The implicit reward, β log π/π_ref."""
    return cfg.beta * (logprobs - ref_logprobs)


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Trains, compares the policy with the one it started from, exports it, and returns the final metrics."""
    return preference_stage(cfg, "ipo", "IPO", partial(loss, cfg), partial(reward, cfg), soft=True)


if __name__ == "__main__":
    run_main(main, Config)
