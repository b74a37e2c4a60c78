"""Adapters in and out in PEFT's form: adapter_config.json and adapter_model.safetensors. No torch, no pickle.

The format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf import family_of, read_json, write_text
from rlhf_jax.models.transformer import LORA_LEAVES
from rlhf_jax.models.weights import flat, layers_apart, layers_stacked, nested, param_shapes

PREFIX = "base_model.model."
PLAIN = {"use_dora": False, "bias": "none", "modules_to_save": None, "alpha_pattern": {}, "layer_replication": None}
"""Of adapter_config.json: what else there may be changes what an adapter computes, and is not read."""


def save_peft(path: str | Path, config: ModelConfig, adapter: Any, *, base_model: str | None = None) -> None:
    """Writes a folder that PEFT loads over the language model that `config.family` names, with the same logits.

    `base_model` is the folder or the hub name of the trunk. Each file is written whole or not at all. rsLoRA's scale
    is written as the α that gives it. Raises ValueError for an adapter that is not one of this config, whose modules
    differ in rank or scale, or that adapts a part of a tensor that the family keeps fused (Phi-3, GPT-2, Pythia).
    """
    leaves = layers_apart(config, flat(adapter))
    modules = _modules(config)
    shapes = param_shapes(config)
    ours = [name.removesuffix("/lora_a") for name in leaves if name.endswith("/lora_a")]
    if not ours or len(leaves) != len(LORA_LEAVES) * len(ours):
        raise ValueError("an adapter has lora_a, lora_b and lora_scale for each kernel; init_lora makes one")
    tensors: dict[str, np.ndarray] = {}
    ranks: set[int] = set()
    scales: set[float] = set()
    for name in ours:
        if name not in modules:
            reason = "is one tensor with others there" if f"{name}/kernel" in shapes else "is none of its modules"
            raise ValueError(f"{name} cannot be saved for {config.family}: it {reason}")
        a, b, scale = (np.asarray(leaves[f"{name}/{leaf}"], np.float32) for leaf in LORA_LEAVES)
        if (a.shape[0], b.shape[1]) != shapes[f"{name}/kernel"]:
            raise ValueError(f"{name} is adapted {(a.shape[0], b.shape[1])}; its kernel is {shapes[f'{name}/kernel']}")
        tensors[f"{PREFIX}{modules[name]}.lora_A.weight"] = np.ascontiguousarray(a.T)
        tensors[f"{PREFIX}{modules[name]}.lora_B.weight"] = np.ascontiguousarray(b.T)
        ranks.add(a.shape[1])
        scales.add(float(scale))
    if len(ranks) > 1 or len(scales) > 1:
        raise ValueError(f"modules differ in rank {sorted(ranks)} or scale {sorted(scales)}; save them apart")
    (rank,), (factor,) = ranks, scales
    card = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True,
        "r": rank, "lora_alpha": factor * rank, "lora_dropout": 0.0, "use_rslora": False, "fan_in_fan_out": False,
        "target_modules": _targets([modules[name] for name in ours], modules), **PLAIN,
    }  # fmt: skip
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "adapter_model.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "adapter_model.safetensors")
    write_text(folder / "adapter_config.json", json.dumps(card, indent=2) + "\n")


def load_peft(path: str | Path, config: ModelConfig) -> Any:
    """Reads a PEFT folder, as an adapter for the parameters of `config`, float32.

    Modules may differ in rank. Raises FileNotFoundError or ValueError, in one line that names the file and the entry
    or tensor, for what is missing, broken or misshapen, and for what is more than LoRA (DoRA, biases, saved modules).
    """
    folder = Path(path)
    card_path, tensors_path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    card = read_json(card_path)
    if card.get("peft_type") != "LORA":
        raise ValueError(f"{card_path}: peft_type {card.get('peft_type')!r} is not supported, only 'LORA'")
    if not isinstance(card.get("lora_alpha"), int | float):
        raise ValueError(f"{card_path}: lora_alpha is {card.get('lora_alpha')!r}, and should be a number")
    for name, plain in PLAIN.items():
        if card.get(name) and card[name] != plain:
            raise ValueError(f"{card_path}: {name} {card[name]!r} is not supported, only {plain!r}")
    if not tensors_path.exists():
        raise FileNotFoundError(f"{folder} has no {tensors_path.name}; pickled adapters are not read: save it anew")
    try:
        tensors = load_file(tensors_path)
    except SafetensorError as error:
        raise ValueError(f"{tensors_path} is not a whole safetensors file: {error}") from None

    power = 0.5 if card.get("use_rslora") else 1.0
    leaves: dict[str, Any] = {}
    shapes = param_shapes(config)
    for ours, theirs in _modules(config).items():
        pair = [tensors.pop(f"{PREFIX}{theirs}.lora_{x}.weight", None) for x in "AB"]
        if pair[0] is None and pair[1] is None:
            continue
        if pair[0] is None or pair[1] is None:
            raise ValueError(f"{tensors_path}: {theirs} has only one of lora_A and lora_B")
        a, b = (np.asarray(tensor, np.float32).T for tensor in pair)
        if (a.shape[0], b.shape[1]) != shapes[f"{ours}/kernel"] or a.shape[1] != b.shape[0]:
            got, wanted = f"lora_A {pair[0].shape} and lora_B {pair[1].shape}", shapes[f"{ours}/kernel"][::-1]
            raise ValueError(f"{tensors_path}: {theirs} has {got}, which do not fit its weight {wanted}")
        scale = np.float32(card["lora_alpha"] / a.shape[1] ** power)
        leaves |= {f"{ours}/{leaf}": jnp.asarray(x) for leaf, x in zip(LORA_LEAVES, (a, b, scale), strict=True)}
    if tensors:
        raise ValueError(f"{tensors_path}: tensor {min(tensors)} has no place in a {config.family} of this config")
    if not leaves:
        raise ValueError(f"{tensors_path} holds no adapter")
    return nested(layers_stacked(config, leaves))


def _modules(config: ModelConfig) -> dict[str, str]:
    """Their module by our name, for those that are a tensor by themselves."""
    cuts = family_of(config).places(config.n_layers)
    return {
        cut.parts[0].removesuffix("/kernel"): name.removesuffix(".weight")
        for name, cut in cuts.items()
        if len(cut.parts) == 1 and cut.parts[0].endswith("/kernel")
    }


def _targets(names: list[str], modules: Mapping[str, str]) -> list[str]:
    """The modules' last names, as people write them, where those mean the same modules; else the full ones."""
    last = {name.rpartition(".")[2] for name in names}
    meant = [name for name in modules.values() if name.rpartition(".")[2] in last]
    return sorted(last if set(meant) == set(names) else names)
