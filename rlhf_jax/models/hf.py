"""Hugging Face checkpoints in and out: Llama, as config.json and safetensors. No torch, no pickle."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlhf_jax.models.config import ModelConfig

LAYER_TENSORS = {
    "attention_norm/scale": "input_layernorm.weight",
    "query/kernel": "self_attn.q_proj.weight",
    "key/kernel": "self_attn.k_proj.weight",
    "value/kernel": "self_attn.v_proj.weight",
    "output/kernel": "self_attn.o_proj.weight",
    "feed_forward_norm/scale": "post_attention_layernorm.weight",
    "gate/kernel": "mlp.gate_proj.weight",
    "up/kernel": "mlp.up_proj.weight",
    "down/kernel": "mlp.down_proj.weight",
}


def load_hf(path_or_name: str | Path) -> tuple[ModelConfig, Any]:
    """Reads a Llama checkpoint, as (config, float32 params of a Transformer).

    A folder never touches the network; anything else is taken for a hub name. Weights may be fp32, bf16 or fp16, in
    one file or in shards with an index. Raises FileNotFoundError or ValueError, in one line that names the file and
    the tensor, for what is missing, broken, misshapen or of another architecture.
    """
    folder = _folder(path_or_name)
    config = _read_config(folder / "config.json")
    tensors = dict(_tensors(folder))

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in tensors:
            raise ValueError(f"{folder}: tensor {name} is missing")
        tensor = np.asarray(tensors.pop(name)(), np.float32)
        if tensor.shape != shape:
            raise ValueError(f"{folder}: tensor {name} has shape {tensor.shape}, its config.json says {shape}")
        return tensor

    params: dict[str, Any] = {
        "embedding": take("model.embed_tokens.weight", (config.vocab_size, config.d_model)),
        "final_norm": {"scale": take("model.norm.weight", (config.d_model,))},
    }
    shapes = _layer_shapes(config)
    for i in range(config.n_layers):
        layer: dict[str, Any] = {}
        for ours, theirs in LAYER_TENSORS.items():
            module, name = ours.split("/")
            tensor = take(f"model.layers.{i}.{theirs}", shapes[ours][::-1])
            layer[module] = {name: np.ascontiguousarray(tensor.T)}
        params[f"layer_{i}"] = layer
    if not config.tie_embeddings:
        params["head"] = np.ascontiguousarray(take("lm_head.weight", (config.vocab_size, config.d_model)).T)
    tensors.pop("lm_head.weight", None)  # a copy of the tied embedding
    if left := sorted(name for name in tensors if not name.endswith("rotary_emb.inv_freq")):
        raise ValueError(f"{folder}: tensor {left[0]} (and {len(left) - 1} more) has no place in a Llama")
    return config, _as_jax(params)


def save_hf(path: str | Path, config: ModelConfig, params: Any, *, tokenizer: Any = None) -> None:
    """Writes a folder that transformers' LlamaForCausalLM loads with the same logits; the tokenizer too if given.

    Each file is written whole or not at all. Raises ValueError when `params` are not those of `config`.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    expected = {"embedding", "final_norm"} | (set() if config.tie_embeddings else {"head"})
    expected |= {"layers"} if config.scan_layers else {f"layer_{i}" for i in range(config.n_layers)}
    if set(params) != expected:
        raise ValueError(f"parameters {sorted(params)} are not those of this config: {sorted(expected)}")
    tensors = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["final_norm"]["scale"],
    }
    for i in range(config.n_layers):
        for ours, theirs in LAYER_TENSORS.items():
            module, name = ours.split("/")
            tensor = params["layers"][module][name][i] if config.scan_layers else params[f"layer_{i}"][module][name]
            tensors[f"model.layers.{i}.{theirs}"] = tensor.T
    if not config.tie_embeddings:
        tensors["lm_head.weight"] = params["head"].T
    arrays = {name: np.ascontiguousarray(np.asarray(tensor, np.float32)) for name, tensor in tensors.items()}
    temporary = folder / "model.safetensors.tmp"
    save_file(arrays, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "model.safetensors")

    ends: dict[str, Any] = {}
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        ends = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")}
    _write_json(folder / "config.json", _to_hf(config) | ends)
    _write_json(folder / "generation_config.json", {"do_sample": True, **ends})


def _folder(path_or_name: str | Path) -> Path:
    folder = Path(path_or_name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{folder} is a file; a checkpoint is a folder with config.json and model.safetensors")
    name = str(path_or_name)
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise FileNotFoundError(f"there is no folder {folder}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{name} is no folder here, and could not be had from the hub: {reason}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} has no {path.name}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def _read_config(path: Path) -> ModelConfig:
    hf = _read_json(path)
    if hf.get("model_type") != "llama":
        raise ValueError(f"{path}: model_type {hf.get('model_type')!r} is not supported, only 'llama'")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind != "default":
        raise ValueError(f"{path}: rope scaling {kind!r} is not supported")
    for name, only in [("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")]:
        if hf.get(name, only) != only:
            raise ValueError(f"{path}: {name} {hf[name]!r} is not supported, only {only!r}")

    def size(name: str, default: int | None = None) -> int:
        value = default if hf.get(name) is None else hf[name]
        if value is None:
            raise ValueError(f"{name} is missing")
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        return value

    try:
        d_model, n_heads = size("hidden_size"), size("num_attention_heads")
        return ModelConfig(
            vocab_size=size("vocab_size"),
            d_model=d_model,
            n_layers=size("num_hidden_layers"),
            n_heads=n_heads,
            n_kv_heads=size("num_key_value_heads", n_heads),
            head_dim=size("head_dim", d_model // n_heads),
            d_ff=size("intermediate_size"),
            rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0))),
            norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            max_length=size("max_position_embeddings", 2048),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_length,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "float32",
    }


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Ours, [in, out]."""
    d, q, kv = config.d_model, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return {
        "attention_norm/scale": (d,),
        "query/kernel": (d, q),
        "key/kernel": (d, kv),
        "value/kernel": (d, kv),
        "output/kernel": (q, d),
        "feed_forward_norm/scale": (d,),
        "gate/kernel": (d, config.d_ff),
        "up/kernel": (d, config.d_ff),
        "down/kernel": (config.d_ff, d),
    }


def _tensors(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, reader) of every tensor, read when called."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():  # before the index, as transformers has it
        shards = ["model.safetensors"]
    elif index.exists():
        places = _read_json(index).get("weight_map")
        if not isinstance(places, dict):
            raise ValueError(f"{index} has no weight_map")
        shards = sorted(set(places.values()))
    else:
        raise FileNotFoundError(f"{folder} has no model.safetensors (nor an index of shards)")
    for shard in shards:
        path = folder / shard
        if not path.exists():
            raise FileNotFoundError(f"{folder} has no {shard}, which its index names")
        try:
            # "flax" reads bf16 too, which numpy has no name for.
            file = safe_open(path, framework="flax")
            names = list(file.keys())
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
        for name in names:
            yield name, partial(_read_tensor, file, name)


def _read_tensor(file: Any, name: str) -> Any:
    return file.get_tensor(name).astype(jnp.float32)


def _as_jax(tree: Any) -> Any:
    return {k: _as_jax(v) for k, v in tree.items()} if isinstance(tree, dict) else jnp.asarray(tree)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
