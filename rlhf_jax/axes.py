"""Which axis of an array lies along which axis of a mesh: one table for parameters and for what is computed.

Under `jax.set_mesh(make_mesh(...))` (see `sharding.py`) the model asks for these places by `constrain`, and XLA adds
the collectives. Without such a mesh nothing is asked for.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "sequence", "tensor")
"""Copies of the model; parts of each parameter, whole again where it is used; parts of each sequence; parts of each
layer's work."""
COPIES = "copies"
"""Its name for "data" within `over_copies`."""

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "copy": ("data",),
    "row": ("data", "fsdp", "sequence", "tensor"),
    "time": ("sequence",),
    "piece": ("sequence", "data", "fsdp"),
    "embed": ("fsdp", "sequence"),
    "columns": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "attending": ("tensor", "sequence"),
}
"""The axes of the mesh that an array's axis is cut along, by what it stands for, as far as they divide it.

"row" is for work that could be cut along nothing else, "copy" for rows that all parts of one parameter see, "piece"
for the parts of sequences laid out as rows, "columns" for "embed" where the sequence is cut already, "attending" for
heads while each of them reads whole sequences. "tensor" should divide the heads of the keys, too.
"""

LINEAR = {
    "query": ("embed", "heads"),
    "key": ("embed", "heads"),
    "value": ("embed", "heads"),
    "output": ("heads", "embed"),
    "gate": ("embed", "hidden"),
    "up": ("embed", "hidden"),
    "down": ("hidden", "embed"),
}
"""In and out of each linear map of a block."""

PARAMETERS: dict[str, tuple[str | None, ...]] = {
    "embedding": ("vocab", "embed"),
    "position_embedding": (None, "embed"),
    "head": ("embed", "vocab"),
    **{f"{name}/kernel": axes for name, axes in LINEAR.items()},
    **{f"{name}/kernel_scale": (out,) for name, (_, out) in LINEAR.items() if out != "embed"},
    **{f"{name}/bias": (out,) for name, (_, out) in LINEAR.items() if out != "embed"},
    **{f"{name}/lora_a": (into, None) for name, (into, _) in LINEAR.items()},
    **{f"{name}/lora_b": (None, out) for name, (_, out) in LINEAR.items()},
}
"""The last names of a parameter's path -> its axes. Others (norms, scalar heads: vectors) are whole everywhere."""


def parameter_axes(names: Sequence[str], ndim: int) -> tuple[str | None, ...]:
    """The axes of a parameter, or of what has its name and rank (gradients, moments), by the names on its path.

    An axis of layers may lie before them. What has another rank than the table says is whole everywhere.
    """
    axes = PARAMETERS.get("/".join(names[-2:])) or PARAMETERS.get(names[-1] if names else "") or ()
    layers = ndim - len(axes)
    return (None,) * layers + axes if axes and layers in (0, 1) else ()


def partition_spec(sizes: Mapping[str, int], shape: Sequence[int], axes: Sequence[str | None]) -> PartitionSpec:
    """The table for one array on a mesh of those sizes; axes of the array that are not named stay whole.

    Each axis of the mesh is used once, by the first that the rules give it to. An axis of the array is cut along as
    many of its mesh axes, in order, as divide it.
    """
    used: set[str] = set()
    entries: list[str | tuple[str, ...] | None] = []
    for size, axis in zip(shape, axes, strict=False):
        along: tuple[str, ...] = ()
        for name in RULES[axis] if axis else ():
            if sizes.get(name, 1) > 1 and name not in used:
                if size % math.prod(sizes[n] for n in (*along, name)):
                    break
                along = (*along, name)
        used |= set(along)
        entries.append(along[0] if len(along) == 1 else along or None)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _sizes() -> dict[str, int]:
    """The sizes of the mesh that is set; empty for none, for another's, and for axes that somebody else manages."""
    mesh = jax.sharding.get_abstract_mesh()
    if not set(MESH_AXES) <= set(mesh.axis_names):
        return {}
    return {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    }


def constrain(x: Any, *axes: str | None) -> Any:
    """The array x where the table says that an array of these axes lies; x itself without a mesh."""
    sizes = _sizes()
    if math.prod(sizes.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(sizes, x.shape, axes))


def parts(size: int, axis: str) -> int:
    """Into how many parts an axis of that size is cut; 1 without a mesh."""
    sizes = _sizes()
    entry = (*partition_spec(sizes, (size,), (axis,)), ())[0]
    return math.prod(sizes[name] for name in ((entry,) if isinstance(entry, str) else entry))


def ways(axis: str) -> int:
    """Into how many parts the mesh cuts an axis of a size that divides."""
    sizes = _sizes()
    return math.prod(sizes.get(name, 1) for name in RULES[axis])


def on_parts(function: Callable[..., Any], arrays: Sequence[Any], axes: Sequence[Sequence[str | None]]) -> Any:
    """function(*arrays), by each device for its parts of arrays of these axes; without a mesh, at once.

    For what XLA cannot cut by itself, such as kernels. The result has the axes of the first array.
    """
    sizes = _sizes()
    if math.prod(sizes.values()) == 1:
        return function(*arrays)
    specs = tuple(partition_spec(sizes, x.shape, names) for x, names in zip(arrays, axes, strict=True))
    over = jax.shard_map(function, in_specs=specs, out_specs=specs[0], axis_names=set(sizes), check_vma=False)
    return over(*arrays)


def over_copies(
    function: Callable[..., tuple[Any, Any]], arrays: Sequence[Any], axes: Sequence[int], copies: int
) -> Any:
    """function(*arrays) for each of the copies of the weights that lie along "data"; for one, as it is.

    `axes` are those along which the arrays have rows. So has the first result, along its first axis; the second is
    alike for all copies. It is one program: within it `sum_over_copies` adds up the copies' numbers, and a loop whose
    end depends on such sums is one loop for all. "tensor" goes by the rules; the other axes of the mesh are 1.
    """
    if copies == 1:
        return function(*arrays)
    mesh = jax.sharding.get_abstract_mesh()
    sizes = copies, *(mesh.shape[name] if name == "tensor" else 1 for name in MESH_AXES)
    kinds = (AxisType.Auto,) * len(sizes)
    apart = AbstractMesh(sizes, (COPIES, *MESH_AXES), axis_types=kinds, abstract_device=mesh.abstract_device)

    def cut(x: Any, axis: int) -> Any:
        split = x.reshape(*x.shape[:axis], copies, -1, *x.shape[axis + 1 :])
        return jax.lax.with_sharding_constraint(split, NamedSharding(apart, PartitionSpec(*(None,) * axis, COPIES)))

    with jax.sharding.use_abstract_mesh(apart):
        mapped = jax.vmap(function, tuple(axes), (0, None), axis_name=COPIES, spmd_axis_name=COPIES)
        rows, alike = mapped(*map(cut, arrays, axes))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows), alike


def sum_over_copies(x: Any) -> Any:
    """The sum of x over all copies, within the function of `over_copies`; x itself where there is one."""
    return jax.lax.psum(x, COPIES) if COPIES in jax.sharding.get_abstract_mesh().axis_names else x
