"""Penalties on the length of answers, in tokens."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def overlong_penalty(lengths: Int[Array, " B"], *, max_length: int, buffer: int) -> Float[Array, " B"]:
    """Soft overlong punishment: 0, then falling to −1 over the last `buffer` of `max_length` tokens.

        0 up to L_max − L_buffer,   (L_max − L_buffer − |y|) / L_buffer up to L_max,   −1 beyond

    Traceable. Raises ValueError unless 0 < buffer <= max_length.
    Reference: Yu et al. 2025 (DAPO), eq. 13, https://arxiv.org/abs/2503.14476.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"a buffer of {buffer} tokens does not fit into {max_length}")
    return jnp.clip((max_length - buffer - lengths.astype(jnp.float32)) / buffer, -1.0, 0.0)
