"""What the experiments run again and again, at published shapes: to compile from shapes, or to run on arrays.

`tpu/compile.py` compiles them for TPUs that are not there, `accelerator.py` times them where it runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState

from experiments import dpo, ppo, reward_model, sft
from experiments.adapters import split
from experiments.bench.shapes import MODELS, count, model_config
from experiments.pairs import Batch
from experiments.setting import PRECISIONS, PrecisionName
from experiments.training import Training, make_optimizer
from rlhf_jax.batches import Prompts, Rankings, Tokens
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.models import ModelConfig, ScalarModel, Transformer, from_language_model

Make = Callable[..., Any]
"""make(function, *args): what the function returns, or with `jax.eval_shape` its shapes."""


@dataclass(frozen=True)
class Case:
    """What is done, with which model, and how much of it at once."""

    experiment: Literal["sft", "reward_model", "dpo", "ppo"]
    model: str
    """One of the published shapes of experiments/bench/shapes.py."""
    rows: int | None = None
    """Sequences a step (PPO: responses an iteration); by default two (PPO: four) for each part of data × fsdp."""
    minibatches: int = 4
    """Of a PPO iteration, in one epoch."""
    prompt: int = 512
    """Tokens."""
    response: int = 512
    lora_rank: int = 0
    """Adapters on a frozen trunk; in PPO one trunk for all four models."""
    frozen_dtype: Literal["float32", "bfloat16"] | None = "bfloat16"
    """Of the frozen trunk."""
    precision: PrecisionName = "mixed"
    attention: Literal["auto", "reference"] = "auto"
    """auto: by a kernel of the platform, where a sequence reads itself."""

    def __post_init__(self) -> None:
        at_least(self, prompt=1, response=1, minibatches=1, lora_rank=0)
        if self.rows is not None:
            at_least(self, rows=1)
            if self.experiment in ("reward_model", "dpo") and self.rows % 2:
                raise UserError(f"rows is {self.rows}, and answers go in pairs: give an even number")
        if self.model not in MODELS:
            raise UserError(f"no model {self.model!r}; there are {', '.join(MODELS)}")


class Program(NamedTuple):
    """A function and what it is called with; its floating-point operations by the equations."""

    function: Any
    args: tuple[Any, ...]
    flops: float
    """Of the model, without what is computed twice."""
    decoded: float = 0.0
    """Bytes of memory that all devices together read while sampling, the least that it takes."""
    iteration: ppo.Iteration | None = None
    """PPO's parts, of which the function is the whole."""
    update_flops: float = 0.0
    """Those of PPO's update."""


def flops(config: ModelConfig, matrices: int, rows: int, length: int, read: int, *, times: int = 1) -> float:
    """Two a weight and token, the head only at the `read` tokens of a row, and causal attention.

    `times`: 1 forward, 3 with the gradients of activations and of weights, 2 where weights are frozen. Attention has
    no weights, but both of its factors have gradients.
    """
    head = config.d_model * config.vocab_size if read else 0
    attention = config.n_layers * config.n_heads * config.head_dim * length  # q·k and weights·v, half of them seen
    return 2.0 * rows * (times * (length * matrices + read * head) + (3 if times > 1 else 1) * length * attention)


def tokens(config: ModelConfig, rows: int, prompt: int, response: int) -> Tokens:
    """Random tokens, whole rows of them: what comes after the prompt is the response."""
    shape = rows, prompt + response
    inputs = jax.random.randint(jax.random.key(1), shape, 2, config.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
    mask = (positions >= prompt - 1) & (positions < shape[1] - 1)
    return Tokens(inputs, jnp.roll(inputs, -1, 1), mask, positions, jnp.ones(shape, jnp.int32))


def training(cfg: Training, model: Any, params: Any, make: Make) -> tuple[Any, Any, Any]:
    """(frozen, own, state). The state's parameters are a copy of `own`, since a step may be given their memory."""
    frozen, own = make(lambda p: split(cfg, jax.random.key(0), p), params)
    optimizer = make_optimizer(cfg, 1000)

    def create(own: Any) -> TrainState:
        return TrainState.create(apply_fn=model.apply, params=jax.tree.map(jnp.copy, own), tx=optimizer)

    return frozen, own, make(create, own)


def build(case: Case, make: Make, parts: int = 1) -> Program:
    """The program, for a mesh whose axes data × fsdp have so many parts."""
    config = replace(model_config(case.model, PRECISIONS[case.precision]), attention=case.attention)
    model, scalar = Transformer(config), ScalarModel(config)
    params = make(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"])
    rows, length = case.rows or parts * (4 if case.experiment == "ppo" else 2), case.prompt + case.response
    adapters = {"lora_rank": case.lora_rank, "frozen_dtype": case.frozen_dtype if case.lora_rank else None}
    back = 2 if case.lora_rank else 3  # forward, and the gradients of activations and of weights
    matrices = count(params["layers"])
    once, learned = (flops(config, matrices, rows, length, case.response, times=times) for times in (1, back))
    scored, valued = (flops(config, matrices, rows, length, 0, times=times) for times in (1, back))

    def batch() -> Tokens:
        return tokens(config, rows, case.prompt, case.response)

    if case.experiment == "sft":
        stage = sft.SFT(**adapters)
        frozen, _, state = training(stage, model, params, make)
        step = sft.make_step(stage, config, jax.random.key(0))
        return Program(step, (state, make(batch), frozen, make(lambda: jnp.zeros((), jnp.int32))), learned)
    if case.experiment == "dpo":
        stage = dpo.DPO(**adapters)
        frozen, _, state = training(stage, model, params, make)
        good = make(lambda: Batch(batch(), *(jnp.ones(rows, dtype) for dtype in (bool, jnp.int32, jnp.float32))))
        return Program(dpo.make_step(stage, config), (state, good, frozen), learned)
    rewards = make(lambda p: from_language_model(p, jax.random.key(0), config), params)
    if case.experiment == "reward_model":
        stage = reward_model.RewardModel(**adapters)
        frozen, _, state = training(stage, scalar, rewards, make)
        shape = rows // 2, 2
        pairs = make(lambda: Rankings(batch(), jnp.broadcast_to(jnp.arange(2), shape), jnp.ones(shape, bool)))
        step = reward_model.make_step(stage, config, jax.random.key(0))
        return Program(step, (state, pairs, frozen, make(lambda: jnp.zeros((), jnp.int32))), valued)

    stage = ppo.PPO(**adapters, responses=rows, minibatches=case.minibatches, epochs=1)
    iteration = ppo.make_iteration(stage, config, max_new_tokens=case.response, eos_id=-1, pad_id=0)
    trunk, _, policy = training(stage, model, params, make)
    _, own, critic = training(stage, scalar, rewards, make)
    prompts = make(
        lambda: Prompts(
            tokens(config, 1024, case.prompt, 0).inputs, jnp.ones((1024, case.prompt), bool), jnp.arange(1024)
        )
    )
    state = ppo.State(policy, critic, make(lambda: jnp.zeros(())))
    frozen = ppo.Frozen({} if case.lora_rank else params, own, prompts, None, trunk)
    update = learned + valued
    width = np.dtype(config.precision.compute).itemsize
    cache = (
        2 * config.n_layers * config.n_kv_heads * config.head_dim * width * rows * (case.prompt + case.response / 2)
    )
    # Of an embedding that is not the head, too, only the words of that moment are looked up.
    read = count(params) - (count(params["embedding"]) if "head" in params else 0)
    decoded = case.response * (width * read * parts + cache)
    whole = jax.jit(iteration.whole, donate_argnums=0)
    args = (state, frozen, make(lambda: jax.random.key(0)))
    # Sampling; the policy's and reference's log-probabilities, rewards and values; and the update.
    return Program(whole, args, once + 2 * (once + scored) + update, decoded, iteration, update)
