"""Rotary positions: the frequencies of a layer, their scalings for long texts, and the rotation."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor`. Reference: Chen et al. 2023, eq. 4, https://arxiv.org/abs/2306.15595."""

    factor: float

    def __call__(self, frequencies: Float[Array, " half"]) -> Float[Array, " half"]:
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Long waves are divided by `factor`, short ones kept, those between interpolated.

        f' = (1 − s) f / factor + s f,   s = clip((L f / 2π − low) / (high − low), 0, 1),   L the original length

    Reference: Grattafiori et al. 2024, https://arxiv.org/abs/2407.21783, and `apply_scaling` in
    https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int

    def __call__(self, frequencies: Float[Array, " half"]) -> Float[Array, " half"]:
        waves = self.original_length * frequencies / (2 * math.pi)
        between = (waves - self.low_frequency_factor) / (self.high_frequency_factor - self.low_frequency_factor)
        kept = jnp.clip(between, 0.0, 1.0)
        return (1 - kept) * frequencies / self.factor + kept * frequencies


@dataclass(frozen=True)
class LongRope:
    """Each frequency divided by its own factor, sines and cosines multiplied by `attention_factor`.

    Reference: Ding et al. 2024, https://arxiv.org/abs/2402.13753.
    Deviation: `long_factors` take over past `original_length` tokens, for a whole sequence at once, which a cache
    cannot follow; they are carried for checkpoints, and a longer sequence is refused.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    attention_factor: float
    original_length: int

    def __call__(self, frequencies: Float[Array, " half"]) -> Float[Array, " half"]:
        return frequencies / jnp.asarray(self.short_factors)


RopeScaling = LinearScaling | Llama3Scaling | LongRope


def rope_frequencies(width: int, theta: float, scaling: RopeScaling | None) -> Float[Array, " half"]:
    """Radians a position, float32: θ^(−2i/width) for each of the width/2 pairs, scaled."""
    half = width // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return frequencies if scaling is None else scaling(frequencies)


def rotate(
    x: Float[Array, "B T H K"],
    positions: Int[Array, "B T"],
    frequencies: Float[Array, " half"],
    magnitude: float = 1.0,
) -> Float[Array, "B T H K"]:
    """Rotary positions, half rotation: (x₁, x₂) -> (x₁ cos − x₂ sin, x₂ cos + x₁ sin), in float32.

    The first 2·half of the K dimensions turn, the others are passed on; cos and sin are multiplied by `magnitude`.

    Reference: Su et al. 2021, eq. 34, https://arxiv.org/abs/2104.09864.
    Deviation: pairs are (i, i + half), as in Hugging Face checkpoints, not (2i, 2i + 1).
    """
    half = frequencies.shape[0]
    angles = positions[:, :, None, None].astype(jnp.float32) * jnp.expand_dims(frequencies, (0, 1, 2))
    cos, sin = jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude
    first, second, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
