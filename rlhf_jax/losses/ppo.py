"""Proximal policy optimisation: the clipped policy and value losses."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from rlhf_jax.arrays import boolean, check_shapes, ratio, ratio_minus_one, wide
from rlhf_jax.masking import masked_mean
from rlhf_jax.types import Metrics, ScalarLike


def ppo_clip_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    clip_eps: ScalarLike,
) -> tuple[Float[Array, ""], Metrics]:
    """Clipped surrogate policy loss.

        L = E_t[max(−ρₜÂₜ, −clip(ρₜ, 1−ε, 1+ε)Âₜ)],   ρₜ = π(aₜ|sₜ) / π_old(aₜ|sₜ)

    "approx_kl" is Schulman's k₃ of KL(π_old‖π), "clip_fraction" the share of tokens with ρ outside 1 ± ε, whichever
    of the two terms is the larger.
    Reference: Schulman et al. 2017, eq. 7, https://arxiv.org/abs/1707.06347.
    Deviation: E_t is the mean over unmasked tokens of the whole batch. Beyond log ρ = 20 the exponential is continued
    by its tangent (`rlhf_jax.arrays.ratio`), so that neither loss nor gradient overflows.
    Raises ValueError for arrays whose shapes differ.
    """
    check_shapes({"logprobs": logprobs, "old_logprobs": old_logprobs, "advantages": advantages, "mask": mask}, rank=2)
    mask = boolean(mask)
    advantages = jax.lax.stop_gradient(jnp.where(mask, wide(advantages), 0.0))
    # Mask before exp: padding may overflow, and 0 * inf is nan in the backward pass.
    log_ratio = jnp.where(mask, wide(logprobs) - jax.lax.stop_gradient(wide(old_logprobs)), 0.0)
    rho = ratio(log_ratio)
    clipped_rho = jnp.clip(rho, 1.0 - clip_eps, 1.0 + clip_eps)
    loss = masked_mean(jnp.maximum(-advantages * rho, -advantages * clipped_rho), mask)
    return loss, {
        "approx_kl": masked_mean(ratio_minus_one(log_ratio) - log_ratio, mask),
        "clip_fraction": masked_mean((jnp.abs(rho - 1.0) > clip_eps).astype(jnp.float32), mask),
        "ratio": masked_mean(rho, mask),
        "ratio_max": jnp.where(mask, rho, 0.0).max(initial=0.0),
    }


def value_clip_loss(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    clip_eps: ScalarLike,
) -> tuple[Float[Array, ""], Metrics]:
    """Clipped value loss: a new value gains nothing from leaving the old one by more than ε.

        L = ½ E_t[max((Vₜ − Rₜ)², (V_old,ₜ + clip(Vₜ − V_old,ₜ, −ε, ε) − Rₜ)²)]

    Reference: the code of Schulman et al. 2017, as described in Huang et al. 2022, "The 37 implementation details of
    PPO", detail 9, https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/.
    Raises ValueError for arrays whose shapes differ.
    """
    check_shapes({"values": values, "old_values": old_values, "returns": returns, "mask": mask}, rank=2)
    mask = boolean(mask)
    values = jnp.where(mask, wide(values), 0.0)
    old_values = jax.lax.stop_gradient(jnp.where(mask, wide(old_values), 0.0))
    returns = jax.lax.stop_gradient(jnp.where(mask, wide(returns), 0.0))
    clipped = old_values + jnp.clip(values - old_values, -clip_eps, clip_eps)
    squares, clipped_squares = jnp.square(values - returns), jnp.square(clipped - returns)
    loss = 0.5 * masked_mean(jnp.maximum(squares, clipped_squares), mask)
    return loss, {
        "clip_fraction": masked_mean((clipped_squares > squares).astype(jnp.float32), mask),
        "error": masked_mean(jnp.square(values - returns), mask),
    }
