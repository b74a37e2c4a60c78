"""Group relative policy optimisation."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from rlhf_jax.arrays import boolean, check_leading, check_shapes, ratio, ratio_minus_one, wide
from rlhf_jax.kl import kl_k3
from rlhf_jax.masking import masked_mean
from rlhf_jax.types import Metrics, ScalarLike


def grpo_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    ref_logprobs: Float[Array, "B T"],
    advantages: Float[Array, " B"],
    mask: Bool[Array, "B T"],
    *,
    clip_eps_low: ScalarLike,
    clip_eps_high: ScalarLike,
    beta: ScalarLike,
) -> tuple[Float[Array, ""], Metrics]:
    """PPO's clipped surrogate with one advantage a response, and the KL in the loss.

        L = E_t[max(−ρₜÂ, −clip(ρₜ, 1−ε_low, 1+ε_high)Â) + β k₃(t)],   k₃ = r − 1 − log r,  r = π_ref/π

    Reference: Shao et al. 2024, eq. 3 and 4, https://arxiv.org/abs/2402.03300; the two ε are those of Yu et al. 2025
    (DAPO), eq. 8, https://arxiv.org/abs/2503.14476.
    Deviation: E_t is the mean over unmasked tokens of the whole batch, as in DAPO, where Shao et al. average within
    each response first. Beyond log ρ = 20 the exponential is continued by its tangent (`rlhf_jax.arrays.ratio`), so
    that neither loss nor gradient overflows. The mean of the gradient of k₃ is that of KL(π_ref‖π), not KL(π‖π_ref).
    Raises ValueError for arrays whose shapes differ.
    """
    check_shapes(
        {"logprobs": logprobs, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "mask": mask}, rank=2
    )
    check_leading({"advantages": advantages}, {"logprobs": logprobs})
    stop, mask = jax.lax.stop_gradient, boolean(mask)
    advantages = stop(wide(advantages))[:, None]
    # Mask before exp: padding may overflow, and 0 * inf is nan in the backward pass.
    log_ratio = jnp.where(mask, wide(logprobs) - stop(wide(old_logprobs)), 0.0)
    rho = ratio(log_ratio)
    clipped_rho = jnp.clip(rho, 1.0 - clip_eps_low, 1.0 + clip_eps_high)
    surrogate = jnp.maximum(-advantages * rho, -advantages * clipped_rho)
    kl = kl_k3(jnp.where(mask, logprobs, 0.0), stop(jnp.where(mask, ref_logprobs, 0.0)))
    clipped = (rho < 1.0 - clip_eps_low) | (rho > 1.0 + clip_eps_high)
    return masked_mean(surrogate + beta * kl, mask), {
        "approx_kl": masked_mean(ratio_minus_one(log_ratio) - log_ratio, mask),
        "clip_fraction": masked_mean(clipped.astype(jnp.float32), mask),
        "kl": masked_mean(kl, mask),
    }
