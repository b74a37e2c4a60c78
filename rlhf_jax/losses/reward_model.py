"""Reward models from human comparisons: pairs and rankings.

Results are float32 whatever comes in. Each loss raises ValueError for arrays whose shapes differ.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from rlhf_jax.arrays import boolean, check_number_or_row, check_shapes, wide
from rlhf_jax.masking import masked_mean, masked_sum
from rlhf_jax.types import Metrics, ScalarLike


def bradley_terry_loss(
    chosen_rewards: Float[Array, " B"],
    rejected_rewards: Float[Array, " B"],
    *,
    margin: ScalarLike | Float[Array, " B"] = 0.0,
    label_smoothing: ScalarLike | Float[Array, " B"] = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
    """Negative log-likelihood of the preferences under Bradley-Terry.

        L = −E[(1−ε) log σ(Δ − m) + ε log σ(−Δ − m)],   Δ = r(x, y_w) − r(x, y_l)

    `margin` m is a number or one a pair [B]. ε = `label_smoothing` is the chance that a label is wrong, a number or
    one a pair [B]: then the other response is the better one, by the same margin. A tie counts half in the accuracy.
    Reference: Ouyang et al. 2022, eq. 1 with K = 2, https://arxiv.org/abs/2203.02155; the margin is that of Touvron
    et al. 2023 (Llama 2), eq. 2, https://arxiv.org/abs/2307.09288; ε as in Mitchell 2023, eq. 3,
    https://ericmitchell.ai/cdpo.pdf.
    """
    check_shapes({"chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards}, rank=1)
    check_number_or_row({"margin": margin, "label_smoothing": label_smoothing}, {"chosen_rewards": chosen_rewards})
    difference = wide(chosen_rewards) - wide(rejected_rewards)
    right, wrong = jax.nn.log_sigmoid(difference - margin), jax.nn.log_sigmoid(-difference - margin)
    loss = -((1.0 - label_smoothing) * right + label_smoothing * wrong).mean()
    return loss, {"accuracy": _correct(difference).mean(), "reward_difference": difference.mean()}


def ranking_loss(
    rewards: Float[Array, "B K"],
    ranks: Int[Array, "B K"],
    mask: Bool[Array, "B K"],
    *,
    margin: ScalarLike | Float[Array, " B"] = 0.0,
    label_smoothing: ScalarLike | Float[Array, " B"] = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
    """Bradley-Terry over all pairs of a prompt's K ranked responses, as one batch element.

        L = −E_x[ (1 / C(K,2)) Σ_{w ≻ l} (1−ε) log σ(Δ − m) + ε log σ(−Δ − m) ],   Δ = r(x, y_w) − r(x, y_l)

    Rank 0 is best; equal ranks form no pair. `margin` m and ε = `label_smoothing`, the chance that the order of a
    pair is wrong, are each a number or one a prompt [B], the same for each of its pairs. With ε = 1 − p the labels are
    soft: that y_w is the better one has probability p. The mean is over a prompt's pairs, then over prompts that have
    any.
    Reference: Ouyang et al. 2022, eq. 1, https://arxiv.org/abs/2203.02155; the margin is that of Touvron et al. 2023
    (Llama 2), eq. 2, https://arxiv.org/abs/2307.09288; soft labels are those of Bai et al. 2022, §4.3,
    https://arxiv.org/abs/2212.08073.
    """
    check_shapes({"rewards": rewards, "ranks": ranks, "mask": mask}, rank=2)
    check_number_or_row({"margin": margin, "label_smoothing": label_smoothing}, {"rewards": rewards})
    mask = boolean(mask)
    rewards = jnp.where(mask, wide(rewards), 0.0)
    difference = rewards[:, :, None] - rewards[:, None, :]
    pairs = _pairs(ranks, mask)
    has_pairs = pairs.any(axis=(1, 2))
    m, doubt = (jnp.reshape(wide(jnp.asarray(x)), (-1, 1, 1)) for x in (margin, label_smoothing))
    right, wrong = jax.nn.log_sigmoid(difference - m), jax.nn.log_sigmoid(-difference - m)
    likelihood = (1.0 - doubt) * right + doubt * wrong
    loss = -masked_mean(likelihood, pairs, axis=(1, 2))
    accuracy = masked_mean(_correct(difference), pairs, axis=(1, 2))
    return masked_mean(loss, has_pairs), {
        "accuracy": masked_mean(accuracy, has_pairs),
        "reward_difference": masked_mean(difference, pairs),
    }


def ranking_counts(ranks: Int[Array, "B K"], mask: Bool[Array, "B K"]) -> dict[str, Int[Array, ""]]:
    """How many prompts `ranking_loss` is the mean over, and how many pairs its "reward_difference"."""
    pairs = _pairs(ranks, boolean(mask))
    return {"loss": pairs.any(axis=(1, 2)).sum(), "reward_difference": pairs.sum()}


def plackett_luce_loss(
    rewards: Float[Array, "B K"], ranks: Int[Array, "B K"], mask: Bool[Array, "B K"]
) -> tuple[Float[Array, ""], Metrics]:
    """Negative log-likelihood of whole rankings: the best is chosen among all, the next among the rest, …

        L = −E_x[ Σ_k log( exp r_(k) / Σ_{j ≥ k} exp r_(j) ) ],   (k) the response of rank k

    With K = 2 it is Bradley-Terry. Responses of equal rank do not compete with each other: each is chosen among
    itself and those ranked below it. The mean is over prompts with at least one response.
    Reference: Plackett 1975; as a loss for reward models Rafailov et al. 2023, eq. 18 (appendix A.3),
    https://arxiv.org/abs/2305.18290.
    """
    check_shapes({"rewards": rewards, "ranks": ranks, "mask": mask}, rank=2)
    mask = boolean(mask)
    rewards = jnp.where(mask, wide(rewards), 0.0)
    below = (ranks[:, :, None] < ranks[:, None, :]) | jnp.eye(rewards.shape[1], dtype=bool)[None]
    below = below & mask[:, None, :]
    # A masked row of `below` may be empty; 0 keeps its log-sum-exp, and so its gradient, finite.
    rivals = jnp.where(below | ~below.any(axis=2, keepdims=True), rewards[:, None, :], -jnp.inf)
    logprobs = rewards - jax.nn.logsumexp(rivals, axis=2)
    loss = -masked_sum(logprobs, mask, axis=1)
    has_any = mask.any(axis=1)
    difference = rewards[:, :, None] - rewards[:, None, :]
    pairs = _pairs(ranks, mask)
    accuracy = masked_mean(_correct(difference), pairs, axis=(1, 2))
    return masked_mean(loss, has_any), {"accuracy": masked_mean(accuracy, pairs.any(axis=(1, 2)))}


def _pairs(ranks: Array, mask: Array) -> Array:
    return (ranks[:, :, None] < ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]


def _correct(difference: Array) -> Array:
    return jnp.where(difference == 0, 0.5, (difference > 0).astype(jnp.float32))
