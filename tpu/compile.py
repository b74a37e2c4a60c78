"""Compiles an experiment's own program for TPUs without having any: memory, collectives, and the least time.

    pip install -e '.[tpu]'
    python tpu/compile.py --experiment ppo --model llama3-8b --topology v5e:8x16 --mesh fsdp=32,tensor=4

No TPU is needed: libtpu, which has the real compiler, comes from PyPI. Nothing is allocated and nothing is run. The
result is HBM a chip, floating-point operations, collectives and the least time that they allow. A program that does
not fit ends in one line: by how much, and what to change. `tpu/table.py` makes experiments/results/tpu.md with it.
"""

import os
import re
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# Before jax: no TPU is looked for, nor is one taken, so that several may compile at once.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "")

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

import hlo
import jax
from jax.experimental import topologies

from experiments.bench.programs import Case, Program, build
from experiments.bench.shapes import CHIPS, Chip, least_seconds, model_config, parameter_shapes
from experiments.flags import PRECISIONS
from rlhf_jax.batches import Rankings, Tokens
from rlhf_jax.cli import run_main
from rlhf_jax.data.pairs import AnswerBatch
from rlhf_jax.errors import UserError
from rlhf_jax.sampling.layout import copy_bytes, sampling_tensor
from rlhf_jax.sampling.queue import DECODE, REFILL
from rlhf_jax.scoring import HEAD_COLUMNS
from rlhf_jax.sharding import batch_shardings, make_mesh, shardings

# Programs for devices that this machine does not have cannot be read back from the cache.
jax.config.update("jax_enable_compilation_cache", False)


@dataclass(frozen=True)
class Config(Case):
    """Compiles one program."""

    topology: str = field(kw_only=True)
    """The slice, such as v5e:8x16, v5p:4x4x4 or v6e:4x4."""
    mesh: str = "fsdp=-1"
    """The mesh, as the experiments' --mesh."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range, and for an unknown model or chip."""
        super().__post_init__()
        if self.topology.partition(":")[0] not in CHIPS:
            raise UserError(f"topology {self.topology!r} does not begin with one of {', '.join(CHIPS)}, as in v5e:4x4")


def on(mesh: Any, tree: Any, *, batch: bool = False) -> Any:
    """A tree as shapes with shardings on the mesh."""
    places = batch_shardings(mesh, tree) if batch else shardings(mesh, tree)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def placed(mesh: Any, program: Program) -> list[Any]:
    """The program's arguments as shapes with shardings. Batches are sharded by rows."""
    scalars = jax.Array | jax.ShapeDtypeStruct
    return [
        arg if isinstance(arg, scalars) else on(mesh, arg, batch=isinstance(arg, Tokens | Rankings | AnswerBatch))
        for arg in program.args
    ]


def too_large(cfg: Config, message: str) -> UserError:
    """The error for a program that does not fit: the memory it needs, and what helps."""
    found = re.search(r"([\d.]+\w)(?:\)? exceeds[^(]*\(| of )([\d.]+\w)", message)
    said = f"it needs {found[1]}B of the {found[2]}B a chip" if found else message.splitlines()[0]
    return UserError(
        f"{cfg.experiment} of {cfg.model} does not fit {cfg.topology} as {cfg.mesh}: {said}; take more chips, "
        f"a larger fsdp, sequence or tensor, fewer --rows, shorter --prompt and --response, more --minibatches (PPO), "
        f"fewer --slots (GRPO), more --accumulate, or adapters (--lora-rank)"
    )


def turns(program: Program, response: int, columns: int, loop: str) -> int:
    """The most turns of a loop whose end depends on data: the sampler's, or the head's over chunks of columns."""
    if "generate" not in loop:
        return -(-columns // HEAD_COLUMNS)
    if "_generate_queued" not in loop:
        return response
    each = {REFILL: 1, DECODE: -(-program.decoding_steps // program.refills)}  # of each turn, as many as refills
    return next((count for name, count in each.items() if name in loop), program.refills)


def main(cfg: Config, *, quiet: bool = False) -> dict[str, float]:
    """Compiles; prints and returns the figures.

    Raises UserError for a topology that the compiler does not know, and when the program does not fit.
    """
    chip: Chip = CHIPS[cfg.topology.partition(":")[0]]
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=cfg.topology)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"topology {cfg.topology!r}: {said} (libtpu: pip install -e '.[tpu]')") from None
    mesh = make_mesh(cfg.mesh, devices=topology.devices)
    config = model_config(cfg.model, PRECISIONS[cfg.precision])
    copy = copy_bytes(config, parameter_shapes(config))
    copies = mesh.size // sampling_tensor(mesh.size, mesh.shape["tensor"], config, copy, chip.hbm)
    program = build(cfg, jax.eval_shape, mesh.shape["data"] * mesh.shape["fsdp"], copies)
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = program.function.lower(*placed(mesh, program))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise too_large(cfg, str(error)) from None
    memory = compiled.memory_analysis()

    columns = min(cfg.response, (cfg.prompt + cfg.response) // mesh.shape["sequence"])
    traffic = hlo.sent(compiled.as_text(), otherwise=partial(turns, program, cfg.response, columns))
    chips = mesh.size
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    seconds = {
        "operations": program.flops / chips / chip.flops,
        "reading": program.decoded / chips / chip.hbm_bandwidth,
        "links": sum(traffic.bytes.values()) / (chip.ici_bandwidth / 2),
    }
    least, limit = least_seconds(seconds)
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
        **{f"seconds_of_{name}": value for name, value in seconds.items()},
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
    print(f"so {least:.3g} s at best, limited by {limit}, MFU at most {figures['mfu']:.0%}")
    print(f"compiled in {figures['compile_seconds']:.0f} s")
    return figures


if __name__ == "__main__":
    run_main(main, Config)
