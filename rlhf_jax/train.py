"""From a loss to a training step: optimiser, scoring of tokens, the step, and PPO's epochs of minibatches."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from jaxtyping import Array, Float, PRNGKeyArray

from rlhf_jax.batches import Experience, Tokens
from rlhf_jax.data.tokens import take
from rlhf_jax.logprobs import chunked_logprobs, chunked_logprobs_and_entropy
from rlhf_jax.losses import chunked_sft_loss
from rlhf_jax.models import ScalarModel, Transformer, head_kernel, last_token_rewards

Params = Any
Metrics = dict[str, Array]
State = TypeVar("State")
LossFn = Callable[[Params, Any], tuple[Array, Metrics]]
"""loss_fn(params, batch) -> (loss, metrics)"""

HEAD_CHUNK = 64  # Columns of time whose logits exist at once.


def make_optimizer(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float = 0.0, max_grad_norm: float = 1.0
) -> optax.GradientTransformation:
    """AdamW (β₂ = 0.95, decoupled weight decay on matrices only) after clipping by global norm."""
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(
            learning_rate,
            b2=0.95,
            weight_decay=weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(_decays, params),
        ),
    )


def _decays(path: tuple[Any, ...], param: Array) -> bool:
    """Matrices; scanned layers stack norms and biases into what looks like one."""
    name = getattr(path[-1], "key", None) if path else None
    return param.ndim > 1 and name not in ("scale", "bias")


def cosine_decay(learning_rate: float, steps: int, *, warmup: float = 0.02) -> optax.Schedule:
    """Linear warm-up over the share `warmup` of `steps`, then a cosine to zero."""
    return optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(1, int(warmup * steps)), max(2, steps))


def make_state(model: Any, params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A TrainState whose arrays are its own, so that it may be donated while `params` lives on."""
    return TrainState.create(apply_fn=model.apply, params=jax.tree.map(jnp.copy, params), tx=optimizer)


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


def make_train_step(loss_fn: LossFn) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """One optimiser step, compiled; the state is donated."""

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **metrics}
        return state.apply_gradients(grads=grads), metrics

    return train_step


def ppo_update(
    step: Callable[[State, Any], tuple[State, Metrics]],
    state: State,
    experience: Experience,
    extra: Any,
    key: PRNGKeyArray,
    *,
    epochs: int,
    minibatches: int,
) -> tuple[State, Metrics]:
    """Several epochs of shuffled minibatches as one lax.scan; returns the metrics of each, [epochs · minibatches].

    step((policy, critic), (minibatch, extra minibatch)) -> (states, metrics). `extra` is a pytree of arrays
    [epochs · minibatches, …] that goes along with the minibatches (pretraining data for PPO-ptx), or None.
    The rows must divide evenly: raises ValueError.
    """
    rows = experience.old_logprobs.shape[0]
    if rows % minibatches:
        raise ValueError(f"{rows} responses cannot be cut into {minibatches} equal minibatches")
    order = jnp.concatenate([jax.random.permutation(k, rows) for k in jax.random.split(key, epochs)])
    order = order.reshape(epochs * minibatches, rows // minibatches)

    def minibatch(state: State, xs: tuple[Array, Any]) -> tuple[State, Metrics]:
        chosen, extra_batch = xs
        return step(state, (take(experience, chosen), extra_batch))

    return jax.lax.scan(minibatch, state, (order, extra))
