"""Advantages: generalised advantage estimation for PPO, group baselines for GRPO and RLOO.

Results are float32 whatever comes in. Each function raises ValueError for arrays of the wrong shape.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from rlhf_jax.arrays import boolean, check_shapes, wide
from rlhf_jax.types import ScalarLike


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    gamma: ScalarLike,
    lam: ScalarLike,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimation; returns (advantages, returns), both 0 where masked.

        δ_t = r_t + γ V_{t+1} − V_t,   Â_t = δ_t + γλ Â_{t+1},   R_t = Â_t + V_t

    t + 1 is the next unmasked step: a hole in the mask is stepped over as if it were not there. After the last one
    V = Â = 0. Not whitened; no gradient flows through.
    Reference: Schulman et al. 2015, eq. 11 and 16, https://arxiv.org/abs/1506.02438.
    """
    check_shapes({"rewards": rewards, "values": values, "mask": mask}, rank=2)
    mask = boolean(mask)
    rewards, values = jnp.where(mask, wide(rewards), 0.0), jnp.where(mask, wide(values), 0.0)

    def step(carry: tuple[Array, Array], xs: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        next_value, next_advantage = carry
        reward, value, real = xs
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = jnp.where(real, value, next_value), jnp.where(real, advantage, next_advantage)
        return carry, jnp.where(real, advantage, 0.0)

    zero = jnp.zeros_like(values[:, 0])
    _, advantages = jax.lax.scan(step, (zero, zero), (rewards.T, values.T, mask.T), reverse=True)
    return jax.lax.stop_gradient((advantages.T, advantages.T + values))


def group_advantages(rewards: Float[Array, " B"], *, group_size: int, scale_by_std: bool) -> Float[Array, " B"]:
    """Rewards relative to their group: Â_i = r_i − mean(r), over std(r) if `scale_by_std`.

    `rewards` are prompt-major, B = P · group_size. A group of equal rewards gets exactly 0. Raises ValueError when B
    is not a multiple of group_size.
    Reference: Shao et al. 2024, §4.1.2, https://arxiv.org/abs/2402.03300; without the std Liu et al. 2025 (Dr. GRPO),
    https://arxiv.org/abs/2503.20783.
    Deviation: the std, which the paper leaves open, is the population's, and 1e-4 is added to it. TRL, OpenRLHF and
    verl take the sample's, which divides by G − 1: their advantages are √((G−1)/G) of these.
    """
    groups = _groups(rewards, group_size)
    # From the first of each group, where equal rewards are 0: the mean's rounding would not be small over the std.
    groups = groups - groups[:, :1]
    centred = groups - groups.mean(axis=1, keepdims=True)
    if scale_by_std:
        centred = centred / (jnp.sqrt(jnp.square(centred).mean(axis=1, keepdims=True)) + 1e-4)
    return jax.lax.stop_gradient(centred.reshape(-1))


def leave_one_out_advantages(rewards: Float[Array, " B"], *, group_size: int) -> Float[Array, " B"]:
    """Each reward minus the mean of the others in its group: Â_i = r_i − Σ_{j≠i} r_j / (G − 1).

    Raises ValueError for groups of one, or when B is not a multiple of group_size.
    Reference: Ahmadian et al. 2024 (RLOO), eq. 8, https://arxiv.org/abs/2402.14740.
    """
    if group_size < 2:
        raise ValueError(f"leaving one out needs groups of at least 2, not {group_size}")
    groups = _groups(rewards, group_size)
    others = (groups.sum(axis=1, keepdims=True) - groups) / (group_size - 1)
    return jax.lax.stop_gradient((groups - others).reshape(-1))


def running_mean_advantages(
    rewards: Float[Array, " B"], baseline: ScalarLike, *, decay: ScalarLike
) -> tuple[Float[Array, " B"], Float[Array, ""]]:
    """REINFORCE with a baseline that follows the mean reward: (r − b, the next b).

        b ← decay · b + (1 − decay) · mean(r)

    The baseline is that of before these rewards, so the estimate stays unbiased. It needs one answer a prompt.
    Reference: Williams 1992, https://doi.org/10.1007/BF00992696.
    """
    check_shapes({"rewards": rewards}, rank=1)
    rewards = jax.lax.stop_gradient(wide(rewards))
    return rewards - baseline, decay * baseline + (1.0 - decay) * rewards.mean()


def _groups(rewards: Array, group_size: int) -> Array:
    check_shapes({"rewards": rewards}, rank=1)
    if rewards.shape[0] % group_size:
        raise ValueError(f"{rewards.shape[0]} rewards are not a whole number of groups of {group_size}")
    return wide(rewards).reshape(-1, group_size)
