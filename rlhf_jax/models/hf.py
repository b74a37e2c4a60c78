"""Hugging Face checkpoints read from config.json and safetensors. No torch, no pickle, no code of theirs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families import FAMILIES, Cut, Family
from rlhf_jax.models.files import checkpoint_folder, read_json
from rlhf_jax.models.precision import FLOAT32, NORMS_AND_BIASES, Precision
from rlhf_jax.models.rows import check_rows, quantized_by, unread_rows
from rlhf_jax.models.weights import (
    DTYPES,
    find_tensors,
    flat,
    match,
    nested,
    param_shapes,
    read_params,
    same_values,
    their_name,
)

SCORE = "score.weight"
BIAS = "reward_bias"
"""The name in config.json of a reward model's bias: a number that others pass over, and that shifts all rewards."""


def load_hf(
    path_or_name: str | Path,
    *,
    shardings: Callable[[str], Sharding] | Any = None,
    precision: Precision = FLOAT32,
    scan_layers: bool = False,
) -> tuple[ModelConfig, Any]:
    """Reads a language model, as (config, params of a Transformer), both in that precision.

    With `scan_layers` the parameters of all layers are read into one array each, such as "layers/query/kernel".

    A folder never touches the network; anything else is taken for a hub name. Weights may be fp32, bf16 or fp16, in
    one file or in shards with an index.

    `shardings` is a tree like that of the parameters, or a function from a parameter's name ("layer_0/query/kernel")
    to its sharding: each device then gets its slice as it is read from the file, one tensor after another. Without
    it, all go to the default device.

    Raises FileNotFoundError or ValueError, in one line that names the file and the tensor, for what is missing,
    broken, misshapen or of an architecture that is not in `families.FAMILIES`.
    """
    folder = checkpoint_folder(path_or_name)
    hf, family, config = _read_config(folder, precision)
    if kinds := [kind for kind in _classes(hf) if kind.endswith("ForSequenceClassification")]:
        raise ValueError(f"{folder} holds a {kinds[0]}: load_hf_reward_model reads it")
    config = replace(_as_stored(folder, family, config), scan_layers=scan_layers)
    return config, nested(_load(folder, family, config, {}, _by_name(shardings)))


def load_hf_config(path_or_name: str | Path, *, precision: Precision = FLOAT32) -> ModelConfig:
    """Only the config of what `load_hf` reads. Raises as it does."""
    folder = checkpoint_folder(path_or_name)
    _, family, config = _read_config(folder, precision)
    return _as_stored(folder, family, config)


def unread(path_or_name: str | Path) -> list[str]:
    """A line for all that a checkpoint's configs say and that is not used. Raises as `load_hf` does."""
    folder = checkpoint_folder(path_or_name)
    hf, family, _ = _read_config(folder, FLOAT32)
    path = folder / "generation_config.json"
    return unread_rows(folder, hf, read_json(path) if path.exists() else {}, family)


def load_hf_reward_model(
    path_or_name: str | Path,
    *,
    shardings: Callable[[str], Sharding] | Any = None,
    precision: Precision = FLOAT32,
    scan_layers: bool = False,
) -> tuple[ModelConfig, Any]:
    """Reads a …ForSequenceClassification with one label, as (config, params of a ScalarModel).

    As `load_hf`; names are those of a ScalarModel ("trunk/layer_0/query/kernel", "head/kernel"). The bias is that
    which `save_hf_reward_model` wrote into config.json, else 0. Raises ValueError for another number of labels, and
    for a bias that is no number.
    """
    folder = checkpoint_folder(path_or_name)
    hf, family, config = _read_config(folder, precision)
    config = replace(config, scan_layers=scan_layers)
    kinds = _classes(hf)
    if kinds and not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ValueError(f"{folder} holds a {kinds[0]}, and a reward model is a …ForSequenceClassification")
    labels = len(hf["id2label"]) if isinstance(hf.get("id2label"), dict) else hf.get("num_labels") or 2
    if labels != 1:
        raise ValueError(f"{folder / 'config.json'}: {labels} labels, and a reward model has one")
    sharding_of = _by_name(shardings)

    def place(name: str) -> Sharding | None:
        return sharding_of(name if name.startswith("head/") else f"trunk/{name}")

    score = {SCORE: Cut(("head/kernel",), turned=True)}
    params = _load(folder, family, without_head(config), score, place)
    bias = hf.get(BIAS, 0.0)
    if isinstance(bias, bool) or not isinstance(bias, int | float):
        raise ValueError(f"{folder / 'config.json'}: {BIAS} is {bias!r}, not a number")
    head = {"kernel": params.pop("head/kernel")[:, 0], "bias": np.float32(bias)}
    head["bias"] = jax.device_put(head["bias"], sharding_of("head/bias"))
    return config, {"trunk": nested(params), "head": head}


def _classes(hf: dict[str, Any]) -> list[str]:
    named = hf.get("architectures") or []
    return [str(kind) for kind in (named if isinstance(named, list) else [named])]


def _as_stored(folder: Path, family: Family, config: ModelConfig) -> ModelConfig:
    """Untied where the file has a head of its own: transformers ties a head that is the embedding, and no other."""
    if not config.tie_embeddings:
        return config
    cuts = family.places(0)
    stored = find_tensors(_weight_files(folder, missing_ok=True))
    found = {their_name(family, cuts, theirs): tensor for theirs, tensor in stored.items()}
    names = [name for name, cut in cuts.items() if cut.parts in (("embedding",), ("head",)) and name in found]
    pair = [found[name] for name in names]
    if len(pair) < 2 or {tensor.dtype for tensor in pair} - set(DTYPES) or same_values(*pair):
        return config
    return replace(config, tie_embeddings=False)


def _load(
    folder: Path,
    family: Family,
    config: ModelConfig,
    more: dict[str, Cut],
    sharding_of: Callable[[str], Sharding | None],
) -> dict[str, jax.Array]:
    shapes = param_shapes(config) | {part: (config.d_model, 1) for cut in more.values() for part in cut.parts}
    cuts = family.places(config.n_layers) | more
    tensors = match(folder, family, cuts, find_tensors(_weight_files(folder)), shapes)

    def dtype_of(name: str) -> Any:
        in_float32 = name.startswith("head/") or name.rpartition("/")[2] in NORMS_AND_BIASES
        return np.float32 if in_float32 else config.precision.parameters

    layers = config.n_layers if config.scan_layers else 0
    return read_params(tensors, shapes, config.n_heads, sharding_of, dtype_of, layers=layers)


def without_head(config: ModelConfig) -> ModelConfig:
    """The config of a trunk that has no language head."""
    return replace(config, tie_embeddings=True)


def _by_name(shardings: Any) -> Callable[[str], Sharding | None]:
    if shardings is None:
        return lambda name: None
    if callable(shardings):
        return shardings
    by_name = flat(shardings)

    def sharding_of(name: str) -> Sharding:
        if name not in by_name:
            raise ValueError(f"shardings have none for {name}: they need the tree of the parameters, or be a function")
        return by_name[name]

    return sharding_of


def _weight_files(folder: Path, *, missing_ok: bool = False) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():  # before the index, as transformers has it
        return [folder / "model.safetensors"]
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(_is_name(shard) for shard in places.values()):
            raise ValueError(f"{index} has no weight_map from tensors to files of the folder")
        return [folder / shard for shard in sorted(set(places.values()))]
    if missing_ok:
        return []
    if files := sorted(folder.glob("*.gguf")):
        raise ValueError(f"{files[0]}: quantised by gguf: not supported; take the model that it was made from")
    raise FileNotFoundError(
        f"{folder} has no model.safetensors (nor an index of shards); pickled weights are not read: save it anew"
    )


def _is_name(shard: Any) -> bool:
    return isinstance(shard, str) and Path(shard).name == shard != ""


def _read_config(folder: Path, precision: Precision) -> tuple[dict[str, Any], Family, ModelConfig]:
    path = folder / "config.json"
    if not path.exists() and (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds an adapter and no model: merge it into its model, and give that one")
    hf = read_json(path)
    if method := quantized_by(folder, hf):
        raise ValueError(f"{folder}: quantised by {method}: not supported; take the model that it was made from")
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json) beside a model, and transformers reads the adapter over"
            " the model that it names: merge it, or take the file out"
        )
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{path}: model_type {kind!r} is not supported, only {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[kind]
    try:
        config = family.read(hf)
        check_rows(hf, family, config)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise ValueError(f"{path}: {error}") from None
    return hf, family, replace(config, precision=precision)
