"""What a stage trains: its weights, or low-rank adapters over them (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

Either way a stage has a frozen tree and one of its own, and `with_lora(frozen, own)` is the model: nothing is frozen
where weights are trained. Only the own tree has gradients and an optimiser's state.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from rlhf_jax.errors import UserError, at_least
from rlhf_jax.models import cast_frozen, init_lora, quantize_frozen, with_dropout, with_lora
from rlhf_jax.sharding import create


@dataclass(frozen=True)
class Adapters:
    """What a stage can be told about adapters."""

    lora_rank: int = 0
    """Train adapters of this rank over frozen weights; 0 trains the weights."""
    lora_alpha: float = 32.0
    """An adapter is added α/r times."""
    lora_targets: str = "(query|key|value|output|gate|up|down)/kernel"
    """A regular expression, looked for in names such as layer_0/query/kernel."""
    lora_rank_stabilized: bool = False
    """α/√r times (rsLoRA)."""
    frozen_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """Of the frozen weights; as --precision has them unless given. int8: of the layers' matrices, with a float32 scale
    for each output; embeddings and language head stay as --precision has them."""

    def __post_init__(self) -> None:
        at_least(self, lora_rank=0, lora_alpha=0)


@dataclass(frozen=True)
class Dropping(Adapters):
    """Of a stage that trains on given text."""

    lora_dropout: float = 0.0
    """Share of an adapter's inputs that each step leaves out; with accumulate, at the same places of each part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, lora_dropout=0)
        if self.lora_dropout and not (self.lora_rank and self.lora_dropout < 1):
            raise UserError(f"lora-dropout is {self.lora_dropout}; it must be below 1, and needs a lora-rank")


def split(cfg: Adapters, key: PRNGKeyArray, params: Any) -> tuple[Any, Any]:
    """(frozen, own) of a language model's or a ScalarModel's parameters; a scalar head is always the stage's own.

    Raises UserError for targets that match nothing.
    """
    if not cfg.lora_rank:
        return {}, params
    scalar = {name: params[name] for name in ("head",) if "trunk" in params}
    frozen = {name: value for name, value in params.items() if name not in scalar}
    try:
        adapter = create(lambda: init_lora(
            key, frozen, rank=cfg.lora_rank, alpha=cfg.lora_alpha, targets=cfg.lora_targets,
            rank_stabilized=cfg.lora_rank_stabilized,
        ))  # fmt: skip
    except (ValueError, re.error) as error:
        raise UserError(f"lora-targets {cfg.lora_targets!r}: {error}") from None
    if cfg.frozen_dtype == "int8":
        frozen = quantize_frozen(frozen)
    elif cfg.frozen_dtype:
        frozen = cast_frozen(frozen, jnp.dtype(cfg.frozen_dtype))
    return frozen, adapter | scalar


def in_training(cfg: Dropping, frozen: Any, own: Any, key: PRNGKeyArray, step: Any) -> Any:
    """The model as the loss of one step sees it."""
    if cfg.lora_dropout:
        own = with_dropout(own, jax.random.fold_in(key, step), rate=cfg.lora_dropout)
    return with_lora(frozen, own)
