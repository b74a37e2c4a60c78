"""A mesh of devices, and everything placed on it by the one table of `axes.py`.

    with jax.set_mesh(make_mesh("fsdp=8,tensor=4")):
        params = create(lambda: model.init(key, tokens)["params"])     # never whole on one device
        state = make_state(model, params, optimizer)
        state, metrics = train_step(state, shard_batch(batch))

Under `jit` a mean over a sharded batch is already global: no loss has a collective. Vectors (norms, scalar heads) and
what the mesh does not divide lie whole on every device; matrices are cut along "fsdp", "sequence" and "tensor",
batches along "data" and "fsdp", and the sequences in them along "sequence" where a model reads them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rlhf_jax.axes import MESH_AXES, parameter_axes, partition_spec, parts
from rlhf_jax.errors import UserError
from rlhf_jax.hosts import gather, many

Tree = TypeVar("Tree")
Item = TypeVar("Item")


def make_mesh(sizes: str = "", *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes of `MESH_AXES` from a string such as "fsdp=8,tensor=4".

    Axes that are not named have size 1. One may be −1: what is left of the devices; "data" is, where the string does
    not name it. `devices` are all of them unless given, and may be those of a topology that is not there.

    Raises UserError for a string that says something else, and for sizes that are not as many as the devices.
    """
    devices = jax.devices() if devices is None else devices
    found: dict[str, int] = {}
    names = ", ".join(f"{name}=N" for name in MESH_AXES)
    for part in filter(None, (part.strip() for part in sizes.split(","))):
        name, _, size = part.partition("=")
        if name not in MESH_AXES or name in found or not size.removeprefix("-").isdecimal():
            raise UserError(f"mesh {sizes!r}: {part!r} is not one of {names}, each at most once")
        found[name] = int(size)
    if -1 not in found.values():
        found.setdefault("data", -1)
    rest = [name for name, size in found.items() if size == -1]
    given = math.prod(size for size in found.values() if size != -1)
    if len(rest) > 1 or given < 1 or any(size < 1 for size in found.values() if size != -1):
        raise UserError(f"mesh {sizes!r}: sizes are positive, but that one may be -1, what is left of the devices")
    if len(devices) % given or (not rest and given != len(devices)):
        raise UserError(f"mesh {sizes!r} is for {given} devices{' each' if rest else ''}; there are {len(devices)}")
    found |= {name: len(devices) // given for name in rest}
    shape, kinds = tuple(found.get(name, 1) for name in MESH_AXES), (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=kinds, devices=devices)
    except NotImplementedError:  # an axis is none of the slice's own, nor several of them
        split = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(split, MESH_AXES, axis_types=kinds)


def current_mesh() -> Mesh | AbstractMesh | None:
    """The mesh that `jax.set_mesh` has set, without its devices inside `jit`; None if there is none of ours."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names != MESH_AXES:
        return None
    try:
        return jax.sharding.get_mesh()
    except ValueError:  # inside jit
        return mesh


def shardings(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """A NamedSharding for each leaf, by the names on its path and its shape.

    Good for parameters and adapters, a TrainState (an optimiser's moments have the parameters' names), PPO's State
    and Frozen, alike whether their leaves are arrays or ShapeDtypeStructs. Unknown names lie whole on every device.
    """

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        return parameter_sharding(mesh, "/".join(names), np.shape(leaf))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def parameter_sharding(mesh: Mesh | AbstractMesh, name: str, shape: Sequence[int]) -> NamedSharding:
    """The sharding of one parameter, by its name, such as "layer_0/query/kernel", and its shape."""
    axes = parameter_axes(name.split("/"), len(shape))
    return NamedSharding(mesh, partition_spec(mesh.shape, shape, axes))


def batch_shardings(mesh: Mesh | AbstractMesh, tree: Any, *, axis: int = 0) -> Any:
    """A NamedSharding for each leaf, its rows (those of `axis`) cut along "data" and "fsdp" as far as these divide."""
    names = (None,) * axis + ("batch",)
    return jax.tree.map(lambda x: NamedSharding(mesh, partition_spec(mesh.shape, np.shape(x), names)), tree)


def shard_params(tree: Tree) -> Tree:
    """Parameters and states on the mesh that is set, each slice straight to its device; on the default one without."""
    mesh = current_mesh()
    return jax.device_put(tree) if mesh is None else _put(tree, mesh, shardings(mesh, tree))


def constrain_params(tree: Tree) -> Tree:
    """Parameters, gradients or states inside `jit`, kept where `shard_params` puts them; untouched without a mesh."""
    return tree if current_mesh() is None else shard_params(tree)


def shard_batch(tree: Tree, *, axis: int = 0) -> Tree:
    """A batch on the mesh that is set, in or outside of `jit`; untouched without one."""
    mesh = current_mesh()
    return tree if mesh is None else _put(tree, mesh, batch_shardings(mesh, tree, axis=axis))


def host_share() -> tuple[int, int]:
    """(number, count): which of how many equal shares of a batch's rows lies on this process's devices.

    (0, 1), all rows, for one process, and where processes have rows in common other than whole shares.
    """
    mesh = current_mesh()
    if not many() or not isinstance(mesh, Mesh):
        return 0, 1
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    rows: dict[int, set[int]] = {}
    places: Mapping[Any, Any] = NamedSharding(mesh, PartitionSpec(("data", "fsdp"))).devices_indices_map((ways,))
    for device, index in places.items():
        rows.setdefault(device.process_index, set()).add(index[0].start or 0)
    shares = sorted({tuple(sorted(some)) for some in rows.values()})
    if len({len(share) for share in shares}) > 1 or sum(map(len, shares)) != ways:
        return 0, 1
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def in_shares(function: Callable[[Item], Any], items: Sequence[Item]) -> list[Any]:
    """[function(item) for item in items], each called once: by a process whose `host_share` has the item's number.

    All processes get all values, which JSON can hold. There are as many items as shares.
    Raises UserError in every process when a call raises it in one.
    """
    number = host_share()[0]
    numbers = gather(number)
    said: dict[str, Any] | None = None
    if numbers.index(number) == jax.process_index():
        try:
            said = {"value": function(items[number])}
        except UserError as error:
            said = {"error": str(error)}
    heard = [some for some in gather(said) if some is not None]
    for some in heard:
        if "error" in some:
            raise UserError(some["error"])
    order = sorted(set(numbers), key=numbers.index)
    return [heard[order.index(share)]["value"] for share in range(len(items))]


def shard_host_rows(tree: Tree, *, axis: int = 0) -> Tree:
    """Does what `shard_batch` does, for a batch of which each process has read its `host_share` only."""
    mesh, (_, count) = current_mesh(), host_share()
    if mesh is None or count == 1:
        return shard_batch(tree, axis=axis)

    def of_leaf(x: Any) -> jax.Array:
        shape = (*x.shape[:axis], x.shape[axis] * count, *x.shape[axis + 1 :])
        sharding = NamedSharding(mesh, partition_spec(mesh.shape, shape, (None,) * axis + ("batch",)))
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(of_leaf, tree)


def _put(tree: Tree, mesh: Mesh | AbstractMesh, places: Any) -> Tree:
    if isinstance(mesh, AbstractMesh):
        return jax.lax.with_sharding_constraint(tree, places)
    return jax.tree.map(_put_part, tree, places) if many() else jax.device_put(tree, places)


def _put_part(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Puts this process's part of what each has whole; `device_put` would first compare all of it over the network."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def to_host(tree: Tree) -> Tree:
    """Every array whole, as numpy's. All processes ask together: each has only its part of some arrays."""

    def of_leaf(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(of_leaf, tree)


def create(function: Callable[..., Tree], *args: Any) -> Tree:
    """function(*args), its result born in its places on the mesh that is set: nothing is ever whole on one device."""
    mesh = current_mesh()
    if mesh is None:
        return function(*args)
    if isinstance(mesh, AbstractMesh):
        return shard_params(function(*args))
    places = shardings(mesh, jax.eval_shape(function, *args))
    return jax.jit(function, out_shardings=places)(*shard_params(args))


def check_rows(rows: int, what: str) -> None:
    """Raises UserError when so many rows do not divide over the mesh that is set."""
    mesh = current_mesh()
    if mesh is None:
        return
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if parts(rows, "batch") != ways:
        raise UserError(f"{rows} {what} do not divide over data × fsdp = {ways} parts of the mesh")
