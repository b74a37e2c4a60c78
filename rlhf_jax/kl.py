"""KL to a reference, per token: estimators from samples, the exact value, rewards shaped by it, its controller.

Results are float32 whatever comes in. Each function raises ValueError for arrays whose shapes differ.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from rlhf_jax.arrays import boolean, check_leading, check_shapes, ratio_minus_one, wide
from rlhf_jax.types import ScalarLike


def kl_k1(logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """k₁ = log π − log π_ref: unbiased for KL(π‖π_ref) under samples of π, of either sign.

    Reference: Schulman 2020, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html.
    """
    return _log_ratio(logprobs, ref_logprobs)


def kl_k2(logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """k₂ = ½ (log π − log π_ref)²: biased, low variance, never negative; its gradient is that of the KL.

    Reference: Schulman 2020, http://joschu.net/blog/kl-approx.html.
    """
    return 0.5 * jnp.square(_log_ratio(logprobs, ref_logprobs))


def kl_k3(logprobs: Float[Array, "B T"], ref_logprobs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """k₃ = r − 1 − log r, r = π_ref/π: unbiased for KL(π‖π_ref) under samples of π, never negative.

    As a loss it is another thing than as an estimate: with the samples held fixed, the mean of its gradient is that of
    KL(π_ref‖π), not that of KL(π‖π_ref), which k₂ has.
    Reference: Schulman 2020, http://joschu.net/blog/kl-approx.html.
    Deviation: beyond log r = 20 the exponential is continued by its tangent, so that neither it nor its gradient
    overflows.
    """
    log_ratio = -_log_ratio(logprobs, ref_logprobs)
    return ratio_minus_one(log_ratio) - log_ratio


def _log_ratio(logprobs: Array, ref_logprobs: Array) -> Array:
    check_shapes({"logprobs": logprobs, "ref_logprobs": ref_logprobs})
    return wide(logprobs) - wide(ref_logprobs)


def kl_exact(logits: Float[Array, "B T V"], ref_logits: Float[Array, "B T V"]) -> Float[Array, "B T"]:
    """KL(π‖π_ref) = Σᵥ πᵥ (log πᵥ − log π_refᵥ) at each step. A token that π never emits counts for nothing."""
    check_shapes({"logits": logits, "ref_logits": ref_logits})
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    ref_logprobs = jax.nn.log_softmax(ref_logits.astype(jnp.float32), axis=-1)
    probs = jnp.exp(logprobs)
    emitted = probs > 0
    # Mask before subtracting: -inf - -inf is nan.
    difference = jnp.where(emitted, logprobs, 0.0) - jnp.where(emitted, ref_logprobs, 0.0)
    return (probs * difference).sum(axis=-1)


def kl_shaped_rewards(
    scores: Float[Array, " B"],
    logprobs: Float[Array, "B T"],
    ref_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    beta: ScalarLike,
) -> Float[Array, "B T"]:
    """Per-token rewards: r_t = −β k₁(t) on every unmasked token, + score on the last of each row.

        Σ_t r_t = r(x, y) − β log(π(y|x) / π_ref(y|x))

    A row with nothing unmasked gets nothing. No gradient flows through rewards.
    Reference: Ziegler et al. 2019, §2, https://arxiv.org/abs/1909.08593; Ouyang et al. 2022, eq. 2.
    """
    check_shapes({"logprobs": logprobs, "ref_logprobs": ref_logprobs, "mask": mask}, rank=2)
    check_leading({"scores": scores}, {"logprobs": logprobs})
    mask = boolean(mask)
    kl = kl_k1(jnp.where(mask, logprobs, 0.0), jnp.where(mask, ref_logprobs, 0.0))
    remaining = jnp.flip(jnp.cumsum(jnp.flip(mask, axis=1), axis=1), axis=1)
    is_last = mask & (remaining == 1)
    rewards = -beta * kl + jnp.where(is_last, wide(scores)[:, None], 0.0)
    return jax.lax.stop_gradient(rewards)


def adaptive_beta(
    beta: ScalarLike,
    observed_kl: ScalarLike,
    *,
    target_kl: ScalarLike,
    horizon: ScalarLike,
    batch_size: ScalarLike,
) -> Float[Array, ""]:
    """Proportional controller that holds the KL of a response, in nats, near `target_kl`.

        e = clip((KL − KL_target) / KL_target, −0.2, 0.2),   β ← max(0, β (1 + e · batch_size / horizon))

    Reference: Ziegler et al. 2019, §2.2, https://arxiv.org/abs/1909.08593, where batch_size / horizon is K_β = 0.1
    an update; written through a horizon in responses as in its code, so that it does not depend on the batch.
    """
    error = jnp.clip((observed_kl - target_kl) / target_kl, -0.2, 0.2)
    return jnp.asarray(jnp.maximum(0.0, beta * (1.0 + error * batch_size / horizon)), jnp.float32)
