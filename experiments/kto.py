"""KTO: trains a policy on single answers that people found good or bad.

Ethayarajh et al. 2024, eq. 8 (https://arxiv.org/abs/2402.01306). A batch's KL is estimated from its responses after
other prompts. These prompts are drawn once for the whole run, so the reference scores them once; the paper (§4) shifts
the prompts of each batch. Comparisons are taken apart: each chosen answer is good, each rejected answer is bad.
    python experiments/kto.py
    python experiments/kto.py --model FOLDER --unpaired FILE
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

from jaxtyping import Array, Float

from experiments.flags import (
    ComparisonFlags,
    Flags,
    ModelFlags,
    PromptFlags,
    ReferenceFlags,
    RunFlags,
    SamplingFlags,
    UnpairedFlags,
)
from experiments.stages import preference_stage
from experiments.training import Preference
from rlhf_jax.cli import on_mesh, run_main
from rlhf_jax.data.pairs import AnswerBatch
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.losses import kto_loss
from rlhf_jax.types import Metrics


@dataclass(frozen=True)
class KTOFlags(Flags):
    """The flags of KTO alone."""

    beta: float = 0.1
    """β. The larger it is, the closer the policy stays to the reference."""
    desirable_weight: float = 1.0
    """λ_D, the weight of good answers."""
    undesirable_weight: float = 1.0
    """λ_U, the weight of bad answers."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range."""
        at_least(self, desirable_weight=0, undesirable_weight=0)
        if not self.beta > 0:
            raise UserError(f"beta is {self.beta}; it must be more than 0")
        super().__post_init__()


@dataclass(frozen=True)
class KTO(Preference, KTOFlags):
    """The flags of the stage."""

    def __post_init__(self) -> None:
        """Raises UserError for microbatches."""
        super().__post_init__()
        if self.accumulate > 1:
            raise UserError("KTO estimates its KL from the whole batch: accumulate must be 1")


@dataclass(frozen=True)
class Config(RunFlags, SamplingFlags, PromptFlags, ReferenceFlags, ModelFlags, ComparisonFlags, UnpairedFlags, KTO):
    """KTO from single answers that people found good or bad."""


def loss(
    cfg: KTO, logprobs: Float[Array, " B"], batch: AnswerBatch, kl: Float[Array, ""] | None
) -> tuple[Array, Metrics]:
    """KTO's loss of a batch: each answer's implicit reward against the KL estimate."""
    assert kl is not None
    return kto_loss(
        logprobs, batch.ref_logprobs, batch.good, kl,
        beta=cfg.beta, desirable_weight=cfg.desirable_weight, undesirable_weight=cfg.undesirable_weight,
    )  # fmt: skip


def reward(cfg: KTO, logprobs: Any, ref_logprobs: Any, lengths: Any) -> Any:
    """The implicit reward, β log π/π_ref."""
    return cfg.beta * (logprobs - ref_logprobs)


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Trains, compares the policy with the one it started from, exports it, and returns the final metrics."""
    return preference_stage(cfg, "kto", "KTO", partial(loss, cfg), partial(reward, cfg), single=True)


if __name__ == "__main__":
    run_main(main, Config)
