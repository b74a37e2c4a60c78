"""The steps that experiments repeat, at published shapes of models: to compile from shapes, or to run on arrays.

`tpu/compile.py` compiles them for TPUs without having any. `accelerator.py` times them on the device it runs on.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState
from jaxtyping import PRNGKeyArray

from experiments import dpo, grpo, ppo, reward_model, sft
from experiments.bench.shapes import MODELS, model_config
from experiments.flags import PRECISIONS, PrecisionName
from rlhf_jax import groups
from rlhf_jax.actor_critic import Frozen, Setup, State
from rlhf_jax.batches import Completions, Experience, Prompts, Rankings, Tokens
from rlhf_jax.data.pairs import AnswerBatch
from rlhf_jax.data.tokens import join
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.groups import Algorithm, Numbers
from rlhf_jax.models import ModelConfig, ScalarModel, Transformer, count_weights, from_language_model
from rlhf_jax.preference import make_step as make_preference_step
from rlhf_jax.rewards.model import model_reward
from rlhf_jax.sampling.queue import read_at_once
from rlhf_jax.sharding import shard_batch
from rlhf_jax.train import make_state
from rlhf_jax.types import Metrics, Params

Experiment = Literal["sft", "reward_model", "dpo", "ppo", "grpo"]
SAMPLING = ("ppo", "grpo")
GROUP = 4
"""GRPO's answers to each prompt."""
Make = Callable[..., Any]
"""make(function, *args): the result of the function; with `jax.eval_shape` only its shapes."""


@dataclass(frozen=True)
class Case:
    """The experiment, its model, and the sizes of a step."""

    experiment: Experiment
    model: str
    """One of the published shapes of experiments/bench/shapes.py."""
    rows: int | None = None
    """Sequences a step (PPO, GRPO: responses an iteration); by default two (four) for each part of data × fsdp."""
    reward_model: str | None = None
    """PPO: the shape of the reward model and of the critic, which begins as it; by default the policy's."""
    slots: int | None = None
    """GRPO: answers that are sampled at once, all groups together; by default all."""
    minibatches: int = 4
    """Minibatches of a PPO iteration, in one epoch. GRPO's has one, and four answers to each prompt."""
    accumulate: int = 1
    """PPO, GRPO: parts of a minibatch whose gradients are added up."""
    prompt: int = 512
    """Tokens of the prompt."""
    response: int = 512
    """Tokens of the response."""
    lora_rank: int = 0
    """Adapters on a frozen trunk; in PPO one trunk for all four models."""
    frozen_dtype: Literal["float32", "bfloat16"] | None = "bfloat16"
    """The dtype of the frozen trunk."""
    precision: PrecisionName = "mixed"
    attention: Literal["auto", "reference"] = "auto"
    """auto: the platform's kernel, where a sequence attends to itself."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range and for a model without a published shape."""
        at_least(self, prompt=1, response=1, minibatches=1, accumulate=1, lora_rank=0)
        if self.rows is not None:
            at_least(self, rows=1)
            if self.experiment in ("reward_model", "dpo") and self.rows % 2:
                raise UserError(f"rows is {self.rows}; answers come in pairs, so it must be even")
            if self.experiment == "grpo" and self.rows % GROUP:
                raise UserError(f"rows is {self.rows}; groups have {GROUP} answers")
        for name in filter(None, (self.model, self.reward_model)):
            if name not in MODELS:
                raise UserError(f"model {name!r} is not one of {', '.join(MODELS)}")
        if self.slots is not None and (self.experiment != "grpo" or self.slots < GROUP or self.slots % GROUP):
            raise UserError(f"--slots {self.slots} are for GRPO, in groups of {GROUP} answers")
        if self.accumulate > 1 and self.experiment not in SAMPLING:
            raise UserError(f"--accumulate is for {' and '.join(SAMPLING)}")
        if self.reward_model and (self.experiment != "ppo" or self.lora_rank):
            raise UserError("--reward-model is for PPO without adapters, whose trunk all models share")


class Program(NamedTuple):
    """A function and its arguments, with floating-point operations by the equations."""

    function: Any
    args: tuple[Any, ...]
    flops: float
    """The model's floating-point operations, without recomputation."""
    decoded: float = 0.0
    """The fewest bytes of memory that all devices together must read while sampling."""
    flags_and_setup: tuple[ppo.PPO, Setup] | None = None
    """The first two arguments of PPO's functions. The program's function is `ppo.iterate` with them."""
    update_flops: float = 0.0
    """Floating-point operations of PPO's update."""
    decoding_steps: int = 0
    """Steps of the sampler, each a token of all answers that are sampled at once."""
    refills: int = 1
    """Times that the queue reads prompts."""


def flops(config: ModelConfig, matrices: int, rows: int, length: int, read: int, *, times: int = 1) -> float:
    """Floating-point operations: two a weight and token, the head at `read` tokens of a row, and causal attention.

    `times`: 1 forward, 3 with the gradients of activations and of weights, 2 where weights are frozen. Attention has
    no weights, but both of its factors have gradients.
    """
    head = config.d_model * config.vocab_size if read else 0
    attention = config.n_layers * config.n_heads * config.head_dim * length  # q·k and weights·v, half of them seen
    return 2.0 * rows * (times * (length * matrices + read * head) + (3 if times > 1 else 1) * length * attention)


def tokens(config: ModelConfig, rows: int, prompt: int, response: int) -> Tokens:
    """Full rows of random tokens. The mask is on the response, which follows the prompt."""
    shape = rows, prompt + response
    inputs = jax.random.randint(jax.random.key(1), shape, 2, config.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
    mask = (positions >= prompt - 1) & (positions < shape[1] - 1)
    return Tokens(inputs, jnp.roll(inputs, -1, 1), mask, positions, jnp.ones(shape, jnp.int32))


def training(
    cfg: sft.SFT | reward_model.RewardModel | dpo.DPO | ppo.PPO | grpo.GRPO, model: Any, params: Params, make: Make
) -> tuple[Any, Any, Any]:
    """(frozen, trainable, state). The state's parameters are copies, because a step may donate their memory."""
    frozen, trainable = make(lambda p: cfg.split_trainable(p, jax.random.key(0)), params)
    return frozen, trainable, make(lambda p: make_state(model, p, cfg.make_optimizer(1000)), trainable)


def ppo_setup(
    config: ModelConfig, *, max_new_tokens: int, eos_id: int, pad_id: int, reward_config: ModelConfig | None = None
) -> Setup:
    """PPO with one reward model, whose name is "reward_model", and a critic of its shape; by default the policy's."""
    reward_config = reward_config or config
    reward = model_reward(reward_config, None, name="reward_model", weight=1.0)
    return Setup(Transformer(config), ScalarModel(reward_config), (reward,), max_new_tokens, eos_id, pad_id)


def score_and_shape(
    cfg: ppo.PPO, setup: Setup, state: State, frozen: Frozen, prompts: Prompts, completions: Completions
) -> tuple[Experience, Metrics]:
    """The part of PPO's iteration between rollout and update."""
    tokens = join(prompts, completions, pad_id=setup.pad_id)
    scores, metrics = ppo.score(cfg, setup, frozen, tokens, completions, {})
    experience, shaped = ppo.shape(cfg, setup, state, frozen, tokens, scores)
    return experience, metrics | shaped


def grpo_iteration(
    algorithm: Algorithm,
    model: Transformer,
    numbers: Numbers,
    policy: TrainState,
    frozen: groups.Frozen,
    prompts: Prompts,
    key: PRNGKeyArray,
) -> tuple[TrainState, Metrics]:
    """Rollout and update of GRPO as one program. An answer's score is a number of its tokens, as if from the host."""
    sample_key, update_key = jax.random.split(key)
    completions = groups.rollout(model, numbers, policy, frozen, prompts, sample_key, eos_id=-1, pad_id=0)
    repeated = shard_batch(jax.tree.map(lambda x: jnp.repeat(x, numbers.group_size, axis=0), prompts))
    scores = (completions.tokens % 7).mean(axis=1, dtype=jnp.float32)
    signal = jnp.ones(scores.shape, bool)
    return groups.learn(
        algorithm, model, numbers, 0, policy, frozen, repeated, completions, scores, signal, update_key
    )


def build(case: Case, make: Make, parts: int = 1, copies: int | None = None) -> Program:
    """The program of a case. `parts` is the size of the mesh's axes data × fsdp together.

    `copies` of the weights are read while answers are sampled; by default as many as there are parts.
    """
    config = replace(model_config(case.model, PRECISIONS[case.precision]), attention=case.attention)
    judge = replace(
        model_config(case.reward_model or case.model, PRECISIONS[case.precision]), attention=case.attention
    )
    model, scalar = Transformer(config), ScalarModel(judge)

    def weights(config: ModelConfig) -> Params:
        return make(lambda: Transformer(config).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"])

    params = weights(config)
    scoring = weights(judge) if case.reward_model else params
    rows, length = case.rows or parts * (4 if case.experiment in SAMPLING else 2), case.prompt + case.response
    frozen_dtype = case.frozen_dtype if case.lora_rank else None
    trained: dict[str, Any] = {"lora_rank": case.lora_rank, "frozen_dtype": frozen_dtype, "learning_rate": 1e-4}
    back = 2 if case.lora_rank else 3  # forward, and the gradients of activations and of weights
    matrices = count_weights(params["layers"])
    once, learned = (flops(config, matrices, rows, length, case.response, times=times) for times in (1, back))
    scored, valued = (
        flops(judge, count_weights(scoring["layers"]), rows, length, 0, times=times) for times in (1, back)
    )

    def batch() -> Tokens:
        return tokens(config, rows, case.prompt, case.response)

    if case.experiment == "sft":
        sft_cfg = sft.SFT(**trained)
        frozen, _, state = training(sft_cfg, model, params, make)
        step = sft.make_step(sft_cfg, config, jax.random.key(0))
        return Program(step, (state, make(batch), frozen, make(lambda: jnp.zeros((), jnp.int32))), learned)
    if case.experiment == "dpo":
        dpo_cfg = dpo.DPO(**trained)
        frozen, _, state = training(dpo_cfg, model, params, make)
        good = make(
            lambda: AnswerBatch(
                batch(), jnp.ones(rows, bool), jnp.ones(rows, jnp.int32), jnp.ones(rows), jnp.zeros(rows)
            )
        )
        step = make_preference_step(partial(dpo.loss, dpo_cfg), config, accumulate=1)
        return Program(step, (state, good, frozen), learned)
    rewards = make(lambda p: from_language_model(p, jax.random.key(0), judge), scoring)
    if case.experiment == "reward_model":
        reward_cfg = reward_model.RewardModel(**trained)
        frozen, _, state = training(reward_cfg, scalar, rewards, make)
        shape = rows // 2, 2
        pairs = make(
            lambda: Rankings(
                batch(), jnp.broadcast_to(jnp.arange(2), shape), jnp.ones(shape, bool), jnp.zeros(shape[0])
            )
        )
        step = reward_model.make_step(reward_cfg, config)
        number, key = make(lambda: jnp.zeros((), jnp.int32)), make(lambda: jax.random.key(0))
        return Program(step, (state, pairs, frozen, number, key), valued)

    width = np.dtype(config.precision.compute).itemsize
    cache = (
        2 * config.n_layers * config.n_kv_heads * config.head_dim * width * rows * (case.prompt + case.response / 2)
    )
    # Of an embedding that is not the head, too, only the words of that moment are looked up.
    read = count_weights(params) - (count_weights(params["embedding"]) if "head" in params else 0)
    copies = copies or parts

    def decoded(rounds: int = 1) -> float:
        """Bytes read while all slots are filled so many times, with answers of full length."""
        return case.response * (rounds * width * read * copies + cache)

    def asked(count: int) -> Prompts:
        inputs = tokens(config, count, case.prompt, 0).inputs
        return Prompts(inputs, jnp.ones((count, case.prompt), bool), jnp.arange(count))

    if case.experiment == "grpo":
        grpo_cfg = grpo.GRPO(
            **trained, groups=rows // GROUP, group_size=GROUP, slots=case.slots, accumulate=case.accumulate
        )
        numbers = grpo_cfg.numbers(case.response)
        at_once, prompts = groups.sampled_at_once(numbers, copies), numbers.prompts // copies
        rounds = -(-rows // at_once)
        refills = -(-prompts // read_at_once(prompts, at_once // copies // GROUP)) if prompts else 1
        trunk, _, policy = training(grpo_cfg, model, params, make)
        frozen_groups = groups.Frozen({} if case.lora_rank else params, {}, trunk)
        iteration = partial(grpo_iteration, grpo.algorithm(grpo_cfg, numbers), model, numbers)
        first = make(lambda: asked(rows // GROUP))
        # Sampling, the reference's log-probabilities, and the update.
        return Program(
            jax.jit(iteration, donate_argnums=0), (policy, frozen_groups, first, make(lambda: jax.random.key(0))),
            2 * once + learned, decoded(rounds), decoding_steps=rounds * case.response, refills=refills,
        )  # fmt: skip

    ppo_cfg = ppo.PPO(**trained, responses=rows, minibatches=case.minibatches, epochs=1, accumulate=case.accumulate)
    setup = ppo_setup(config, max_new_tokens=case.response, eos_id=-1, pad_id=0, reward_config=judge)
    trunk, _, policy = training(ppo_cfg, model, params, make)
    _, own, critic = training(ppo_cfg, scalar, rewards, make)
    prompts = make(lambda: asked(rows))
    state = State(policy, critic, make(lambda: jnp.zeros(())))
    frozen = Frozen({} if case.lora_rank else params, {"reward_model": own}, None, trunk)
    update = learned + valued
    iterate = jax.jit(partial(ppo.iterate, ppo_cfg, setup), donate_argnums=0)
    args = (state, frozen, prompts, make(lambda: jax.random.key(0)))
    # Sampling; the policy's and reference's log-probabilities, rewards and values; and the update.
    return Program(iterate, args, once + 2 * (once + scored) + update, decoded(), (ppo_cfg, setup), update)
