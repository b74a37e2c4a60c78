"""The tokens that end an answer."""

from typing import Any

from jaxtyping import Bool, Int

from rlhf_jax.batches import Completions

EosId = int | tuple[int, ...] | None
"""One id, or several of which each ends an answer; None is none."""


def eos_ids(eos_id: EosId) -> tuple[int, ...]:
    """The ids that end an answer, as a tuple."""
    return () if eos_id is None else (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)


def is_end(tokens: Int[Any, "..."], eos_id: EosId) -> Bool[Any, "..."]:
    """Whether each token is one that ends an answer. Traceable; numpy arrays give numpy arrays."""
    found = tokens != tokens
    for end in eos_ids(eos_id):
        found = found | (tokens == end)
    return found


def ended(completions: Completions, eos_id: EosId) -> Bool[Any, " B"]:
    """Whether each answer ended by itself, and was not cut at the limit. Traceable."""
    return (is_end(completions.tokens, eos_id) & completions.mask).any(axis=1)
