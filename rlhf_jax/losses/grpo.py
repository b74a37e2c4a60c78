"""Policy losses without a critic: one advantage a response, [B], from `rlhf_jax.advantages`.

Estimators of the advantage, objectives, reductions and the KL are independent. An objective is one of the losses here.
`reduce` averages its tokens: `masked_mean` over all of the batch (DAPO), `sequence_mean` over each response first
(GRPO), `constant_mean` over a length that no response has a say in (Dr. GRPO). The KL is in the reward
(`kl_shaped_rewards`), in the loss (`grpo_loss` with a β) or nowhere. `weights` correct for a sampler whose
probabilities are not the trainer's (`truncated_importance_weights`). Each loss raises ValueError for arrays whose
shapes differ.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from rlhf_jax.arrays import boolean, check_leading, check_shapes, ratio, ratio_minus_one, wide
from rlhf_jax.kl import kl_k3
from rlhf_jax.masking import masked_mean
from rlhf_jax.types import Metrics, ScalarLike

Reduce = Callable[[Float[Array, "B T"], Bool[Array, "B T"]], Float[Array, ""]]
"""reduce(x, mask) -> one number: a mean over the True entries."""

stop = jax.lax.stop_gradient


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
    reduce: Reduce = masked_mean,
    weights: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """PPO's clipped surrogate with one advantage a response, and the KL in the loss.

        L = reduce(w max(−ρₜÂ, −clip(ρₜ, 1−ε_low, 1+ε_high)Â) + β k₃(t)),   k₃ = r − 1 − log r,  r = π_ref/π

    Reference: Shao et al. 2024, eq. 3 and 4, https://arxiv.org/abs/2402.03300; the two ε are those of Yu et al. 2025
    (DAPO), eq. 8, https://arxiv.org/abs/2503.14476; w is that of Yao et al. 2025 (truncated importance sampling),
    https://fengyao.notion.site/off-policy-rl.
    Deviation: by default the mean is over the unmasked tokens of the whole batch, as in DAPO, where Shao et al.
    average within each response first (`reduce=sequence_mean`). Beyond log ρ = 20 the exponential is continued by its
    tangent (`rlhf_jax.arrays.ratio`), so that neither loss nor gradient overflows. The mean of the gradient of k₃ is
    that of KL(π_ref‖π), not KL(π‖π_ref).
    """
    mask = _check(logprobs, advantages, mask, {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs}, weights)
    advantages = stop(wide(advantages))[:, None]
    log_rho = _log_ratio(logprobs, old_logprobs, mask)
    rho = ratio(log_rho)
    clipped_rho = jnp.clip(rho, 1.0 - clip_eps_low, 1.0 + clip_eps_high)
    surrogate = _weighted(jnp.maximum(-advantages * rho, -advantages * clipped_rho), weights, mask)
    kl = kl_k3(jnp.where(mask, logprobs, 0.0), stop(jnp.where(mask, ref_logprobs, 0.0)))
    metrics = _metrics(log_rho, mask, clip_eps_low, clip_eps_high)
    return reduce(surrogate + beta * kl, mask), metrics | {"kl": masked_mean(kl, mask)}


def gspo_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, " B"],
    mask: Bool[Array, "B T"],
    *,
    clip_eps_low: ScalarLike,
    clip_eps_high: ScalarLike,
) -> tuple[Float[Array, ""], Metrics]:
    """Group sequence policy optimisation: one ratio a response, clipped as one.

        L = E_i[max(−s_iÂ_i, −clip(s_i, 1−ε_low, 1+ε_high)Â_i)],   s_i = exp(1/|y_i| Σ_t log π/π_old(t))

    The mean is over responses that have tokens. "clip_fraction" is the share of responses with s outside of the clip.
    Reference: Zheng et al. 2025, eq. 5 to 7, https://arxiv.org/abs/2507.18071.
    Deviation: beyond log s = 20 the exponential is continued by its tangent.
    """
    mask = _check(logprobs, advantages, mask, {"old_logprobs": old_logprobs})
    real, advantages = mask.any(axis=1), stop(wide(advantages))
    log_s = masked_mean(_log_ratio(logprobs, old_logprobs, mask), mask, axis=1)
    s = ratio(log_s)
    surrogate = jnp.maximum(-advantages * s, -advantages * jnp.clip(s, 1.0 - clip_eps_low, 1.0 + clip_eps_high))
    return masked_mean(surrogate, real), _metrics(log_s, real, clip_eps_low, clip_eps_high)


def cispo_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, " B"],
    mask: Bool[Array, "B T"],
    *,
    clip_eps_low: ScalarLike,
    clip_eps_high: ScalarLike,
    reduce: Reduce = masked_mean,
) -> tuple[Float[Array, ""], Metrics]:
    """Clipped importance sampling: the weight of a token is clipped, not its gradient away.

        L = reduce(−stop(clip(ρₜ, 1−ε_low, 1+ε_high)) Â log π(t))

    Reference: MiniMax 2025 (MiniMax-M1), eq. 4 and 5, https://arxiv.org/abs/2506.13585, where ε_low is so large that
    only the upper end clips.
    """
    mask = _check(logprobs, advantages, mask, {"old_logprobs": old_logprobs})
    log_rho = stop(_log_ratio(logprobs, old_logprobs, mask))
    weight = jnp.clip(ratio(log_rho), 1.0 - clip_eps_low, 1.0 + clip_eps_high)
    terms = -weight * stop(wide(advantages))[:, None] * jnp.where(mask, wide(logprobs), 0.0)
    return reduce(terms, mask), _metrics(log_rho, mask, clip_eps_low, clip_eps_high)


def reinforce_loss(
    logprobs: Float[Array, "B T"],
    advantages: Float[Array, " B"],
    mask: Bool[Array, "B T"],
    *,
    reduce: Reduce = masked_mean,
    weights: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The plain policy gradient, from answers of the policy itself.

        L = reduce(−w Â log π(t))

    With `leave_one_out_advantages` and a sum over tokens it is RLOO.
    Reference: Williams 1992, https://doi.org/10.1007/BF00992696; Ahmadian et al. 2024, eq. 6 and 8,
    https://arxiv.org/abs/2402.14740.
    """
    mask = _check(logprobs, advantages, mask, {}, weights)
    terms = -stop(wide(advantages))[:, None] * jnp.where(mask, wide(logprobs), 0.0)
    return reduce(_weighted(terms, weights, mask), mask), {"logprob": masked_mean(logprobs, mask)}


def truncated_importance_weights(
    logprobs: Float[Array, "B T"],
    sampler_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    cap: ScalarLike,
    floor: ScalarLike = 0.0,
    drop: bool = False,
) -> Float[Array, "B T"]:
    """Weights of tokens for a sampler that is not the trainer: min(ρ, cap), ρ = π(t)/π_sampler(t); 0 where masked.

    With `drop` a token whose ρ is outside of [floor, cap] has weight 0 (IcePop), else weights are clipped to it. No
    gradient flows through. `logprobs` are the trainer's before its update.
    Reference: Yao et al. 2025, https://fengyao.notion.site/off-policy-rl; Ling team 2025 (IcePop), §3,
    https://arxiv.org/abs/2510.18855.
    Raises ValueError for arrays whose shapes differ.
    """
    check_shapes({"logprobs": logprobs, "sampler_logprobs": sampler_logprobs, "mask": mask}, rank=2)
    mask = boolean(mask)
    rho = ratio(_log_ratio(logprobs, sampler_logprobs, mask))
    weights = jnp.where((rho >= floor) & (rho <= cap), rho, 0.0) if drop else jnp.clip(rho, floor, cap)
    return stop(jnp.where(mask, weights, 0.0))


def _check(
    logprobs: Array, advantages: Array, mask: Array, others: dict[str, Array], weights: Array | None = None
) -> Array:
    """The mask as booleans. Raises ValueError for shapes that differ."""
    given = {"logprobs": logprobs, "mask": mask} | others
    check_shapes(given if weights is None else given | {"weights": weights}, rank=2)
    check_leading({"advantages": advantages}, {"logprobs": logprobs})
    return boolean(mask)


def _log_ratio(logprobs: Array, old_logprobs: Array, mask: Array) -> Array:
    # Mask before exp: padding may overflow, and 0 * inf is nan in the backward pass.
    return jnp.where(mask, wide(logprobs) - stop(wide(old_logprobs)), 0.0)


def _weighted(terms: Array, weights: Array | None, mask: Array) -> Array:
    return terms if weights is None else terms * stop(jnp.where(mask, wide(weights), 0.0))


def _metrics(log_rho: Array, mask: Array, clip_eps_low: ScalarLike, clip_eps_high: ScalarLike) -> Metrics:
    """k₃ of KL(π_old‖π), and the share of ratios outside of the clip."""
    rho = ratio(log_rho)
    clipped = (rho < 1.0 - clip_eps_low) | (rho > 1.0 + clip_eps_high)
    return {
        "approx_kl": stop(masked_mean(ratio_minus_one(log_rho) - log_rho, mask)),
        "clip_fraction": masked_mean(clipped.astype(jnp.float32), mask),
    }
