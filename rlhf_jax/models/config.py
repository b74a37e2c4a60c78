"""The shape of a decoder."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama-style decoder. Raises ValueError for a shape that cannot be."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    """Divides n_heads: grouped-query attention where smaller."""
    head_dim: int
    d_ff: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    max_length: int
    """The longest sequence it was made for; written to config.json, not enforced."""
    dtype: Any = jnp.float32
    """Of activations; parameters, norms and logits are float32."""
    scan_layers: bool = False
    """One compiled layer under nn.scan, parameters stacked along axis 0."""
    remat: bool = False
    """Compute each layer's activations again in the backward pass."""

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "d_model",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "d_ff",
            "max_length",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, not {self.head_dim}")
