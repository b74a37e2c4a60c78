"""A scalar head on the decoder: a value at each token, or a reward at a response's last one."""

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from rlhf_jax.arrays import check_shapes
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.transformer import Transformer


class ScalarHead(nn.Module):
    """h·w + b in float32, w initialised with std 1/√(d+1).

    Reference: Huang et al. 2024, "The N+ implementation details of RLHF with PPO", detail 11,
    https://arxiv.org/abs/2403.17031.
    """

    @nn.compact
    def __call__(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        width = hidden.shape[-1]
        kernel = self.param("kernel", nn.initializers.normal((width + 1) ** -0.5), (width,))
        bias = self.param("bias", nn.initializers.zeros, ())
        return hidden.astype(jnp.float32) @ kernel + bias


class ScalarModel(nn.Module):
    """A decoder whose head is a scalar at each token; critic and reward model alike.

    Parameters are {"trunk": those of a Transformer, "head": …}.
    """

    config: ModelConfig

    def setup(self) -> None:
        # Tied, so that no language head is asked for.
        self.trunk = Transformer(replace(self.config, tie_embeddings=True))
        self.head = ScalarHead()

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T"]:
        return self.head(self.trunk.hidden_states(tokens, positions, segment_ids))


def from_language_model(params: Any, key: PRNGKeyArray, config: ModelConfig) -> Any:
    """A ScalarModel's parameters: a language model's trunk, and a new head. An untied language head is left out."""
    trunk = {name: value for name, value in params.items() if name != "head"}
    head = ScalarHead().init(key, jnp.zeros((1, 1, config.d_model)))["params"]
    return {"trunk": jax.tree.map(jnp.copy, trunk), "head": head}


def last_token_rewards(values: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """The value at each response's last token, 0 for an empty response.

    mask[t] says that targets[t] = inputs[t + 1] is part of the response: the last one is an input at (last True) + 1.
    A True in the last column has no such input. It raises ValueError where the mask is known, and makes the row NaN
    where it is traced.
    """
    check_shapes({"values": values, "mask": mask}, rank=2)
    if not isinstance(mask, jax.core.Tracer) and np.asarray(mask)[:, -1:].any():
        raise ValueError(
            "the mask is True in the last column, whose target is no input: a batch needs a padding column at its end"
        )
    remaining = jnp.flip(jnp.cumsum(jnp.flip(mask, axis=1), axis=1), axis=1)
    is_last = mask & (remaining == 1)
    at_last = jnp.pad(is_last[:, :-1], ((0, 0), (1, 0)))
    found = jnp.where(at_last, values, 0.0).sum(axis=1)
    return jnp.where(mask[:, -1], jnp.nan, found)
