"""The rollout engine."""

from rlhf_jax.sampling.generate import generate

__all__ = ["generate"]
