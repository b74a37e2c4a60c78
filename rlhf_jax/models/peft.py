"""Adapters in and out in PEFT's form: adapter_config.json and adapter_model.safetensors. No torch, no pickle.

The format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families import family_of
from rlhf_jax.models.files import read_json, write_text
from rlhf_jax.models.transformer import LORA_LEAVES
from rlhf_jax.models.weights import flat, layers_apart, layers_stacked, nested, param_shapes

CARD, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SCORE = f"{PREFIX}score.weight"
SCORES = ["classifier", "score"]
"""PEFT's names of the modules that a classifier trains whole."""
READ = {
    "peft_type", "task_type", "lora_alpha", "alpha_pattern", "use_rslora", "modules_to_save", "init_lora_weights",
    "r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "fan_in_fan_out", "lora_dropout", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping",
    "peft_version", "eva_config", "megatron_config", "megatron_core", "qalora_group_size", "runtime_config",
}  # fmt: skip
"""Fields of adapter_config.json that are read here, that the tensors tell, or that change nothing that is computed."""


def save_peft(path: str | Path, config: ModelConfig, adapter: Any, *, base_model: str | None = None) -> None:
    """Writes a folder that PEFT loads over the language model that `config.family` names, with the same logits.

    `base_model` is the folder or the hub name of the trunk. Each file is written whole or not at all. Modules may
    differ in rank and scale; rsLoRA's scale is written as the α that gives it. Raises ValueError for an adapter that
    is not one of this config, or that adapts a part of a tensor that the family keeps fused (Phi-3, GPT-2, Pythia).
    """
    tensors, card = _tensors(config, adapter)
    _write(Path(path), tensors, card | {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_model})


def save_peft_reward_model(path: str | Path, config: ModelConfig, own: Any, *, base_model: str | None = None) -> None:
    """Writes {"trunk": adapter, "head": …}, what a ScalarModel has for itself, as PEFT has a sequence classifier.

    As `save_peft`: over the …ForSequenceClassification with one label of `base_model` (a language model will do), its
    logit is the reward. Raises ValueError for a head with a bias, for which there is no place.
    """
    if not isinstance(own, dict) or set(own) != {"trunk", "head"}:
        raise ValueError("a reward model's own part is {'trunk': adapter, 'head': …}")
    if bias := float(own["head"]["bias"]):
        raise ValueError(f"the head's bias {bias:.4g} has no place in a classifier; with 0 all rewards shift alike")
    tensors, card = _tensors(config, own["trunk"])
    tensors[SCORE] = np.asarray(own["head"]["kernel"], np.float32)[None]
    more = {"task_type": "SEQ_CLS", "modules_to_save": SCORES, "base_model_name_or_path": base_model}
    _write(Path(path), tensors, card | more)


def load_peft(path: str | Path, config: ModelConfig) -> Any:
    """Reads a PEFT folder, as an adapter for the parameters of `config`, float32.

    Modules may differ in rank and α. Raises FileNotFoundError or ValueError, in one line that names the file and the
    entry or tensor, for what is missing, broken or misshapen, and for what is more than LoRA: any entry that is set
    and unknown here, such as DoRA's, biases, saved modules, and weights that were changed beforehand (PiSSA).
    """
    folder = Path(path)
    card, tensors = _read(folder)
    if SCORE in tensors:
        raise ValueError(f"{folder} holds a reward model's adapter: load_peft_reward_model reads it")
    if card.get("modules_to_save"):
        raise ValueError(f"{folder / CARD}: modules_to_save {card['modules_to_save']!r} is not supported")
    return _adapter(folder, config, card, tensors)


def load_peft_reward_model(path: str | Path, config: ModelConfig) -> Any:
    """Reads a PEFT folder of a sequence classifier with one label, as {"trunk": adapter, "head": …}, float32.

    `with_lora({"trunk": params}, …)` of it is a ScalarModel's. PEFT's score has no bias: ours is 0. Raises what
    `load_peft` raises, and ValueError when the score is missing or other modules were trained whole.
    """
    folder = Path(path)
    card, tensors = _read(folder)
    saved = card.get("modules_to_save") or []
    if not set(saved) <= set(SCORES):
        raise ValueError(f"{folder / CARD}: modules_to_save {saved!r} is not supported, only {SCORES}")
    score = tensors.pop(SCORE, None)
    if score is None or score.shape != (1, config.d_model):
        got = "no such tensor" if score is None else score.shape
        raise ValueError(f"{folder / TENSORS}: {SCORE} should be {(1, config.d_model)}, and there is {got}")
    head = {"kernel": jnp.asarray(score[0], jnp.float32), "bias": jnp.zeros(())}
    return {"trunk": _adapter(folder, config, card, tensors), "head": head}


def _tensors(config: ModelConfig, adapter: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """An adapter as their tensors, and what the card says of it."""
    leaves = layers_apart(config, flat(adapter))
    modules = _modules(config)
    shapes = param_shapes(config)
    ours = [name.removesuffix("/lora_a") for name in leaves if name.endswith("/lora_a")]
    if not ours or len(leaves) != len(LORA_LEAVES) * len(ours):
        raise ValueError("an adapter has lora_a, lora_b and lora_scale for each kernel; init_lora makes one")
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name in ours:
        if name not in modules:
            reason = "is one tensor with others there" if f"{name}/kernel" in shapes else "is none of its modules"
            raise ValueError(f"{name} cannot be saved for {config.family}: it {reason}")
        a, b, scale = (np.asarray(leaves[f"{name}/{leaf}"], np.float32) for leaf in LORA_LEAVES)
        if (a.shape[0], b.shape[1]) != shapes[f"{name}/kernel"]:
            raise ValueError(f"{name} is adapted {(a.shape[0], b.shape[1])}; its kernel is {shapes[f'{name}/kernel']}")
        theirs = modules[name]
        tensors[f"{PREFIX}{theirs}.lora_A.weight"] = np.ascontiguousarray(a.T)
        tensors[f"{PREFIX}{theirs}.lora_B.weight"] = np.ascontiguousarray(b.T)
        ranks[theirs], alphas[theirs] = a.shape[1], float(scale) * a.shape[1]
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    card = {
        "r": rank, "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "lora_alpha": alpha, "alpha_pattern": {name: x for name, x in alphas.items() if x != alpha},
        "target_modules": _targets(list(ranks), modules),
    }  # fmt: skip
    return tensors, card


def _write(folder: Path, tensors: dict[str, np.ndarray], card: dict[str, Any]) -> None:
    plain = {
        "peft_type": "LORA", "inference_mode": True, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False,
        "bias": "none", "fan_in_fan_out": False, "modules_to_save": None,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{TENSORS}.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / TENSORS)
    write_text(folder / CARD, json.dumps(plain | card, indent=2) + "\n")


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The card and the tensors of what is LoRA and no more."""
    path = folder / CARD
    card = read_json(path)
    if card.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type {card.get('peft_type')!r} is not supported, only 'LORA'")
    alphas = card.get("alpha_pattern") or {}
    for name, alpha in [("lora_alpha", card.get("lora_alpha")), *alphas.items()]:
        if not isinstance(alpha, int | float):
            raise ValueError(f"{path}: {name} is {alpha!r}, and should be a number")
    for name, value in card.items():
        if name not in READ and value and (name, value) != ("bias", "none"):
            raise ValueError(f"{path}: {name} {value!r} is not supported")
    if (start := card.get("init_lora_weights")) not in (None, True, False, "gaussian", "orthogonal", "eva"):
        raise ValueError(f"{path}: init_lora_weights {start!r} is not supported: it changes the weights beneath")
    if not (folder / TENSORS).exists():
        raise FileNotFoundError(f"{folder} has no {TENSORS}; pickled adapters are not read: save it anew")
    try:
        return card, load_file(folder / TENSORS)
    except (SafetensorError, KeyError, TypeError) as error:  # of types that numpy lacks, too
        raise ValueError(f"{folder / TENSORS} is not a whole safetensors file: {error}") from None


def _adapter(folder: Path, config: ModelConfig, card: dict[str, Any], tensors: dict[str, np.ndarray]) -> Any:
    path = folder / TENSORS
    power = 0.5 if card.get("use_rslora") else 1.0
    leaves: dict[str, Any] = {}
    shapes = param_shapes(config)
    for ours, theirs in _modules(config).items():
        pair = [tensors.pop(f"{PREFIX}{theirs}.lora_{x}.weight", None) for x in "AB"]
        if pair[0] is None and pair[1] is None:
            continue
        if pair[0] is None or pair[1] is None:
            raise ValueError(f"{path}: {theirs} has only one of lora_A and lora_B")
        a, b = (np.asarray(tensor, np.float32).T for tensor in pair)
        if (a.shape[0], b.shape[1]) != shapes[f"{ours}/kernel"] or a.shape[1] != b.shape[0]:
            got, wanted = f"lora_A {pair[0].shape} and lora_B {pair[1].shape}", shapes[f"{ours}/kernel"][::-1]
            raise ValueError(f"{path}: {theirs} has {got}, which do not fit its weight {wanted}")
        if not _is_adapted(card, theirs):
            raise ValueError(f"{path}: {theirs} has an adapter, which {CARD} leaves out (target_modules and others)")
        if (rank := _by_pattern(card, "rank_pattern", theirs, card.get("r"))) != a.shape[1]:
            raise ValueError(f"{path}: {theirs} has rank {a.shape[1]}, and {CARD} says {rank}")
        alpha = _by_pattern(card, "alpha_pattern", theirs, card["lora_alpha"])
        scale = np.float32(alpha / a.shape[1] ** power)
        leaves |= {f"{ours}/{leaf}": jnp.asarray(x) for leaf, x in zip(LORA_LEAVES, (a, b, scale), strict=True)}
    if tensors:
        raise ValueError(f"{path}: tensor {min(tensors)} has no place in a {config.family} of this config")
    if not leaves:
        raise ValueError(f"{path} holds no adapter")
    return nested(layers_stacked(config, leaves))


def _by_pattern(card: dict[str, Any], name: str, module: str, usual: Any) -> Any:
    """The value of the first pattern that the module's name ends with, as PEFT has it."""
    patterns = (card.get(name) or {}).items()
    return next((value for end, value in patterns if re.match(rf"(.*\.)?({end})$", module)), usual)


def _is_adapted(card: dict[str, Any], module: str) -> bool:
    """Whether PEFT adapts a module, by the card's four fields about that; it passes over the tensors of any other."""

    def among(names: Any) -> bool:
        if isinstance(names, str):
            return names == "all-linear" or re.fullmatch(names, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in names)

    targets, layers = card.get("target_modules"), card.get("layers_to_transform")
    if among(card.get("exclude_modules") or ()) or not (targets is None or among(targets)):
        return False
    if layers in (None, []) or isinstance(targets, str):
        return True
    patterns = card.get("layers_pattern") or r"[^.]*"
    found = [
        re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module)
        for pattern in ([patterns] if isinstance(patterns, str) else patterns)
    ]
    number = next((int(match[1]) for match in found if match), None)
    return number in (layers if isinstance(layers, list) else [layers])


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
