"""Supervised fine-tuning."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from rlhf_jax.arrays import boolean, check_shapes
from rlhf_jax.logprobs import chunked_weighted_logprobs
from rlhf_jax.masking import masked_mean
from rlhf_jax.types import Metrics


def sft_loss(logprobs: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> tuple[Float[Array, ""], Metrics]:
    """Negative log-likelihood of the responses' tokens, the prompts masked.

        L = −E_t[log π(y_t | x, y_<t)]

    Reference: Ouyang et al. 2022, §3.5, https://arxiv.org/abs/2203.02155.
    Deviation: E_t is the mean over unmasked tokens of the whole batch, not a mean of sequences' means.
    Raises ValueError for arrays whose shapes differ.
    """
    check_shapes({"logprobs": logprobs, "mask": mask}, rank=2)
    loss = -masked_mean(logprobs, mask)
    return loss, {"tokens": boolean(mask).sum()}


def chunked_sft_loss(
    hidden: Float[Array, "B T D"],
    head_kernel: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    chunk_size: int,
    softcap: float | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """`sft_loss` straight from hidden states: each token's weight is known, so its gradient is had with its logits.

    The logits of only `chunk_size` columns exist at once, and they are computed once; the head reads no prompts.
    Raises ValueError for targets and a mask whose shapes differ.
    """
    check_shapes({"targets": targets, "mask": mask}, rank=2)
    mask = boolean(mask)
    tokens = mask.sum()
    weights = mask.astype(jnp.float32) / jnp.maximum(tokens, 1).astype(jnp.float32)
    loss = -chunked_weighted_logprobs(
        hidden, head_kernel, targets, weights, mask, chunk_size=chunk_size, softcap=softcap
    )
    return loss, {"tokens": tokens}
