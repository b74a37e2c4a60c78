"""Preference losses without a reward model: DPO and its kin. Log-probabilities are of whole responses, summed.

Results are float32 whatever comes in. Each loss raises ValueError for arrays that are not all [B].
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Num

from rlhf_jax.arrays import check_number_or_row, check_shapes, wide
from rlhf_jax.types import Metrics, ScalarLike

stop = jax.lax.stop_gradient


def dpo_loss(
    chosen_logprobs: Float[Array, " B"],
    rejected_logprobs: Float[Array, " B"],
    ref_chosen_logprobs: Float[Array, " B"],
    ref_rejected_logprobs: Float[Array, " B"],
    *,
    beta: ScalarLike,
    label_smoothing: ScalarLike | Float[Array, " B"] = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
    """Direct preference optimisation.

        L = −E[(1−ε) log σ(βΔ) + ε log σ(−βΔ)],   Δ = log(π/π_ref)(y_w) − log(π/π_ref)(y_l)

    ε = `label_smoothing` is the chance that a label is wrong (conservative DPO): a number, or one a pair [B].
    Reference: Rafailov et al. 2023, eq. 7, https://arxiv.org/abs/2305.18290; Mitchell 2023, eq. 3,
    https://ericmitchell.ai/cdpo.pdf.
    """
    check_number_or_row({"label_smoothing": label_smoothing}, {"chosen_logprobs": chosen_logprobs})
    chosen, rejected = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    logits = beta * (chosen - rejected)
    losses = -(1.0 - label_smoothing) * jax.nn.log_sigmoid(logits) - label_smoothing * jax.nn.log_sigmoid(-logits)
    return losses.mean(), _metrics(beta * chosen, beta * rejected)


def ipo_loss(
    chosen_logprobs: Float[Array, " B"],
    rejected_logprobs: Float[Array, " B"],
    ref_chosen_logprobs: Float[Array, " B"],
    ref_rejected_logprobs: Float[Array, " B"],
    *,
    beta: ScalarLike,
    label_smoothing: ScalarLike | Float[Array, " B"] = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
    """Identity preference optimisation; `beta` is the paper's τ.

        L = E[(1−ε)(Δ − 1/(2β))² + ε(Δ + 1/(2β))²],   Δ = log(π/π_ref)(y_w) − log(π/π_ref)(y_l)

    ε = `label_smoothing` is the chance that a label is wrong, a number or one a pair [B]: the paper's loss in
    expectation over the label, least at Δ = (½ − ε)/β.
    Reference: Azar et al. 2023, eq. 17, https://arxiv.org/abs/2310.12036.
    Deviation: log π is summed over a response, as the equation has it. Libraries (TRL) average it over tokens, and so,
    say the authors, did the experiments of the paper: a τ from there does not transfer.
    """
    check_number_or_row({"label_smoothing": label_smoothing}, {"chosen_logprobs": chosen_logprobs})
    chosen, rejected = _log_ratios(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    difference, aim = chosen - rejected, 1.0 / (2.0 * beta)
    losses = (1.0 - label_smoothing) * jnp.square(difference - aim) + label_smoothing * jnp.square(difference + aim)
    return losses.mean(), _metrics(beta * chosen, beta * rejected)


def simpo_loss(
    chosen_logprobs: Float[Array, " B"],
    rejected_logprobs: Float[Array, " B"],
    chosen_lengths: Num[Array, " B"],
    rejected_lengths: Num[Array, " B"],
    *,
    beta: ScalarLike,
    gamma: ScalarLike,
) -> tuple[Float[Array, ""], Metrics]:
    """Simple preference optimisation: no reference, log-probabilities a token, a target margin γ.

        L = −E[log σ(β log π(y_w)/|y_w| − β log π(y_l)/|y_l| − γ)]

    Lengths are in tokens; a length of 0 counts as 1.
    Reference: Meng et al. 2024, eq. 6, https://arxiv.org/abs/2405.14734.
    """
    chosen, rejected = _averages(chosen_logprobs, rejected_logprobs, chosen_lengths, rejected_lengths)
    chosen, rejected = beta * chosen, beta * rejected
    return -jax.nn.log_sigmoid(chosen - rejected - gamma).mean(), _metrics(chosen, rejected)


def orpo_loss(
    chosen_logprobs: Float[Array, " B"],
    rejected_logprobs: Float[Array, " B"],
    chosen_lengths: Num[Array, " B"],
    rejected_lengths: Num[Array, " B"],
    *,
    beta: ScalarLike,
) -> tuple[Float[Array, ""], Metrics]:
    """Odds-ratio preference optimisation; `beta` is the paper's λ.

        L = E[−log p_w − β log σ(log odds(y_w) − log odds(y_l))],   p = exp(log π(y)/|y|),  odds = p / (1 − p)

    Reference: Hong et al. 2024, eq. 6 and 7, https://arxiv.org/abs/2403.07691.
    Deviation: p is kept below 1 − 1e-6, where its odds would be infinite.
    """
    chosen, rejected = _averages(chosen_logprobs, rejected_logprobs, chosen_lengths, rejected_lengths)

    def log_odds(logp: Array) -> Array:
        logp = jnp.minimum(logp, -1e-6)
        return logp - jnp.log(-jnp.expm1(logp))

    ratio = jax.nn.log_sigmoid(log_odds(chosen) - log_odds(rejected))
    metrics = _metrics(beta * chosen, beta * rejected) | {
        "nll": -chosen.mean(),
        "log_odds_ratio": ratio.mean(),
    }
    return (-chosen - beta * ratio).mean(), metrics


def kto_loss(
    logprobs: Float[Array, " B"],
    ref_logprobs: Float[Array, " B"],
    desirable: Bool[Array, " B"],
    kl: Float[Array, ""],
    *,
    beta: ScalarLike,
    desirable_weight: ScalarLike,
    undesirable_weight: ScalarLike,
) -> tuple[Float[Array, ""], Metrics]:
    """Kahneman-Tversky optimisation, from single responses marked desirable or not.

        L = E[λ_D (1 − σ(β(r − z₀)))] over desirable, E[λ_U (1 − σ(β(z₀ − r)))] over undesirable,   r = log(π/π_ref)(y)

    z₀ = max(`kl`, 0) is an estimate of KL(π‖π_ref) over the batch (the mean of r over mismatched prompts and
    responses); no gradient flows through it. The mean is over the whole batch.
    Reference: Ethayarajh et al. 2024, eq. 8, https://arxiv.org/abs/2402.01306.
    """
    check_shapes({"logprobs": logprobs, "ref_logprobs": ref_logprobs, "desirable": desirable}, rank=1)
    check_shapes({"kl": kl}, rank=0)
    rewards = wide(logprobs) - stop(wide(ref_logprobs))
    baseline = stop(jnp.maximum(wide(kl), 0.0))
    margin = jnp.where(desirable, rewards - baseline, baseline - rewards)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    # 1 - σ(x) = σ(-x), which does not cancel.
    loss = (weight * jax.nn.sigmoid(-beta * margin)).mean()
    return loss, {"kl": baseline, "reward": (beta * rewards).mean()}


def _log_ratios(chosen: Array, rejected: Array, ref_chosen: Array, ref_rejected: Array) -> tuple[Array, Array]:
    """log π/π_ref of the chosen and of the rejected responses."""
    given = {"chosen_logprobs": chosen, "rejected_logprobs": rejected}
    check_shapes(given | {"ref_chosen_logprobs": ref_chosen, "ref_rejected_logprobs": ref_rejected}, rank=1)
    return wide(chosen) - stop(wide(ref_chosen)), wide(rejected) - stop(wide(ref_rejected))


def _averages(chosen: Array, rejected: Array, chosen_lengths: Array, rejected_lengths: Array) -> tuple[Array, Array]:
    """Log-probabilities a token."""
    given = {"chosen_logprobs": chosen, "rejected_logprobs": rejected}
    check_shapes(given | {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}, rank=1)
    chosen, rejected = wide(chosen), wide(rejected)
    return (
        chosen / jnp.maximum(chosen_lengths.astype(chosen.dtype), 1.0),
        rejected / jnp.maximum(rejected_lengths.astype(rejected.dtype), 1.0),
    )


def _metrics(chosen: Array, rejected: Array) -> Metrics:
    """Implicit rewards; a tie counts half."""
    margins = chosen - rejected
    accuracy = jnp.where(margins == 0, 0.5, (margins > 0).astype(jnp.float32))
    return {
        "accuracy": accuracy.mean(),
        "margin": margins.mean(),
        "chosen_reward": chosen.mean(),
        "rejected_reward": rejected.mean(),
    }
