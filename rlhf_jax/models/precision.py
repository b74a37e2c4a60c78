"""In what arithmetic a model is kept and computed: said once, here."""

from typing import Any, NamedTuple

import jax.numpy as jnp

NORMS_AND_BIASES = ("scale", "bias")
"""Names of parameters that stay float32."""


class Precision(NamedTuple):
    """Three dtypes; `ModelConfig` carries them, so that training and sampling have the same ones.

    Whatever they are, these are float32: norms (their scales and statistics), biases, adapters and scalar heads;
    rotary angles; attention's scores and softmax; logits, log-probabilities, values and losses; an optimiser's state.

    Reference: Micikevicius et al. 2017, https://arxiv.org/abs/1710.03740 (weights in float32 under half-precision
    arithmetic). A float32 head: MiniMax 2025, §3.2, https://arxiv.org/abs/2506.13585 (else what is sampled and what is
    trained have different probabilities).
    """

    parameters: Any
    """The dtype of weights and embeddings, as they are initialised, loaded and kept."""
    compute: Any
    """The dtype of activations, matrix products and the cache of keys and values."""
    head: Any
    """The dtype of the final hidden states, and of their product with a language head, which is summed in float32."""


FLOAT32 = Precision(jnp.float32, jnp.float32, jnp.float32)
MIXED = Precision(jnp.float32, jnp.bfloat16, jnp.float32)
"""The usual bf16 mixed precision."""
BFLOAT16 = Precision(jnp.bfloat16, jnp.bfloat16, jnp.bfloat16)
"""For weights that are not trained, or beside adapters that are: steps below 1/256 of a weight would be lost."""
