"""Hugging Face checkpoints written as config.json and safetensors, with the tokenizer and a card."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.models.card import ModelCard, card_text
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families import family_of
from rlhf_jax.models.files import write_text
from rlhf_jax.models.hf import BIAS, SCORE, without_head
from rlhf_jax.models.tokenizer import with_padding
from rlhf_jax.models.transformer import LORA_LEAVES
from rlhf_jax.models.weights import (
    Tensor,
    flat,
    join,
    layers_apart,
    param_shapes,
    shards_of,
    tensor_shape,
    write_tensors,
)

WEIGHTS = "model.safetensors"
SHARD = 5 * 10**9
"""Bytes of a file of weights; more are several files."""
KERNEL_PARTS = ("kernel", "kernel_scale", *LORA_LEAVES)
ONE_LABEL = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
"""Rows of config.json for a classifier with one label. A language model may have them: it is then loaded as one."""


def save_hf(
    path: str | Path,
    config: ModelConfig,
    params: Any,
    *,
    tokenizer: Any = None,
    eos_id: int | tuple[int, ...] | None = None,
    one_label: bool = False,
    card: ModelCard | None = None,
) -> None:
    """Writes a folder that transformers loads, as the language model that `config.family` names, with the same logits.

    Adapters are merged, and int8 becomes float32, one tensor at a time: the whole model is never beside `params`.
    The tokenizer too if given: it pads on the left, as generating wants it. `eos_id` are the tokens that end an
    answer, by default the tokenizer's EOS. With `one_label` a classifier over this model has one, as PEFT needs it for
    a reward model's adapter. A README.md says what `card` does. Each file is written whole or not at all. Raises
    ValueError when `params` are not those of `config`, or no model of that family has such a config.
    """
    family = family_of(config)
    name = family.language_model or f"{family.classes}ForCausalLM"
    leaves = _layers_apart(config, params)
    if tokenizer is not None:
        tokenizer = with_padding(tokenizer, config.vocab_size, side="left")
    labels = ONE_LABEL if one_label else {}
    generation = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # otherwise top_k is 50
    _save(Path(path), config, name, leaves, {}, _ends(tokenizer, eos_id), labels, generation, tokenizer, card)


def save_hf_reward_model(
    path: str | Path,
    config: ModelConfig,
    params: Any,
    *,
    tokenizer: Any = None,
    eos_id: int | tuple[int, ...] | None = None,
    card: ModelCard | None = None,
) -> None:
    """Writes a ScalarModel as a …ForSequenceClassification with one label, whose logit is the reward.

    The files are those of `save_hf`. transformers reads the reward at the last token that is not padding: a tokenizer
    whose padding is the EOS, or that has none, is saved with another padding token, and where there is no other the
    embedding gets a row for one. Such a model has no weight for the head's bias: it is written to config.json, and
    only `load_hf_reward_model` reads it. Others get all rewards shifted by it, which the README.md says.
    Raises ValueError for parameters that are not a ScalarModel's.
    """
    if set(params) != {"trunk", "head"}:
        raise ValueError(f"parameters {sorted(params)} are not those of a ScalarModel: ['head', 'trunk']")
    family = family_of(config)
    name = f"{family.classes}ForSequenceClassification"
    bias = float(params["head"]["bias"])
    score = {SCORE: np.asarray(params["head"]["kernel"], np.float32)[None]}
    leaves = _layers_apart(without_head(config), params["trunk"])
    if tokenizer is not None:
        tokenizer = with_padding(tokenizer, config.vocab_size, side="right", may_grow=True)
        if (more := tokenizer.pad_token_id + 1 - config.vocab_size) > 0:
            table = np.asarray(leaves["embedding"], np.float32)
            leaves["embedding"] = np.pad(table, ((0, more), (0, 0)))
            config = replace(config, vocab_size=config.vocab_size + more)
    card = card or ModelCard()
    if bias:
        said = f"the model's logit + {bias:.6g} ({BIAS} in config.json, the same for every text)"
        card = card._replace(facts={**(card.facts or {}), "Reward": said})
    labels = ONE_LABEL | ({BIAS: bias} if bias else {})
    _save(Path(path), config, name, leaves, score, _ends(tokenizer, eos_id), labels, {}, tokenizer, card)


def _ends(tokenizer: Any, eos_id: int | tuple[int, ...] | None) -> dict[str, Any]:
    """The rows of both configs for beginning, end and padding: the ends are a list where they are several."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ends = {name: None if tokenizer is None else getattr(tokenizer, name) for name in names}
    if eos_id is not None:
        several = [eos_id] if isinstance(eos_id, int) else list(eos_id)
        ends["eos_token_id"] = several[0] if len(several) == 1 else several
    return ends


def _save(
    folder: Path,
    config: ModelConfig,
    class_name: str,
    leaves: Mapping[str, Any],
    tensors: dict[str, np.ndarray],
    ends: dict[str, Any],
    more: dict[str, Any],
    generation: dict[str, Any],
    tokenizer: Any,
    card: ModelCard | None,
) -> None:
    family = family_of(config)
    hf = {"architectures": [class_name], **family.write(config), "dtype": "float32", **ends, **more}
    shapes = {name: np.shape(leaf) for name, leaf in leaves.items()}
    written = [Tensor(name, tensor.shape, partial(np.asarray, tensor)) for name, tensor in tensors.items()]
    for name, cut in family.places(config.n_layers).items():
        if all(part in leaves for part in cut.parts):
            make = partial(join, cut, leaves, config.n_heads)
            written.append(Tensor(name, tensor_shape(cut, shapes), make))

    folder.mkdir(parents=True, exist_ok=True)
    _write_shards(folder, written)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_text(folder / "config.json", json.dumps(hf, indent=2) + "\n")
    generation = generation | {name: value for name, value in ends.items() if value is not None}
    write_text(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    write_text(
        folder / "README.md", card_text(class_name, sum(leaf.size for leaf in leaves.values()), card or ModelCard())
    )


def _write_shards(folder: Path, tensors: list[Tensor]) -> None:
    """One file, or several with an index, as transformers writes them; each whole or not at all."""
    shards = shards_of(tensors, SHARD)
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        temporary = folder / f"{name}.tmp"
        write_tensors(temporary, shard)
        temporary.replace(folder / name)
    if len(shards) > 1:
        places = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(tensor.bytes for tensor in tensors)}, "weight_map": places}
        write_text(folder / f"{WEIGHTS}.index.json", json.dumps(index, indent=2) + "\n")
    else:
        (folder / f"{WEIGHTS}.index.json").unlink(missing_ok=True)
    for older in folder.glob("model*.safetensors"):  # which would be read in place of these
        if older.name not in names:
            older.unlink()


class _Merged:
    """A kernel that is merged with its adapter, and with its scale if it is int8, when numpy asks for it.

    It is `merge_lora` in numpy: only one of many processes writes, and may not start a program on the mesh alone.
    """

    def __init__(self, parts: Mapping[str, Any], layer: int | None = None):
        self._parts, self._layer = parts, layer
        self.shape = np.shape(parts["kernel"])[int(layer is not None) :]
        self.size = math.prod(self.shape)

    def __getitem__(self, layer: int) -> "_Merged":
        return _Merged(self._parts, layer)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        parts = {
            name: np.asarray(leaf if self._layer is None else leaf[self._layer], np.float32)
            for name, leaf in self._parts.items()
        }
        kernel = parts["kernel"]
        if "kernel_scale" in parts:
            kernel = kernel * parts["kernel_scale"][..., None, :]
        if "lora_a" in parts:
            kernel = kernel + parts["lora_a"] @ parts["lora_b"] * parts["lora_scale"][..., None, None]
        return kernel if dtype is None else kernel.astype(dtype, copy=False)


def _merged(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves without those of adapters and scales, which are in the kernels that these belong to."""
    found, kernels = dict(leaves), {name.removesuffix("kernel") for name in leaves if name.endswith("/kernel")}
    for module in kernels:
        parts = {part: found.pop(module + part) for part in KERNEL_PARTS if module + part in found}
        found[f"{module}kernel"] = _Merged(parts) if len(parts) > 1 else parts["kernel"]
    return found


def _layers_apart(config: ModelConfig, params: Any) -> dict[str, Any]:
    """Leaves by name, scanned layers one by one, adapters to be merged. Raises ValueError unless they are those of the
    config."""
    leaves = layers_apart(config, _merged(flat(params)))
    shapes = param_shapes(config)
    for name in [*shapes, *leaves]:
        has, wants = np.shape(leaves[name]) if name in leaves else "none", shapes.get(name, "none")
        if has != wants:
            raise ValueError(f"parameters are not those of this config: {name} is {has}, and should be {wants}")
    return leaves
