"""The models of PPO: a policy and a critic that are trained, a reference and rewards that are not.

They may be four models with weights of their own, or adapters and heads over one trunk.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from jaxtyping import Array, Float, PRNGKeyArray

from rlhf_jax.adapters import is_complete, over_trunk
from rlhf_jax.batches import Tokens
from rlhf_jax.models import ModelConfig, ScalarModel, Transformer, from_language_model, merge_lora, split_lora
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.rewards.reward import Reward, check_rewards, params_of
from rlhf_jax.sampling.ends import EosId
from rlhf_jax.sharding import shard_params
from rlhf_jax.train import make_state
from rlhf_jax.types import Params, ScalarLike


class State(NamedTuple):
    """The state of training."""

    policy: TrainState
    critic: TrainState
    beta: Float[Array, ""]


class Frozen(NamedTuple):
    """The arrays that training only reads.

    Where weights are shared, `trunk` has them once and each role's tree lies over it (`over_trunk`): adapters and
    heads of policy, critic and reward model, and {} for the reference.
    """

    reference: Params
    rewards: dict[str, Params]
    """The parameters of the rewards that are models, by name."""
    demonstrations: Tokens | None
    """Demonstrations for PPO-ptx."""
    trunk: Params = {}  # noqa: RUF012
    critic_trunk: Params | None = None
    """The frozen weights of a critic of another shape than the policy."""

    def over_trunk(self, own: Params) -> Params:
        """A role's parameters."""
        return over_trunk(self.trunk, own)

    def critic(self, own: Params) -> Params:
        """The critic's parameters."""
        return over_trunk(self.trunk if self.critic_trunk is None else self.critic_trunk, own)


class Setup(NamedTuple):
    """The models and numbers that are compiled into the program: they are not arrays and do not change."""

    policy: Transformer
    critic: ScalarModel
    rewards: tuple[Reward, ...]
    max_new_tokens: int
    eos_id: EosId
    """The token that ends an answer, or several that each do."""
    pad_id: int


def start_actor_critic(
    base: Pretrained,
    rewards: Sequence[Reward],
    key: PRNGKeyArray,
    *,
    split: Callable[[Params, PRNGKeyArray], tuple[Params, Params]],
    adapters: bool,
    optimizer: optax.GradientTransformation,
    beta: ScalarLike,
    max_new_tokens: int,
    critic: tuple[ModelConfig, Params] | None = None,
    reference: Params | None = None,
    demonstrations: Tokens | None = None,
) -> tuple[Setup, State, Frozen]:
    """The models at the start of training. The critic starts from a reward model, or from the policy with a new head.

    `split(params, key)` returns (frozen, trainable). With `adapters` the trainable parameters are adapters of policy
    and critic. Policy and critic then share the policy's weights with each reward model that is an adapter over them;
    other reward models and critics have weights of their own. The reference is by default the policy at the start.
    Raises UserError without any reward.
    """
    check_rewards(rewards)
    head_key, critic_key = (jax.random.fold_in(key, number) for number in (1, 2))
    config, critic_params = critic or (base.config, from_language_model(base.params, head_key, base.config))
    setup = Setup(
        Transformer(base.config), ScalarModel(config), tuple(reward._replace(params=None) for reward in rewards),
        max_new_tokens, base.eos_id, base.pad_id,
    )  # fmt: skip
    trunk, policy = split(base.params, key)
    own = {name: own_part(params, adapters) for name, params in params_of(rewards).items()}
    critic_trunk, critic_own = None, own_part(critic_params, adapters)
    if adapters and is_complete(critic_own):
        with_trunk, critic_own = split(critic_own, critic_key)
        critic_trunk = None if critic is None else with_trunk["trunk"]
    if reference is None:
        reference = {} if adapters else base.params
    frozen = Frozen(reference, own, demonstrations, trunk, critic_trunk)
    return setup, init_state(setup, policy, critic_own, optimizer, beta), shard_params(frozen)


def init_state(
    setup: Setup, policy: Params, critic: Params, optimizer: optax.GradientTransformation, beta: ScalarLike
) -> State:
    """The state before the first iteration. `policy` and `critic` are the trainable parameters."""
    return State(
        make_state(setup.policy, shard_params(policy), optimizer),
        make_state(setup.critic, shard_params(critic), optimizer),
        shard_params(jnp.asarray(beta, jnp.float32)),
    )


def own_part(scalar_params: Params, adapters: bool) -> Params:
    """The parameters of a ScalarModel that are not in a shared trunk: adapters and head, or all of them."""
    _, adapter = split_lora(scalar_params["trunk"])
    if adapters and adapter:
        return {"trunk": adapter, "head": scalar_params["head"]}
    return merge_lora(scalar_params)
