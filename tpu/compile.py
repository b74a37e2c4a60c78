"""Compiles an experiment's own program for TPUs that are not there: does it fit, and what will it take?

    pip install -e '.[tpu]'
    python tpu/compile.py --experiment ppo --model llama3-8b --topology v5e:8x16 --mesh fsdp=32,tensor=4

No TPU is needed: libtpu, which has the real compiler, comes from PyPI. Nothing is allocated and nothing is run. Prints
HBM a chip, floating-point operations, collectives and the least time that they allow; what does not fit ends in one
line that says by how much and what to change. `tpu/table.py` makes experiments/results/tpu.md with it.
"""

import os
import re
import time
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}  # before jax: no TPU is looked for
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "")

import hlo
import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState
from jax.experimental import topologies
from shapes import CHIPS, MODELS, Chip, count, model_config

from experiments import dpo, ppo, reward_model, sft
from experiments.adapters import split
from experiments.pairs import Batch
from experiments.setting import PRECISIONS, PrecisionName
from experiments.training import Training, make_optimizer
from rlhf_jax.batches import Prompts, Rankings, Tokens
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.log import run_main
from rlhf_jax.models import ModelConfig, ScalarModel, Transformer, from_language_model
from rlhf_jax.sharding import batch_shardings, make_mesh, shardings
from rlhf_jax.train import HEAD_CHUNK


@dataclass(frozen=True)
class Config:
    """Compiles one program."""

    experiment: Literal["sft", "reward_model", "dpo", "ppo"]
    model: str
    """One of the published shapes of tpu/shapes.py."""
    topology: str
    """Such as v5e:8x16, v5p:4x4x4 or v6e:4x4."""
    mesh: str = "fsdp=-1"
    """As the experiments' --mesh."""
    rows: int | None = None
    """Sequences a step (PPO: responses an iteration); by default one (PPO: four) for each part of data × fsdp."""
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

    def __post_init__(self) -> None:
        at_least(self, prompt=1, response=1, minibatches=1, lora_rank=0)
        if self.model not in MODELS:
            raise UserError(f"no model {self.model!r}; there are {', '.join(MODELS)}")
        if self.topology.partition(":")[0] not in CHIPS:
            raise UserError(f"topology {self.topology!r}: it begins with one of {', '.join(CHIPS)}, as in v5e:4x4")


class Program(NamedTuple):
    """A function to compile and the shapes that it is called with; its floating-point operations by the equations."""

    function: Any
    args: tuple[Any, ...]
    flops: float
    """Of the model, without what is computed twice."""
    decoded: float = 0.0
    """Bytes of memory that all chips together read while sampling, the least that it takes."""


def shape(*dims: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    """An array that is not there."""
    return jax.ShapeDtypeStruct(dims, dtype)


def tokens(rows: int, length: int) -> Tokens:
    """A batch that is not there."""
    some = shape(rows, length)
    return Tokens(some, some, shape(rows, length, dtype=bool), some, some)


def on(mesh: Any, tree: Any, *, batch: bool = False) -> Any:
    """Shapes with their places."""
    places = batch_shardings(mesh, tree) if batch else shardings(mesh, tree)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def flops(config: ModelConfig, matrices: int, rows: int, length: int, read: int) -> float:
    """Forward: two a weight and token, the head only at the `read` tokens of a row, and causal attention."""
    head = config.d_model * config.vocab_size if read else 0
    attention = 2 * config.n_layers * config.n_heads * config.head_dim * length  # q·k and weights·v, half of them seen
    return 2.0 * rows * (length * (matrices + attention / 2) + read * head)


def training(cfg: Training, model: Any, params: Any) -> tuple[Any, Any]:
    """(frozen, state) in shapes."""
    frozen, own = jax.eval_shape(lambda p: split(cfg, jax.random.key(0), p), params)
    optimizer = make_optimizer(cfg, 1000)
    return frozen, jax.eval_shape(lambda p: TrainState.create(apply_fn=model.apply, params=p, tx=optimizer), own)


def build(cfg: Config, mesh: Any) -> Program:
    """The program that an experiment runs again and again."""
    config = model_config(cfg.model, PRECISIONS[cfg.precision])
    model, scalar = Transformer(config), ScalarModel(config)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))["params"]
    rewards = jax.eval_shape(lambda p: from_language_model(p, jax.random.key(0), config), params)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    rows, length = cfg.rows or parts * (4 if cfg.experiment == "ppo" else 2), cfg.prompt + cfg.response
    adapters = {"lora_rank": cfg.lora_rank, "frozen_dtype": cfg.frozen_dtype if cfg.lora_rank else None}
    back = 2 if cfg.lora_rank else 3  # forward, and the gradients of activations and of weights
    matrices = count(params["layers"])
    once = flops(config, matrices, rows, length, cfg.response)
    scored = flops(config, matrices, rows, length, 0)

    if cfg.experiment == "sft":
        stage = sft.SFT(**adapters)
        frozen, state = training(stage, model, params)
        step = sft.make_step(stage, config, jax.random.key(0))
        return Program(
            step, (on(mesh, state), on(mesh, tokens(rows, length), batch=True), on(mesh, frozen), shape()), back * once
        )
    if cfg.experiment == "reward_model":
        stage = reward_model.RewardModel(**adapters)
        frozen, state = training(stage, scalar, rewards)
        batch = Rankings(tokens(rows, length), shape(rows // 2, 2), shape(rows // 2, 2, dtype=bool))
        step = reward_model.make_step(stage, config, jax.random.key(0))
        return Program(step, (on(mesh, state), on(mesh, batch, batch=True), on(mesh, frozen), shape()), back * scored)
    if cfg.experiment == "dpo":
        stage = dpo.DPO(**adapters)
        frozen, state = training(stage, model, params)
        batch = Batch(tokens(rows, length), shape(rows, dtype=bool), shape(rows), shape(rows, dtype=jnp.float32))
        step = dpo.make_step(stage, config)
        return Program(step, (on(mesh, state), on(mesh, batch, batch=True), on(mesh, frozen)), back * once)

    stage = ppo.PPO(**adapters, responses=rows, minibatches=cfg.minibatches, epochs=1)
    iteration = ppo.make_iteration(stage, config, max_new_tokens=cfg.response, eos_id=-1, pad_id=0)
    trunk, policy = training(stage, model, params)
    _, critic = training(stage, scalar, rewards)
    prompts = Prompts(shape(1024, cfg.prompt), shape(1024, cfg.prompt, dtype=bool), shape(1024))
    state = ppo.State(policy, critic, shape(dtype=jnp.float32))
    frozen = ppo.Frozen({} if cfg.lora_rank else params, critic.params, prompts, None, trunk)
    key = jax.eval_shape(lambda: jax.random.key(0))
    rollout = flops(config, matrices, rows, length, cfg.response)
    scoring = 2 * once + 2 * scored
    width = np.dtype(config.precision.compute).itemsize
    cache = 2 * config.n_layers * config.n_kv_heads * config.head_dim * width * rows * (cfg.prompt + cfg.response / 2)
    decoded = cfg.response * (width * count(params) * parts + cache)
    args = (on(mesh, state), on(mesh, frozen), key)
    return Program(
        jax.jit(iteration.whole, donate_argnums=0), args, rollout + scoring + back * (once + scored), decoded
    )


def too_large(cfg: Config, message: str) -> UserError:
    """What the compiler says of memory, and what helps."""
    found = re.search(r"([\d.]+\w)(?:\)? exceeds[^(]*\(| of )([\d.]+\w)", message)
    said = f"it needs {found[1]}B of the {found[2]}B a chip" if found else message.splitlines()[0]
    return UserError(
        f"{cfg.experiment} of {cfg.model} does not fit {cfg.topology} as {cfg.mesh}: {said}; take more chips, "
        f"a larger fsdp or tensor, fewer --rows, shorter --prompt and --response, more --minibatches (PPO), or "
        f"adapters (--lora-rank)"
    )


def main(cfg: Config, *, quiet: bool = False) -> dict[str, float]:
    """Compiles; prints and returns the figures."""
    chip: Chip = CHIPS[cfg.topology.partition(":")[0]]
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=cfg.topology)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"topology {cfg.topology!r}: {said} (libtpu: pip install -e '.[tpu]')") from None
    mesh = make_mesh(cfg.mesh, devices=topology.devices)
    program = build(cfg, mesh)
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = program.function.lower(*program.args)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise too_large(cfg, str(error)) from None
    memory = compiled.memory_analysis()

    def turns(loop: str) -> int:
        """Of loops that end when the data say so: the sampler's, and the head's over columns that count."""
        return cfg.response if "generate" in loop else -(-cfg.response // HEAD_CHUNK)

    traffic = hlo.sent(compiled.as_text(), otherwise=turns)
    chips = mesh.size
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    seconds = {
        "compute": program.flops / chips / chip.flops,
        "decode": program.decoded / chips / chip.hbm_bandwidth,
        "between chips": sum(traffic.bytes.values()) / (chip.ici_bandwidth / 2),
    }
    least = max(seconds["compute"] + seconds["decode"], seconds["between chips"])
    figures = {
        "hbm_gb": (held + memory.temp_size_in_bytes) / 1e9,
        "arguments_gb": memory.argument_size_in_bytes / 1e9,
        "temporaries_gb": memory.temp_size_in_bytes / 1e9,
        "hbm_of_gb": chip.hbm / 1e9,
        "petaflops": program.flops / 1e15,
        "received_gb": sum(traffic.bytes.values()) / 1e9,
        "seconds": least,
        "mfu": program.flops / chips / chip.flops / least,
        "compile_seconds": time.perf_counter() - began,
    }
    if quiet:
        return figures
    print(f"{cfg.experiment}, {cfg.model}, {cfg.topology} as {dict(mesh.shape)}: fits")
    print(
        f"HBM a chip: {figures['hbm_gb']:.2f} of {figures['hbm_of_gb']:.0f} GB "
        f"(arguments {figures['arguments_gb']:.2f}, temporaries {figures['temporaries_gb']:.2f})"
    )
    each = program.flops / chips / 1e12
    print(f"floating-point operations: {figures['petaflops']:.3g} PFLOP in all, {each:.3g} TFLOP a chip")
    for kind, times in traffic.times.most_common():
        print(f"{kind}: {times} times, {traffic.bytes[kind] / 1e9:.3g} GB to each chip")
    print("seconds at least: " + ", ".join(f"{name} {value:.3g}" for name, value in seconds.items()))
    print(f"so {least:.3g} s at best, MFU at most {figures['mfu']:.0%}")
    print(f"compiled in {figures['compile_seconds']:.0f} s")
    return figures


if __name__ == "__main__":
    run_main(main, Config)
