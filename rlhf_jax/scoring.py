"""Forward passes over `Tokens`: log-probabilities, entropy, values, rewards. None has a [B, T, V] array."""

from jaxtyping import Array, Float

from rlhf_jax.batches import Tokens
from rlhf_jax.logprobs import chunked_logprobs, chunked_logprobs_and_entropy, sequence_logprobs
from rlhf_jax.losses import chunked_sft_loss
from rlhf_jax.models import ScalarModel, Transformer, head_kernel, last_token_rewards
from rlhf_jax.types import Metrics, Params

HEAD_CHUNK = 64  # Columns of time whose logits exist at once.


def hidden_states(model: Transformer, params: Params, tokens: Tokens) -> Float[Array, "B T D"]:
    """What the heads read at each input."""
    return model.apply({"params": params}, tokens.inputs, tokens.positions, tokens.segment_ids, method="hidden_states")


def response_logprobs(
    model: Transformer, params: Params, tokens: Tokens, *, temperature: float = 1.0
) -> Float[Array, "B T"]:
    """Log-probability of every target in the mask; the head reads nothing else, and [B, T, V] never exists."""
    return chunked_logprobs(
        hidden_states(model, params, tokens), head_kernel(params), tokens.targets, chunk_size=HEAD_CHUNK,
        mask=tokens.mask, softcap=model.config.final_softcap, temperature=temperature,
    )  # fmt: skip


def answer_logprobs(model: Transformer, params: Params, tokens: Tokens) -> Float[Array, " B"]:
    """log π(y|x) of each response: what DPO and its kin compare."""
    return sequence_logprobs(response_logprobs(model, params, tokens), tokens.mask)


def token_scores(
    model: Transformer, params: Params, tokens: Tokens, *, temperature: float = 1.0
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """As `response_logprobs`, with the entropy of each distribution beside it, at a temperature.

    The [B, T, V] logits never exist at once.
    """
    return chunked_logprobs_and_entropy(
        hidden_states(model, params, tokens), head_kernel(params), tokens.targets, chunk_size=HEAD_CHUNK,
        mask=tokens.mask, softcap=model.config.final_softcap, temperature=temperature,
    )  # fmt: skip


def sft_objective(model: Transformer, params: Params, tokens: Tokens) -> tuple[Float[Array, ""], Metrics]:
    """`sft_loss` of the responses, its gradient computed along with the logits."""
    return chunked_sft_loss(
        hidden_states(model, params, tokens), head_kernel(params), tokens.targets, tokens.mask,
        chunk_size=HEAD_CHUNK, softcap=model.config.final_softcap,
    )  # fmt: skip


def token_values(model: ScalarModel, params: Params, tokens: Tokens) -> Float[Array, "B T"]:
    """V(inputs_≤t): the scalar head at each token."""
    return model.apply({"params": params}, tokens.inputs, tokens.positions, tokens.segment_ids)


def response_rewards(model: ScalarModel, params: Params, tokens: Tokens) -> Float[Array, " B"]:
    """A reward model's score of each response, read at its last token."""
    return last_token_rewards(token_values(model, params, tokens), tokens.mask)
