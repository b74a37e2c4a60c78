"""The rollout engine."""

from rlhf_jax.sampling.ends import ended
from rlhf_jax.sampling.generate import generate

__all__ = ["ended", "generate"]
