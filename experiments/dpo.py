"""Direct preference optimisation (DPO): trains a policy on comparisons, without a reward model.

Rafailov et al. 2023, eq. 7 (https://arxiv.org/abs/2305.18290). The policy starts from the reference model.
    python experiments/dpo.py
    python experiments/dpo.py --model FOLDER --comparisons FILE
It takes about 3 minutes on 2 CPU cores. In the controlled world it runs SFT first; the true utility rises from 0.8 to
2.0 (experiments/results/dpo.md), and log π falls for chosen and for rejected answers. It writes policy/ to the run's
folder. The files ipo.py, simpo.py, orpo.py and kto.py run the related losses.
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
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.losses import dpo_loss
from rlhf_jax.types import Metrics


@dataclass(frozen=True)
class DPOFlags(Flags):
    """The flags of DPO alone."""

    beta: float = 0.1
    """β. The larger it is, the closer the policy stays to the reference."""
    label_smoothing: float = 0.0
    """The probability ε that a label is wrong (conservative DPO). A comparison's own doubt d adds to it: the two go
    wrong independently, and the label is wrong where one of them does, d + ε − 2dε."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range."""
        at_least(self, label_smoothing=0)
        if not self.beta > 0:
            raise UserError(f"beta is {self.beta}; it must be more than 0")
        if self.label_smoothing >= 0.5:
            raise UserError(f"label-smoothing is {self.label_smoothing}; it must be below 0.5")
        super().__post_init__()


@dataclass(frozen=True)
class DPO(Preference, DPOFlags):
    """The flags of the stage."""


@dataclass(frozen=True)
class Config(RunFlags, SamplingFlags, PromptFlags, ReferenceFlags, ModelFlags, ComparisonFlags, DPO):
    """DPO from comparisons."""


def loss(cfg: DPO, logprobs: Float[Array, " B"], batch: AnswerBatch, _: None) -> tuple[Array, Metrics]:
    """DPO's loss of a batch: the first half are chosen answers, the second half their rejected ones."""
    doubt = jnp.split(batch.doubt, 2)[0]
    wrong = doubt + cfg.label_smoothing - 2.0 * doubt * cfg.label_smoothing
    return dpo_loss(*jnp.split(logprobs, 2), *jnp.split(batch.ref_logprobs, 2), beta=cfg.beta, label_smoothing=wrong)


def reward(cfg: DPO, logprobs: Any, ref_logprobs: Any, lengths: Any) -> Any:
    """The implicit reward, β log π/π_ref (eq. 5)."""
    return cfg.beta * (logprobs - ref_logprobs)


@on_mesh
def main(cfg: Config) -> dict[str, float]:
    """Trains, compares the policy with the one it started from, exports it, and returns the final metrics."""
    return preference_stage(cfg, "dpo", "DPO", partial(loss, cfg), partial(reward, cfg), soft=True)


if __name__ == "__main__":
    run_main(main, Config)
