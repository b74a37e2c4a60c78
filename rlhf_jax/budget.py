"""The memory that a training step needs on a device, estimated before it is compiled, beside the memory that is free.

The estimate counts arrays; the compiler's own figure, which only a compilation gives, was within a third of it for
SmolLM2-135M (`tests/test_budget.py` holds it within a factor of two at small sizes).
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.models import ModelConfig
from rlhf_jax.models.fused import attention_kernel
from rlhf_jax.sampling.layout import copy_bytes, sampling_mesh
from rlhf_jax.scoring import head_chunk, row_devices
from rlhf_jax.sharding import current_mesh
from rlhf_jax.types import Params

GROUPS = Path("/sys/fs/cgroup")


class StepMemory(NamedTuple):
    """Bytes on one device."""

    held: float
    """Weights and the optimiser's state, which are there before."""
    gradients: float
    """Gradients of what is trained, and what else of their size a step makes."""
    activations: float
    """Numbers that the backward pass reads, and logits."""

    sampling: float = 0.0
    """Weights as answers are sampled with, where they are a copy, and the cache; gone before anything is learned."""

    @property
    def more(self) -> float:
        """Bytes that the step takes beside what is held."""
        return max(self.gradients + self.activations, self.sampling)


def step_memory(
    config: ModelConfig, trained: Params, held: Any, *, rows: int, length: int, gradients: int = 1
) -> StepMemory:
    """The memory of a step on so many rows of `length` tokens, those of one microbatch on all devices together.

    `trained` are the parameters that have gradients, `held` all arrays that the step is given. Of
    the size of a gradient, in float32, the step has so many trees: one that AdamW reads, two where microbatches are
    added up or for Adafactor, three for Muon. That of narrower weights stands beside its own type's.
    """
    mesh = current_mesh()
    chunk = min(length, head_chunk(rows))
    rows = max(1, rows // row_devices())
    parts = 1 if mesh is None else mesh.shape["tensor"]
    pieces = 1 if mesh is None else mesh.shape["sequence"]
    itemsize = jnp.dtype(config.precision.compute).itemsize
    tokens = rows * -(-length // pieces)
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    # Before and after the softmax; the kernels of accelerators never hold them.
    scores = 2 * config.n_heads * length if attention_kernel(config, length) == "reference" else 0
    a_layer = tokens * itemsize * (6 * config.d_model + (2 * queries + 2 * keys + 3 * config.d_ff + scores) / parts)
    kept = tokens * itemsize * config.d_model if config.remat else a_layer
    logits = 4 * rows * chunk * config.vocab_size / parts
    activations = config.n_layers * kept + 2 * a_layer + 1.5 * logits
    own, wide = device_bytes(trained), device_bytes(trained, itemsize=4)
    return StepMemory(device_bytes(held), gradients * wide + (own if own < wide else 0.0), activations)


def sampling_memory(config: ModelConfig, params: Params, *, rows: int, length: int) -> float:
    """Bytes that sampling takes on one device, of a model's `params` (or shapes), `rows` answers at a time.

    `length` counts the tokens of prompt and answer. See `sampling/layout.py`.
    """
    mesh, copy = current_mesh(), copy_bytes(config, params)
    ways, tensor, moved = 1, 1, False
    if mesh is not None:
        layout = sampling_mesh(mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh, config, copy)
        tensor, moved = layout.shape["tensor"], layout.axis_sizes != tuple(mesh.shape.values())
        ways = layout.shape["data"] * (1 if config.n_kv_heads % tensor else tensor)
    if not moved:  # what is of the same type is read where it lies
        copy = copy_bytes(config, params, narrower=True)
    itemsize = jnp.dtype(config.precision.compute).itemsize
    cache = 2 * config.n_layers * config.n_kv_heads * config.head_dim * itemsize * rows * length
    return copy / tensor + cache / ways


def device_bytes(tree: Any, *, itemsize: int | None = None) -> float:
    """Bytes of a pytree's arrays on one device, as they are, or at so many a number.

    An array that is there twice counts once.
    """
    arrays = {id(leaf): leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)}
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * (itemsize or leaf.dtype.itemsize)
        for leaf in arrays.values()
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def free_memory() -> float | None:
    """Bytes that are free for this process: on the first device, or of the machine where that is a CPU.

    Devices that are simulated on a CPU share it. None where nobody tells.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"] - stats["bytes_in_use"])
    if device.platform != "cpu":
        return None
    found = [*_available(), *_of_group()]
    return min(found) if found else None


def memory_line(stage: str, needed: StepMemory, free: float | None) -> str:
    """A line about a stage's steps for the run."""
    line = (
        f"{stage}: {_gigabytes(needed.held)} of weights and optimiser are held; a step takes about"
        f" {_gigabytes(needed.more)} more"
    )
    return line if free is None else f"{line}, and {_gigabytes(free)} are free"


def advice(config: ModelConfig, needed: StepMemory, *, rows: int, adapters: bool, sampling: str = "") -> list[str]:
    """The flags that would help, the most useful first. `sampling` is the one for fewer answers at a time."""
    lora = [] if adapters else ["--lora-rank 16"]
    fewer = ["a larger --accumulate" if rows > 1 else "a smaller --max-length"]
    if needed.sampling > needed.gradients + needed.activations:
        return [f"a smaller {sampling}", "a smaller --max-new-tokens", *lora]
    if needed.activations > needed.gradients:
        return ([] if config.remat else ["--remat True"]) + fewer + lora
    return (lora or ["--frozen-dtype int8"]) + fewer


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.0f} GB"


def _available() -> list[float]:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]


def _of_group() -> list[float]:
    """The room that a container has left, by the files of its control group."""
    try:
        limit, used, facts = (
            (GROUPS / f"memory.{name}").read_text(encoding="utf-8") for name in ("max", "current", "stat")
        )
        # Files that were read are counted as used, and go when memory is wanted.
        files = sum(float(line.split()[1]) for line in facts.splitlines() if line.startswith("inactive_file "))
        return [float(limit) - float(used) + files]
    except (OSError, ValueError):  # none, or "max"
        return []
