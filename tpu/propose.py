"""Proposes meshes for an experiment's step on a TPU slice: those that fit, by the seconds that the equations allow.

    python tpu/propose.py --experiment ppo --model llama3-8b --topology v5e:8x16 --rows 512

No TPU is needed and nothing is compiled: it takes seconds. Memory is what the step is given, an estimate of its
activations, and PPO's copy of the policy for sampling. Seconds are at least those of the operations at the chip's peak
with the reading of weights and cache while answers are sampled, or of what the chips send each other, whichever takes
longer. `tpu/compile.py` asks the compiler about one of them.
"""

import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax: no TPU is looked for

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

import jax

from experiments.bench.programs import SAMPLING, Case, Program, build
from experiments.bench.shapes import CHIPS, Chip, least_seconds, model_config, parameter_shapes
from experiments.flags import PRECISIONS
from rlhf_jax.axes import MESH_AXES
from rlhf_jax.batches import Rankings, Tokens
from rlhf_jax.budget import step_memory
from rlhf_jax.cli import run_main
from rlhf_jax.data.pairs import AnswerBatch
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.models import ModelConfig, count_weights
from rlhf_jax.sampling.layout import copy_bytes, sampling_tensor
from rlhf_jax.sharding import batch_shardings, make_mesh, shardings

WIDTH = 2
"""Bytes of a number in bfloat16, as weights and activations travel."""
MOST = 2048
"""Chips of a slice."""
HEADS = 3
"""Copies of the language head along fsdp that a step holds, its gradient counted: the compiler's figures say so."""


LONG = 8192
"""Tokens from which on a mesh may cut sequences: below, rows are many enough."""
Sizes = tuple[int, int, int, int]
"""The sizes of a mesh, in the order of `MESH_AXES`."""


@dataclass(frozen=True)
class Config(Case):
    """Proposes meshes."""

    topology: str = field(kw_only=True)
    """The slice, such as v5e:8x16, v5p:4x4x4 or v6e:4x4."""
    show: int = 8
    """The most meshes to show."""

    def __post_init__(self) -> None:
        """Raises UserError for a slice that is none."""
        super().__post_init__()
        at_least(self, show=1)
        kind, _, sides = self.topology.partition(":")
        if kind not in CHIPS or not all(side.isdecimal() and int(side) > 0 for side in sides.split("x")):
            raise UserError(
                f"topology {self.topology!r} is not one of {', '.join(CHIPS)} with its sides, as in v5e:4x4"
            )
        if math.prod(map(int, sides.split("x"))) > MOST:
            raise UserError(f"topology {self.topology!r}: slices of at most {MOST} chips are looked at")


def named(sizes: Sizes) -> str:
    """The mesh, as the experiments' --mesh."""
    return ",".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True) if size > 1) or "data=1"


class Proposal(NamedTuple):
    """A mesh and what a step takes on it, of one chip."""

    mesh: Sizes
    memory: float
    """Bytes."""
    sent: float
    """Bytes that it receives."""
    seconds: dict[str, float]
    """By what takes them: operations, reading while sampling, links between chips."""

    @property
    def least(self) -> float:
        """The seconds that a step takes at least."""
        return least_seconds(self.seconds)[0]

    @property
    def limit(self) -> str:
        """The limit of the step, as `least_seconds` has it."""
        return least_seconds(self.seconds)[1]


def meshes(chips: int, configs: Sequence[ModelConfig], rows: int, length: int) -> Iterator[Sizes]:
    """Meshes of so many chips whose sizes are powers of two.

    data and fsdp divide the rows, tensor the keys' heads, sequence × tensor all heads, of each of the models.
    Sequences of LONG tokens and more may be cut.
    """
    powers = [2**i for i in range(chips.bit_length())]
    for tensor, sequence, fsdp in itertools.product(powers, powers, powers):
        data = chips // (tensor * sequence * fsdp)
        cut = sequence == 1 or (length >= LONG and not length % sequence)
        heads = all(not some.n_kv_heads % tensor and not some.n_heads % (sequence * tensor) for some in configs)
        if data * fsdp * sequence * tensor == chips and cut and heads and not rows % (data * fsdp):
            yield data, fsdp, sequence, tensor


class Load(NamedTuple):
    """A model of a step."""

    config: ModelConfig
    weights: float
    """How many it has."""
    trained: float
    """How many of them, or of an adapter's, are trained."""


def sent(case: Case, policy: Load, judge: Load, sizes: Sizes, rows: int) -> float:
    """Bytes that a chip receives in a step. `judge` is PPO's reward model, and its critic.

    Along fsdp × sequence weights are gathered in each pass and gradients scattered; along data gradients are added up,
    in float32; along tensor the residual stream, twice a layer and pass; along sequence queries, keys, values and what
    was attended change places. Layers are computed again for the gradients.
    """
    data, fsdp, sequence, tensor = sizes
    ways, fsdp = data * fsdp * sequence, fsdp * sequence

    def gather(load: Load) -> float:
        return WIDTH * load.weights / tensor * (fsdp - 1) / fsdp

    def update(load: Load) -> float:
        scattered = WIDTH * load.trained / tensor * (fsdp - 1) / fsdp
        return 2 * gather(load) + scattered + 2 * 4 * load.trained / (fsdp * tensor) * (data - 1) / data

    def sums(load: Load) -> float:
        """Bytes that one pass over the tokens of all rows adds up and moves."""
        config, tokens = load.config, rows * (case.prompt + case.response)
        keys = math.lcm(config.n_kv_heads, sequence * tensor)
        summed = 2 * config.d_model * 2 * (tensor - 1) / tensor
        moved = 2 * (config.n_heads + keys) * config.head_dim / tensor * (sequence - 1) / sequence
        return config.n_layers * tokens / ways * WIDTH * (summed + moved)

    if case.experiment == "grpo":  # one gather for sampling, one for the reference, and the update
        return 2 * gather(policy) + update(policy) + (1 + 1 + 3) * sums(policy)
    if case.experiment != "ppo":
        return update(policy) + 3 * sums(policy)
    # One gather for sampling; policy and reference, reward model and critic score in parts; two are updated by
    # minibatches.
    found = gather(policy) + sums(policy)
    for load in (policy, judge):
        found += case.minibatches * (2 * gather(load) + update(load)) + (2 + 3) * sums(load)
    return found


def propose(case: Case, chip: Chip, chips: int) -> list[Proposal]:
    """All meshes: those that fit, the fastest and smallest first, then the others by their memory."""
    config, judge = (
        model_config(name, PRECISIONS[case.precision]) for name in (case.model, case.reward_model or case.model)
    )
    rows, length = case.rows or chips * (4 if case.experiment in SAMPLING else 2), case.prompt + case.response
    shapes, found = parameter_shapes(config), []
    weights, copied = count_weights(shapes), copy_bytes(config, shapes)
    judged = count_weights(parameter_shapes(judge))
    cache = 2 * config.n_layers * config.n_kv_heads * config.head_dim * WIDTH * rows  # of one token
    for sizes in meshes(chips, (config, judge), rows, length):
        data, fsdp, sequence, tensor = sizes
        mesh = make_mesh(named(sizes), devices=jax.devices()[:chips])
        program = build(case, jax.eval_shape, data * fsdp)
        state = program.args[0]
        trained = state.policy.params if case.experiment == "ppo" else state.params
        copy, reading = 0.0, 0.0
        if case.experiment in SAMPLING:
            own = copied / sampling_tensor(chips, tensor, config, copied, chip.hbm)
            reading = case.response * (own + cache * (case.prompt + length) / 2 / chips) / chip.hbm_bandwidth
            copy = own + cache * length / chips
        with jax.set_mesh(mesh):
            part = rows // (case.minibatches if case.experiment == "ppo" else 1)
            # Made on CPUs, where "auto" would hold the scores.
            kernel = replace(config, attention="splash") if case.attention == "auto" else config
            more = step_memory(kernel, {}, (), rows=part, length=length).activations
        held = held_bytes(program, mesh)
        gradients = 2 * 4 * count_weights(trained) / (fsdp * sequence * tensor)
        head = HEADS * 4 * config.d_model * config.vocab_size / tensor
        learned = count_weights(state.critic.params) if case.experiment == "ppo" else 0
        policy = Load(config, weights, count_weights(trained))
        moved = sent(case, policy, Load(judge, judged, learned), sizes, rows)
        seconds = {
            "operations": program.flops / chips / chip.flops, "reading": reading,
            "links": moved / (chip.ici_bandwidth / 2),
        }  # fmt: skip
        found.append(Proposal(sizes, held + copy + more + gradients + head, moved, seconds))
    fits = sorted((one for one in found if one.memory <= chip.hbm), key=lambda one: (one.least, one.memory))
    return fits + sorted((one for one in found if one.memory > chip.hbm), key=lambda one: one.memory)


def held_bytes(program: Program, mesh: Any) -> float:
    """Bytes of a program's arguments on one chip."""
    total = 0.0
    for arg in program.args:
        if isinstance(arg, jax.Array | jax.ShapeDtypeStruct):
            continue
        batch = isinstance(arg, Tokens | Rankings | AnswerBatch)
        places = batch_shardings(mesh, arg) if batch else shardings(mesh, arg)
        for leaf, place in zip(jax.tree.leaves(arg), jax.tree.leaves(places), strict=True):
            if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                total += math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


def main(cfg: Config) -> dict[str, float]:
    """Prints a table; returns the fastest mesh's figures.

    Raises UserError where no mesh holds the step.
    """
    kind, _, sides = cfg.topology.partition(":")
    chip, chips = CHIPS[kind], math.prod(map(int, sides.split("x")))
    jax.config.update("jax_num_cpu_devices", chips)
    found = propose(cfg, chip, chips)
    if not found:
        raise UserError(
            f"--rows {cfg.rows} and the heads of {cfg.model} do not divide over {cfg.topology}: take a multiple of a"
            " power of two, or fewer chips"
        )
    fits = [one for one in found if one.memory <= chip.hbm]
    print("| mesh | HBM, GB | sent to a chip, GB | s at least | limited by |\n|---|---|---|---|---|")
    for one in (fits or found)[: cfg.show]:
        print(f"| {named(one.mesh)} | {one.memory / 1e9:.1f} of {chip.hbm / 1e9:.0f} | {one.sent / 1e9:.3g} |"
              f" {one.least:.3g} | {one.limit} |")  # fmt: skip
    if not fits:
        raise UserError(
            f"no mesh of {cfg.topology} holds {cfg.experiment} of {cfg.model}: take more chips, fewer --rows, shorter"
            " --prompt and --response, more --minibatches (PPO), or --lora-rank"
        )
    return {"seconds": fits[0].least, "memory": fits[0].memory, "sent": fits[0].sent}


if __name__ == "__main__":
    run_main(main, Config)
