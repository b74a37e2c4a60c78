"""Published shapes of models, and of the chips they may run on."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.models import ModelConfig, Precision, Transformer
from rlhf_jax.models.families import FAMILIES
from rlhf_jax.types import Params

LLAMA3 = {
    "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "max_position_embeddings": 8192, "head_dim": 128,
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "vocab_size": 151936, "num_key_value_heads": 2, "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "hidden_act": "silu", "use_sliding_window": False,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 40960, "head_dim": 128, "hidden_act": "silu",
    "attention_bias": False, "use_sliding_window": False,
}  # fmt: skip
GEMMA3 = {
    "model_type": "gemma3_text", "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 1024,
    "sliding_window_pattern": 6, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131072,
    "vocab_size": 262208, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}  # fmt: skip
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def _of(base: dict[str, Any], width: int, layers: int, heads: int, d_ff: int, **more: Any) -> dict[str, Any]:
    return base | dict(zip(SIZES, (width, layers, heads, d_ff), strict=True)) | more


MODELS: dict[str, dict[str, Any]] = {
    "llama3-8b": _of(LLAMA3, 4096, 32, 32, 14336),
    "llama3-70b": _of(LLAMA3, 8192, 80, 64, 28672),
    "qwen2.5-0.5b": _of(QWEN2, 896, 24, 14, 4864, tie_word_embeddings=True),
    "qwen2.5-1.5b": _of(QWEN2, 1536, 28, 12, 8960, tie_word_embeddings=True),
    "qwen2.5-7b": _of(
        QWEN2, 3584, 28, 28, 18944, num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False
    ),
    "qwen3-0.6b": _of(QWEN3, 1024, 28, 16, 3072, tie_word_embeddings=True),
    "qwen3-1.7b": _of(QWEN3, 2048, 28, 16, 6144, tie_word_embeddings=True),
    "qwen3-4b": _of(QWEN3, 2560, 36, 32, 9728, tie_word_embeddings=True),
    "qwen3-8b": _of(QWEN3, 4096, 36, 32, 12288, tie_word_embeddings=False),
    "qwen3-14b": _of(QWEN3, 5120, 40, 40, 17408, tie_word_embeddings=False),
    "qwen3-32b": _of(QWEN3, 5120, 64, 64, 25600, tie_word_embeddings=False),
    "gemma3-1b": _of(
        GEMMA3, 1152, 26, 4, 6912, num_key_value_heads=1, vocab_size=262144, sliding_window=512, rope_scaling=None,
        max_position_embeddings=32768,
    ),
    "gemma3-4b": _of(GEMMA3, 2560, 34, 8, 10240, num_key_value_heads=4),
    "gemma3-12b": _of(GEMMA3, 3840, 48, 16, 15360, num_key_value_heads=8),
    "gemma3-27b": _of(
        GEMMA3, 5376, 62, 32, 21504, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168
    ),
    "stories-15m": _of(
        LLAMA3, 288, 6, 6, 768, num_key_value_heads=6, head_dim=48, vocab_size=32000, rope_theta=10000.0,
        max_position_embeddings=1024, tie_word_embeddings=True,
    ),
    "smollm2-135m": _of(
        LLAMA3, 576, 30, 9, 1536, num_key_value_heads=3, head_dim=64, vocab_size=49152, rope_theta=100000.0,
        tie_word_embeddings=True,
    ),
}  # fmt: skip
"""The fields of each model's config.json. Papers, arXiv: Llama 3 2407.21783, Qwen2.5 2412.15115, Qwen3 2505.09388,
Gemma 3 2503.19786, SmolLM2 2502.02737. stories-15m has the shape of https://huggingface.co/karpathy/tinyllamas."""


class Chip(NamedTuple):
    """One chip, by Google's pages on Cloud TPU (read in November 2026)."""

    flops: float
    """Multiplications and additions a second in bfloat16."""
    hbm: float
    """Bytes of memory."""
    hbm_bandwidth: float
    """Bytes a second."""
    ici_bandwidth: float
    """Bytes a second between chips, both directions together."""


CHIPS = {
    "v5e": Chip(197e12, 16e9, 819e9, 400e9),
    "v5p": Chip(459e12, 95e9, 2765e9, 1200e9),
    "v6e": Chip(918e12, 32e9, 1640e9, 800e9),
}


def least_seconds(seconds: Mapping[str, float]) -> tuple[float, str]:
    """The seconds that a step takes at least, and what limits it: "operations", "reading" (while sampling) or "links".

    Operations and reading come one after the other, and chips send beside both.
    """
    busy = seconds["operations"] + seconds["reading"]
    if seconds["links"] > busy:
        return seconds["links"], "links"
    return busy, max(("operations", "reading"), key=lambda name: seconds[name])


def parameter_shapes(config: ModelConfig) -> Params:
    """The shapes of a model's weights; nothing is made."""
    model, prompt = Transformer(config), np.zeros((1, 8), np.int32)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), prompt)["params"])


def model_config(name: str, precision: Precision) -> ModelConfig:
    """A published shape, its layers scanned and rematerialised, as large models are trained."""
    hf = MODELS[name]
    return replace(FAMILIES[hf["model_type"]].read(hf), precision=precision, scan_layers=True, remat=True)
