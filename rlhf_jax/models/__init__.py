"""One decoder, its heads, and Hugging Face checkpoints in and out."""

from rlhf_jax.models.cache import KVCache, init_cache, repeated_cache
from rlhf_jax.models.card import ModelCard
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import ScalarModel, from_language_model, last_token_rewards
from rlhf_jax.models.hf import load_hf, load_hf_config, load_hf_reward_model
from rlhf_jax.models.lora import (
    cast_frozen,
    init_lora,
    merge_lora,
    quantize_frozen,
    split_lora,
    with_dropout,
    with_lora,
)
from rlhf_jax.models.peft import load_peft, load_peft_reward_model, save_peft, save_peft_reward_model
from rlhf_jax.models.precision import BFLOAT16, FLOAT32, MIXED, Precision
from rlhf_jax.models.rope import LinearScaling, Llama3Scaling, LongRope
from rlhf_jax.models.save import save_hf, save_hf_reward_model
from rlhf_jax.models.transformer import Transformer, head_kernel
from rlhf_jax.models.weights import count_weights

__all__ = [
    "BFLOAT16",
    "FLOAT32",
    "MIXED",
    "KVCache",
    "LinearScaling",
    "Llama3Scaling",
    "LongRope",
    "ModelCard",
    "ModelConfig",
    "Precision",
    "ScalarModel",
    "Transformer",
    "cast_frozen",
    "count_weights",
    "from_language_model",
    "head_kernel",
    "init_cache",
    "init_lora",
    "last_token_rewards",
    "load_hf",
    "load_hf_config",
    "load_hf_reward_model",
    "load_peft",
    "load_peft_reward_model",
    "merge_lora",
    "quantize_frozen",
    "repeated_cache",
    "save_hf",
    "save_hf_reward_model",
    "save_peft",
    "save_peft_reward_model",
    "split_lora",
    "with_dropout",
    "with_lora",
]
