"""Ensembles of reward models: one reward from the scores of k members, or from their weights.

Scores are [k, B]: of B answers by each of k members. Each combination is traceable, so that an iteration of PPO stays
one compiled program. An ensemble of one is that model. The scores of members that were trained apart have no zero in
common: the bias of each should be set on the same answers, as `experiments/reward_model.py` sets it on demonstrations.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax.arrays import check_shapes, wide
from rlhf_jax.batches import Rankings, Tokens
from rlhf_jax.models import ModelConfig, ScalarModel, merge_lora
from rlhf_jax.rewards.model import model_reward
from rlhf_jax.rewards.reward import Reward
from rlhf_jax.scoring import response_rewards
from rlhf_jax.types import Params, ScalarLike

Combination = Literal["mean", "min", "lower", "uwo", "weights"]
"""How k members become one reward: by one of the functions here, or by `average_params`."""


def ensemble_mean(scores: Float[Array, "k B"]) -> Float[Array, " B"]:
    """(1/k) Σᵢ Rᵢ.

    Reference: Coste et al. 2023, mean optimisation, https://arxiv.org/abs/2310.02743.
    """
    check_shapes({"scores": scores}, rank=2)
    return wide(scores).mean(axis=0)


def ensemble_min(scores: Float[Array, "k B"]) -> Float[Array, " B"]:
    """minᵢ Rᵢ: worst-case optimisation (WCO), which trusts an answer as far as every member does.

    Reference: Coste et al. 2023, https://arxiv.org/abs/2310.02743.
    """
    check_shapes({"scores": scores}, rank=2)
    return wide(scores).min(axis=0)


def ensemble_uwo(scores: Float[Array, "k B"], *, lam: ScalarLike) -> Float[Array, " B"]:
    """Uncertainty-weighted optimisation (UWO): the mean minus λ times the variance over members.

        (1/k) Σᵢ Rᵢ − λ (1/k) Σᵢ (Rᵢ − (1/k) Σⱼ Rⱼ)²

    Reference: Coste et al. 2023, https://arxiv.org/abs/2310.02743.
    """
    return ensemble_mean(scores) - lam * _variance(scores)


def ensemble_lower(scores: Float[Array, "k B"], *, lam: ScalarLike) -> Float[Array, " B"]:
    """The mean minus λ standard deviations over members, in the units of a score: a lower confidence bound.

    Reference: Coste et al. 2023, https://arxiv.org/abs/2310.02743.
    Deviation: they subtract the variance (`ensemble_uwo`), whose weight depends on the scale of the scores.
    """
    return ensemble_mean(scores) - lam * ensemble_spread(scores)


def ensemble_spread(scores: Float[Array, "k B"]) -> Float[Array, " B"]:
    """The standard deviation over members, ((1/k) Σᵢ (Rᵢ − mean)²)^½: where it is large a label says most.

    Its gradient is 0 where all members agree.
    """
    variance = _variance(scores)
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)


def label_value(scores: Float[np.ndarray, "k P K"]) -> Float[np.ndarray, " P"]:
    """How much a label of each prompt's K answers would say, from k members' scores of them: more is less certain.

    Of several members the standard deviation over members of the difference of two answers, the mean over pairs: where
    they disagree. Of one member minus the mean of |difference|: where it finds the answers alike.
    """
    first, second = np.triu_indices(scores.shape[2], 1)
    differences = scores[..., first] - scores[..., second]
    found = differences.std(axis=0) if len(scores) > 1 else -np.abs(differences[0])
    return found.mean(axis=-1)


def stack_params(members: Sequence[Params]) -> Params:
    """The parameters of k members of one shape, each leaf with a first axis of k.

    Raises ValueError without members, and where one has another shape than the first.
    """
    _check_alike(members)
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *members)


def average_params(members: Sequence[Params]) -> Params:
    """One model whose weights are the means over members (WARM), in the members' dtypes.

        φ = (1/k) Σᵢ φᵢ

    For members that started from the same weights. Adapters are to be merged before: the mean of products AB is not
    the product of means. Raises ValueError without members, and where one has another shape than the first.
    Reference: Ramé et al. 2024, https://arxiv.org/abs/2401.12187.
    Deviation: there the members' heads start alike, too; `experiments/reward_model.py` gives each a head of its own.
    """
    _check_alike(members)

    def average(*leaves: Array) -> Array:
        total: Array = sum(jnp.asarray(leaf, jnp.float32) for leaf in leaves)  # type: ignore[assignment]
        return (total / len(leaves)).astype(leaves[0].dtype)

    return jax.tree.map(average, *members)


def member_scores(model: ScalarModel, stacked: Params, tokens: Tokens) -> Float[Array, "k B"]:
    """Each member's score of each response, in one pass over `stack_params` of the members. Traceable."""
    return jax.vmap(partial(response_rewards, model), in_axes=(0, None))(stacked, tokens)


def combination(combine: Combination, lam: ScalarLike) -> Callable[[Float[Array, "k B"]], Float[Array, " B"]]:
    """The function of scores by its name; λ is used by "lower" and "uwo". Raises ValueError for "weights"."""
    if combine == "weights":
        raise ValueError("weights are averaged before there are scores: average_params")
    if combine == "lower":
        return partial(ensemble_lower, lam=lam)
    if combine == "uwo":
        return partial(ensemble_uwo, lam=lam)
    return ensemble_mean if combine == "mean" else ensemble_min


def ensemble_reward(
    config: ModelConfig,
    members: Sequence[Params],
    *,
    combine: Combination,
    lam: ScalarLike,
    name: str,
    weight: float,
) -> Reward:
    """k reward models of one config as one reward that reads the policy's own tokens. Traceable.

    `members` are a ScalarModel's parameters; adapters are merged, so that each member is a whole model. Where a member
    has diverged the score is inf, whatever the others say. Raises ValueError as `stack_params`.
    """
    whole = [merge_lora(member) for member in members]
    if combine == "weights":
        return model_reward(config, average_params(whole), name=name, weight=weight)
    scores = partial(_combined_scores, ScalarModel(config), combination(combine, lam))
    return Reward(name, weight, on_tokens=scores, params=stack_params(whole))


def ensemble_metrics(scores: Float[np.ndarray, "k N"], heldout: Rankings) -> dict[str, float]:
    """How far k members disagree on held-out pairs, from each one's scores of all their answers, row by row.

    "disagreement" is the share of pairs on which two members prefer different answers, over every two members.
    "spread" is the standard deviation over members of the difference of a pair's scores; the mean over pairs.
    """
    by_pair = scores.reshape(len(scores), *heldout.ranks.shape)
    rows, ranks = np.arange(len(heldout.ranks)), np.asarray(heldout.ranks)
    margins = by_pair[:, rows, ranks.argmin(axis=1)] - by_pair[:, rows, ranks.argmax(axis=1)]
    first, second = np.triu_indices(len(scores), 1)
    differ = np.sign(margins)[first] != np.sign(margins)[second]
    return {"disagreement": float(differ.mean()) if differ.size else 0.0, "spread": float(margins.std(axis=0).mean())}


def _combined_scores(
    model: ScalarModel,
    combine: Callable[[Float[Array, "k B"]], Float[Array, " B"]],
    stacked: Params,
    tokens: Tokens,
) -> Float[Array, " B"]:
    """A NaN says that a reward does not apply; a member that has diverged must not pass for that."""
    scores = member_scores(model, stacked, tokens)
    return jnp.where(jnp.isfinite(scores).all(axis=0), combine(scores), jnp.inf)


def _variance(scores: Float[Array, "k B"]) -> Float[Array, " B"]:
    check_shapes({"scores": scores}, rank=2)
    return wide(scores).var(axis=0)


def _check_alike(members: Sequence[Params]) -> None:
    if not members:
        raise ValueError("an ensemble needs at least one member")
    first, *others = [jax.tree.map(jnp.shape, member) for member in members]
    for number, shape in enumerate(others, 2):
        if shape != first:
            raise ValueError(f"member {number} has another shape than the first")
