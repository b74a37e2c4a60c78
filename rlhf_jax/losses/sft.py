"""Supervised fine-tuning."""

from jax import Array
from jaxtyping import Bool, Float

from rlhf_jax.masking import masked_mean

Metrics = dict[str, Array]


def sft_loss(logprobs: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> tuple[Float[Array, ""], Metrics]:
    """Negative log-likelihood of the responses' tokens, the prompts masked.

        L = −E_t[log π(y_t | x, y_<t)]

    Reference: Ouyang et al. 2022, §3.5, https://arxiv.org/abs/2203.02155.
    Deviation: E_t is the mean over unmasked tokens of the whole batch, not a mean of sequences' means.
    """
    loss = -masked_mean(logprobs, mask)
    return loss, {"tokens": mask.sum()}
