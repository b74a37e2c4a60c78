"""The layout in which answers are sampled: copies of the weights, each cut along "tensor" alone.

Along "fsdp" and "sequence" every device would gather the whole model for each token. So the weights are placed once
for all tokens, as they are computed with, on a mesh of the same devices in the same order: these axes go over into
"data", and into "tensor" where a copy would take more than a part of a device's memory.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from rlhf_jax.axes import MESH_AXES, RULES, parameter_axes
from rlhf_jax.models import ModelConfig
from rlhf_jax.sharding import constrain_params
from rlhf_jax.types import Params

SHARE = 1 / 3
"""The part of a device that a copy of the weights may take. The rest has what training holds, and the cache."""
MEMORY: Mapping[str, float] = {"TPU v4": 32e9, "TPU v5 lite": 16e9, "TPU v5": 95e9, "TPU v6 lite": 32e9}
"""Bytes of a device by its kind, for compilers of devices that are not there; others are asked."""


def sampling_mesh(mesh: AbstractMesh, config: ModelConfig, size: float) -> AbstractMesh:
    """The mesh on which a model samples whose weights are so many bytes, of the same devices in the same order.

    Its "fsdp" and "sequence" are 1, its "tensor" that of `sampling_tensor`.
    """
    devices = math.prod(mesh.axis_sizes)
    tensor = sampling_tensor(devices, mesh.shape["tensor"], config, size, device_memory(mesh))
    return mesh.update(axis_sizes=(devices // tensor, 1, 1, tensor))


def sampling_copies(config: ModelConfig, params: Params) -> int:
    """How many copies of the weights sample on the mesh that is set, each for rows of its own; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names != MESH_AXES:
        return 1
    return sampling_mesh(mesh, config, copy_bytes(config, params)).shape["data"]


def sampling_tensor(devices: int, tensor: int, config: ModelConfig, size: float, memory: float | None) -> int:
    """Into how many parts a copy of the weights is cut, which are `size` bytes, on devices of `memory` bytes each.

    They are `tensor`, or the least multiple by a power of two with which a part fits into `SHARE` of a device, as far
    as the keys' heads and the devices divide. Where the memory is not known, it fits.
    """
    while memory is not None and size / tensor > SHARE * memory:
        if devices % (2 * tensor) or config.n_kv_heads % (2 * tensor):
            break
        tensor *= 2
    return tensor


def device_memory(mesh: AbstractMesh) -> float | None:
    """Bytes of one of the mesh's devices; None where nobody tells."""
    device = mesh.abstract_device
    if device is None or device.platform == "cpu":
        return None
    if device.device_kind in MEMORY:
        return MEMORY[device.device_kind]
    here = [one for one in jax.local_devices() if one.device_kind == device.device_kind]
    stats = here[0].memory_stats() if here else None
    return float(stats["bytes_limit"]) if stats and "bytes_limit" in stats else None


def copy_bytes(config: ModelConfig, params: Params, *, narrower: bool = False) -> int:
    """Bytes of a copy for sampling, or of what is in a narrower type in it. `params` may be shapes."""
    placed = jax.eval_shape(partial(as_computed, config), params)
    leaves = zip(jax.tree.leaves(placed), jax.tree.leaves(params), strict=True)
    return sum(new.size * new.dtype.itemsize for new, old in leaves if not narrower or new.dtype != old.dtype)


def as_computed(config: ModelConfig, params: Params) -> Params:
    """The weights in the dtype that products of them have anyway, where it is a narrower one: no answer changes.

    Adapters, norms and biases stay what they are, and so does a head, or an embedding that is one, which is read in
    another dtype; int8 stays int8.
    """
    compute, head = config.precision.compute, config.precision.head
    names = {"kernel"} | ({"embedding"} if head == compute or not config.tie_embeddings else set())
    names |= {"head"} if head == compute else set()

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> Any:
        narrower = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize > jnp.dtype(compute).itemsize
        return leaf.astype(compute) if narrower and str(getattr(path[-1], "key", "")) in names else leaf

    return jax.tree_util.tree_map_with_path(of_leaf, params)


@contextmanager
def sampling_layout(config: ModelConfig, params: Params) -> Iterator[Params]:
    """Gives the weights as they are computed with, placed for sampling; what is traced within lies as they do.

    For use inside `jit`, where the mesh has no devices. Without a mesh of ours nothing is placed.
    """
    params, mesh = as_computed(config, params), jax.sharding.get_abstract_mesh()
    if mesh.axis_names != MESH_AXES:
        yield params
        return
    wanted = sampling_mesh(mesh, config, copy_bytes(config, params))
    ways = mesh.shape["fsdp"] * mesh.shape["sequence"]
    times = math.gcd(wanted.shape["tensor"] // mesh.shape["tensor"], ways)
    if times > 1:
        params = halfway(mesh, times, params)
    with jax.sharding.use_abstract_mesh(wanted):
        yield constrain_params(params)


def halfway(mesh: AbstractMesh, times: int, params: Params) -> Params:
    """The weights with "tensor" `times` as large and "fsdp" × "sequence" as much smaller, inside `jit`.

    From there XLA gathers them along what is left of these; from the mesh itself it would first make each whole.
    """
    data, fsdp, sequence, tensor = mesh.axis_sizes
    names = ("data", "major", "minor", "tensor")
    kinds = (AxisType.Auto,) * len(names)
    sizes = (data, fsdp * sequence // times, times, tensor)
    split = AbstractMesh(sizes, names, axis_types=kinds, abstract_device=mesh.abstract_device)
    along = {"fsdp": ("major",), "tensor": ("minor", "tensor")}

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> Any:
        axes = parameter_axes([str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)], leaf.ndim)
        places = [sum((along.get(name, ()) for name in RULES[axis]), ()) if axis else () for axis in axes]
        cut = [
            some if some and size % math.prod(split.shape[name] for name in some) == 0 else None
            for size, some in zip(leaf.shape, places, strict=False)
        ]
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(split, PartitionSpec(*cut)))

    return jax.tree_util.tree_map_with_path(of_leaf, params)
