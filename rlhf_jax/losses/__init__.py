"""Losses as pure functions: arrays in, (scalar, metrics) out, made for jax.value_and_grad(..., has_aux=True)."""

from rlhf_jax.losses.dpo import dpo_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss
from rlhf_jax.losses.grpo import (
    cispo_loss,
    grpo_loss,
    gspo_loss,
    reinforce_loss,
    truncated_importance_weights,
)
from rlhf_jax.losses.ppo import ppo_clip_loss, value_clip_loss
from rlhf_jax.losses.reward_model import bradley_terry_loss, plackett_luce_loss, ranking_loss
from rlhf_jax.losses.sft import chunked_sft_loss, sft_loss

__all__ = [
    "bradley_terry_loss",
    "chunked_sft_loss",
    "cispo_loss",
    "dpo_loss",
    "grpo_loss",
    "gspo_loss",
    "ipo_loss",
    "kto_loss",
    "orpo_loss",
    "plackett_luce_loss",
    "ppo_clip_loss",
    "ranking_loss",
    "reinforce_loss",
    "sft_loss",
    "simpo_loss",
    "truncated_importance_weights",
    "value_clip_loss",
]
