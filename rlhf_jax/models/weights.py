"""Safetensors to parameters and back: read tensor by tensor, each slice to the device that asked for it."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families import Cut, Family
from rlhf_jax.models.transformer import Transformer

Shape = tuple[int, ...]
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
Shardings = Callable[[str], Sharding | None]
"""By the name of a parameter, such as "layer_0/query/kernel"; None is the default device."""


def param_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The shape of every parameter of a Transformer by its name, its layers apart."""
    return dict(_param_shapes(config))


@lru_cache(maxsize=64)
def _param_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Traced once for each config: a model is read and written many times. Scanned, one layer is traced for all."""
    scanned = replace(config, scan_layers=True)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    tree = jax.eval_shape(Transformer(scanned).init, jax.random.key(0), tokens)["params"]
    shapes: dict[str, Shape] = {}
    for name, leaf in flat(tree).items():
        first, _, rest = name.partition("/")
        if first == "layers":
            shapes |= {f"layer_{i}/{rest}": leaf.shape[1:] for i in range(config.n_layers)}
        else:
            shapes[name] = leaf.shape
    return shapes


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by their names joined with "/"."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}/{key}" if prefix else key)
    return found


def count_weights(tree: Any) -> int:
    """Numbers in a tree of arrays, or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree) if hasattr(leaf, "size"))


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """`flat`, undone."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = leaf
    return tree


def layers_apart(config: ModelConfig, leaves: dict[str, Any]) -> dict[str, Any]:
    """Leaves by name, scanned layers one by one. Raises ValueError where they should be scanned and are not."""
    if not config.scan_layers:
        return leaves
    stacked = {name.removeprefix("layers/"): leaf for name, leaf in leaves.items() if name.startswith("layers/")}
    if not stacked:
        raise ValueError("parameters are not those of this config, which has scan_layers: there are no layers")
    leaves = {name: leaf for name, leaf in leaves.items() if not name.startswith("layers/")}
    for name, leaf in stacked.items():
        leaves |= {f"layer_{i}/{name}": leaf[i] for i in range(config.n_layers)}
    return leaves


def layers_stacked(config: ModelConfig, leaves: dict[str, Any]) -> dict[str, Any]:
    """`layers_apart`, undone. Raises ValueError for a leaf that only some of the layers have."""
    if not config.scan_layers:
        return leaves
    found = {name: leaf for name, leaf in leaves.items() if not name.startswith("layer_")}
    for name in {name.partition("/")[2]: None for name in leaves if name.startswith("layer_")}:
        names = [f"layer_{i}/{name}" for i in range(config.n_layers)]
        layers = [leaves[name] for name in names if name in leaves]
        if len(layers) < len(names) or len({layer.shape for layer in layers}) > 1:
            raise ValueError(f"{name} is not alike in all {config.n_layers} layers, which scan_layers needs")
        found[f"layers/{name}"] = jnp.stack(layers)
    return found


def tensor_shape(cut: Cut, shapes: dict[str, Shape]) -> Shape:
    """The shape of the tensor that holds those parts."""
    *rest, _ = shapes[cut.parts[0]]
    shape = (*rest, sum(shapes[part][-1] for part in cut.parts))
    return shape[::-1] if cut.turned else shape


def _places(cut: Cut, part: int, shapes: dict[str, Shape], heads: int) -> np.ndarray:
    """Where along the tensor's output axis the part's columns lie."""
    groups = heads if cut.by_head else 1
    widths = [shapes[name][-1] // groups for name in cut.parts]
    columns = np.arange(shapes[cut.parts[part]][-1])
    return columns // widths[part] * sum(widths) + sum(widths[:part]) + columns % widths[part]


def join(cut: Cut, params: Mapping[str, Any], heads: int) -> np.ndarray:
    """The tensor that holds those parameters, float32, perhaps a view of theirs."""
    shapes = {name: params[name].shape for name in cut.parts}
    if len(cut.parts) == 1:
        tensor = np.asarray(params[cut.parts[0]], np.float32)
    else:
        shape = tensor_shape(cut._replace(turned=False), shapes)
        tensor = np.empty(shape, np.float32)
        for part, name in enumerate(cut.parts):
            tensor[..., _places(cut, part, shapes, heads)] = np.asarray(params[name], np.float32)
    return tensor.T if cut.turned else tensor


class Tensor(NamedTuple):
    """A tensor that is to be written, and how it is made when its turn has come."""

    name: str
    shape: Shape
    make: Callable[[], np.ndarray]

    @property
    def bytes(self) -> int:
        """Its size, float32."""
        return 4 * math.prod(self.shape)


def write_tensors(path: Path, tensors: Sequence[Tensor]) -> None:
    """Writes a safetensors file of float32 tensors, of which only one is in memory at a time.

    The library's own function wants all of them beside each other, twice. Raises ValueError for a tensor of another
    shape than it was to have. The format:
    https://github.com/huggingface/safetensors#format.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.bytes
        header[tensor.name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            array = np.asarray(tensor.make(), np.float32, order="C")
            if array.shape != tensor.shape:
                raise ValueError(f"tensor {tensor.name} is {array.shape}, and was to be {tensor.shape}")
            file.write(array.data)


def shards_of(tensors: Sequence[Tensor], most: int) -> list[list[Tensor]]:
    """The tensors in their order, in parts of at most so many bytes, or of one tensor."""
    shards: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.bytes > room:
            shards.append([])
            room = most
        shards[-1].append(tensor)
        room -= tensor.bytes
    return shards


class Stored(NamedTuple):
    """Where a tensor lies."""

    path: Path
    shape: Shape
    dtype: str
    offset: int


BLOCK = 2**22  # Bytes of a file that are mapped at once.


class _Part(NamedTuple):
    """Where in a file a parameter lies: the numbers along its axes that the tensor's own axes have."""

    stored: Stored
    turned: bool
    axes: list[np.ndarray]


def read_params(
    tensors: list[tuple[Stored, Cut]],
    shapes: dict[str, Shape],
    heads: int,
    sharding_of: Shardings,
    dtype_of: Callable[[str], Any],
    *,
    layers: int = 0,
) -> dict[str, jax.Array]:
    """Parameters by name, each placed as it is read: the host holds one beside those that live on it.

    With `layers`, those of so many layers are read into one array, whose name begins with "layers/".
    """
    found = {}
    for stored, cut in tensors:
        for part, name in enumerate(cut.parts):
            axes = [np.arange(size) for size in shapes[name][:-1]] + [_places(cut, part, shapes, heads)]
            found[name] = _Part(stored, cut.turned, axes)
    params = {}
    for name, one in found.items():
        rest = name.partition("/")[2]
        if not layers or not name.startswith("layer_"):
            params[name] = _place([one], one.axes, sharding_of(name), dtype_of(name))
        elif name == f"layer_0/{rest}":
            each = [found[f"layer_{number}/{rest}"] for number in range(layers)]
            axes, name = [np.arange(layers), *one.axes], f"layers/{rest}"
            params[name] = _place(each, axes, sharding_of(name), dtype_of(name))
    return params


def _place(parts: list[_Part], axes: list[np.ndarray], sharding: Sharding | None, dtype: Any) -> jax.Array:
    """One parameter, or that of several layers along a first axis."""

    def read(axes: list[np.ndarray]) -> np.ndarray:
        out = _aligned(tuple(len(axis) for axis in axes), np.dtype(dtype))
        if len(axes) == len(parts[0].axes):
            _read(parts[0], axes, out)
        else:
            for place, layer in zip(out, axes[0], strict=True):
                _read(parts[layer], axes[1:], place)
        return out

    if sharding is None:
        return jax.device_put(read(axes))
    shape = tuple(len(axis) for axis in axes)
    slices: dict[tuple, np.ndarray] = {}  # Replicas ask for the same one, and the last of them takes it.
    asked = Counter(map(_key, sharding.addressable_devices_indices_map(shape).values()))

    def slice_of(index: Any) -> np.ndarray:
        key = _key(index)
        found = slices.pop(key, None)
        if found is None:
            found = read([axis[part] for axis, part in zip(axes, index, strict=True)])
        asked[key] -= 1
        if asked[key] > 0:
            slices[key] = found
        return found

    return jax.make_array_from_callback(shape, sharding, slice_of)


def _key(index: Any) -> tuple[tuple[int | None, int | None], ...]:
    return tuple((part.start, part.stop) for part in index)


def _aligned(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """An empty array at a multiple of 64 bytes, where the CPU backend takes it over without a copy."""
    size = dtype.itemsize * math.prod(shape)
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)


def _read(part: _Part, axes: list[np.ndarray], out: np.ndarray) -> None:
    """Fills `out` with the block where those numbers along our axes cross; the file is mapped block by block."""
    stored = part.stored
    rows, *others = axes[::-1] if part.turned else axes
    target = out.T if part.turned else out
    row_bytes = np.dtype(DTYPES[stored.dtype]).itemsize * math.prod(stored.shape[1:])
    step = max(1, BLOCK // row_bytes)
    for begin in range(0, len(rows), step):
        wanted = rows[begin : begin + step]
        low, high = int(wanted[0]), int(wanted[-1]) + 1
        place, dtype = stored.offset + low * row_bytes, DTYPES[stored.dtype]
        block = np.memmap(stored.path, dtype, "r", place, (high - low, *stored.shape[1:]))
        target[begin : begin + step] = block[(_index(wanted - low), *map(_index, others))]


def same_values(first: Stored, second: Stored) -> bool:
    """Whether two tensors hold the same numbers, be it in other types; the files are mapped block by block."""
    if first.shape != second.shape:
        return False
    step = max(1, BLOCK // (4 * math.prod(first.shape[1:])))
    return all(
        np.array_equal(_rows(first, start, start + step), _rows(second, start, start + step))
        for start in range(0, first.shape[0], step)
    )


def _rows(stored: Stored, start: int, end: int) -> np.ndarray:
    dtype, width = np.dtype(DTYPES[stored.dtype]), math.prod(stored.shape[1:])
    shape = (min(end, stored.shape[0]) - start, *stored.shape[1:])
    block = np.memmap(stored.path, dtype, "r", stored.offset + start * width * dtype.itemsize, shape)
    return block.astype(np.float32)


def _index(places: np.ndarray) -> slice | np.ndarray:
    low, high = int(places[0]), int(places[-1]) + 1
    return slice(low, high) if high - low == len(places) else places


def find_tensors(files: list[Path]) -> dict[str, Stored]:
    """Where each tensor lies; nothing is read but the headers.

    The format: https://github.com/huggingface/safetensors#format. Raises FileNotFoundError or ValueError.
    """
    found: dict[str, Stored] = {}
    for path in files:
        if not path.exists():
            raise FileNotFoundError(f"{path.parent} has no {path.name}, which its index names")
        try:
            with safe_open(path, framework="numpy"):  # checks the header against the file's size
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, value in header.items():
            if name in found:
                raise ValueError(f"{path.parent}: tensor {name} is in {found[name].path.name} and in {path.name}")
            found[name] = Stored(path, tuple(value["shape"]), value["dtype"], 8 + length + value["data_offsets"][0])
    return found


QUANTIZED = (".qweight", ".qzeros", ".scales", ".g_idx", ".weight_scale", ".weight_scale_inv", ".SCB", ".absmax")
"""Ends of the names of tensors that stand beside quantised weights."""


def refuse_quantized(folder: Path, found: dict[str, Stored]) -> None:
    """Raises ValueError for a tensor that is quantised, or goes with one that is."""
    for name, stored in found.items():
        if name.endswith(QUANTIZED) or (name.endswith(".weight") and stored.dtype not in DTYPES):
            raise ValueError(
                f"{folder}: tensor {name} is {stored.dtype}, of weights that are quantised: not supported; only"
                f" {', '.join(DTYPES)} are read"
            )


def their_name(family: Family, cuts: Mapping[str, Cut], theirs: str) -> str:
    """The name that a tensor would have in a whole model of today."""
    name = dict(family.older_names).get(theirs, theirs)
    return family.prefix + name if name not in cuts and family.prefix + name in cuts else name  # a bare model's


def match(
    folder: Path, family: Family, cuts: dict[str, Cut], found: dict[str, Stored], shapes: dict[str, Shape]
) -> list[tuple[Stored, Cut]]:
    """The tensors to read. Raises ValueError for one that is missing, misshapen, there twice or without a place.

    A head that the config has no place for is a copy of the tied embedding, or a classifier does without it.
    """
    refuse_quantized(folder, found)
    wanted = {name: cut for name, cut in cuts.items() if all(part in shapes for part in cut.parts)}
    matched: dict[str, tuple[Stored, Cut]] = {}
    others = []
    for theirs, stored in found.items():
        name = their_name(family, cuts, theirs)
        if name in matched:
            raise ValueError(f"{folder}: tensor {name} is there twice, the second time as {theirs}")
        if name in wanted:
            expected = tensor_shape(wanted[name], shapes)
            if stored.shape != expected:
                raise ValueError(
                    f"{folder}: tensor {theirs} has shape {stored.shape}, its config.json says {expected}"
                )
            if stored.dtype not in DTYPES:
                raise ValueError(f"{folder}: tensor {theirs} is {stored.dtype}, and only {', '.join(DTYPES)} are read")
            matched[name] = stored, wanted[name]
        elif name != "lm_head.weight" and not theirs.endswith(family.passed_over):
            others.append(theirs)
    for name in wanted:
        if name not in matched:
            raise ValueError(f"{folder}: tensor {name} is missing")
    if others:
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        raise ValueError(f"{folder}: tensor {min(others)}{more} has no place in a {family.name}")
    return list(matched.values())
