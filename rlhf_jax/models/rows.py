"""Rows of config.json that no family's table reads: those that are refused, and those that change nothing and why."""

from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.families import Family

Json = dict[str, Any]

READ = {
    "model_type", "architectures", "id2label", "num_labels", "reward_bias", "bos_token_id", "eos_token_id",
    "pad_token_id", "auto_map",
}  # fmt: skip
"""Rows that are read whatever the family is. Of `auto_map`, that nothing is run."""


class Refused(NamedTuple):
    """Why a row is refused, and the values at which it says nothing."""

    why: str
    usual: tuple[Any, ...]


def _refused(why: str, *names: str, usual: tuple[Any, ...] = ()) -> dict[str, Refused]:
    return dict.fromkeys(names, Refused(why, (None, False, 0, "", [], {}, *usual)))


def _only_true(why: str, *names: str) -> dict[str, Refused]:
    return dict.fromkeys(names, Refused(why, (None, True)))


QUANTIZED = ("quantization_config", "compression_config", "quantization", "quant_config")
"""Rows that say how weights were quantised; the last two are MLX's and AWQ's."""
REFUSED = {
    **_refused(
        "this is a model of experts", "num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts",
        "num_experts_per_tok", "moe_intermediate_size", "moe_num_experts", usual=(1,),
    ),
    **_refused(
        "this is a model of several parts", "text_config", "vision_config", "audio_config", "speech_config",
        "llm_config", "encoder", "decoder", "backbone_config",
    ),
    **_refused(
        "layers differ from each other", "per_layer_config", "pruned_heads", "num_kv_shared_layers",
        "hidden_size_per_layer_input", "altup_num_inputs", "activation_sparsity_pattern", "block_configs",
        "num_loops", "layer_replication",
    ),
    **_refused(
        "attention sees other positions", "sliding_window", "use_sliding_window", "layer_types",
        "attention_chunk_size", "use_bidirectional_attention", "is_encoder_decoder", "add_cross_attention",
        "prefix_lm", "local_attention",
    ),
    **_only_true("attention sees other positions", "is_causal", "causal"),
    **_refused(
        "attention computes otherwise", "attn_logit_softcapping", "query_pre_attn_scalar", "attention_multiplier",
        "clip_qkv", "use_qk_norm", "qk_norm", "qk_layernorm", "use_qk_layernorm", "use_logn_attn",
        "attn_temperature_tuning", "kv_lora_rank", "q_lora_rank", "multi_query", "scale_attn_by_inverse_layer_idx",
        "head_dim",
    ),
    **_only_true("attention computes otherwise", "scale_attn_weights"),
    **_refused(
        "positions are told otherwise", "alibi", "use_alibi", "rope_interleaved", "rope_interleave", "rotary_dim",
        "rotary_emb_base", "use_dynamic_ntk", "rope_scaling", "rope_parameters", "rope_local_base_freq",
        "rope_theta", "no_rope_layers", "no_rope_layer_interval", "use_mrope", "original_max_position_embeddings",
    ),
    **_refused(
        "positions are told otherwise", "rotary_pct", "rotary_emb_fraction", "partial_rotary_factor",
        "rotary_percentage", "rope_ratio", usual=(1,),
    ),
    **_refused(
        "positions are told otherwise", "position_embedding_type",
        usual=("absolute", "learned_absolute", "rope", "rotary"),
    ),
    **_refused(
        "numbers are scaled on their way", "final_logit_softcapping", "scale_depth", "dim_model_base",
        "scale_embedding", "normalize_embedding",
    ),
    **_refused(
        "numbers are scaled on their way", "logit_scale", "logits_scaling", "embedding_multiplier",
        "residual_multiplier", "key_multiplier", "lm_head_multiplier", "scale_emb", "mup_width_multiplier",
        "embedding_scale", "output_multiplier_scale", usual=(1,),
    ),
    **_refused(
        "the layers are built otherwise", "use_parallel_residual", "parallel_attn", "parallel_residual",
        "apply_residual_connection_post_layernorm", "hidden_activation", "activation_function",
    ),
    **_refused("the weights lie in another file", "transformers_weights"),
}  # fmt: skip
"""Rows that change what is computed, by another family's table or by another model's code."""


def _passed_over(why: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, why)


PASSED_OVER = {
    **_passed_over(
        "it is for training; we train without dropout, and in our own way", "initializer_range", "attention_dropout",
        "hidden_dropout", "classifier_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "embedding_dropout",
        "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
        "gradient_checkpointing", "problem_type", "loss_type", "label2id", "is_decoder", "output_router_logits",
        "router_aux_loss_coef",
    ),
    **_passed_over(
        "it is how others compute the same numbers", "use_cache", "dtype", "torch_dtype", "_attn_implementation",
        "attn_implementation", "_attn_implementation_autoset", "use_flash_attn", "use_flash_attention",
        "_flash_attn_2_enabled", "pretraining_tp", "chunk_size_feed_forward", "reorder_and_upcast_attn",
        "torchscript", "cache_implementation", "use_bfloat16",
    ),
    **_passed_over(
        "it is what others' functions return", "output_attentions", "output_hidden_states", "return_dict",
        "use_return_dict", "return_dict_in_generate", "output_scores", "tie_last_hidden_states",
    ),
    **_passed_over(
        "it is where the model comes from", "_name_or_path", "name_or_path", "transformers_version", "_commit_hash",
        "_from_model_config", "unsloth_version", "unsloth_fixed", "transformers.js_config", "finetuning_task",
        "model_name", "language", "license",
    ),
    **_passed_over(
        "the tokenizer's own files say it", "tokenizer_class", "model_max_length", "sep_token_id", "cls_token_id",
        "mask_token_id", "unk_token_id", "decoder_start_token_id", "prefix",
    ),
    **_passed_over(
        "the tensors say it: one too many or too few is an error", "attention_bias", "mlp_bias", "use_bias",
        "qkv_bias", "bias", "add_bias_linear", "num_nextn_predict_layers", "intermediate_size", "num_key_value_heads",
    ),
    **_passed_over(
        "transformers' class of this family does not read it either", "hidden_act", "n_ctx", "max_window_layers",
        "sliding_window_size", "sliding_window_pattern", "_sliding_window_pattern", "max_position_embeddings",
        "rms_norm_eps",
    ),
    **_passed_over(
        "it is for sampling, which flags rule here", "task_specific_params", "do_sample", "temperature", "top_k",
        "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "max_length",
        "min_length", "max_new_tokens", "num_beams", "num_beam_groups", "num_return_sequences", "early_stopping",
        "diversity_penalty", "encoder_no_repeat_ngram_size", "bad_words_ids", "forced_bos_token_id",
        "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
        "begin_suppress_tokens", "renormalize_logits", "epsilon_cutoff", "eta_cutoff", "encoder_repetition_penalty",
        "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
        "assistant_lookbehind", "target_lookbehind",
    ),
}  # fmt: skip
"""Rows that change no number here, and why."""


def check_rows(hf: Json, family: Family, config: ModelConfig) -> None:
    """Raises ValueError for a row of config.json that changes what is computed, and that is not in `config`."""
    kinds = hf.get("layer_types")
    if isinstance(kinds, list) and "sliding_attention" in kinds and not any(config.windows):
        raise ValueError("layer_types has sliding_attention, and sliding_window or use_sliding_window says none")
    for name, value in hf.items():
        if name in REFUSED and name not in family.rows and not _usual(hf, name, value):
            shown = repr(value) if len(repr(value)) < 60 else "{…}"
            raise ValueError(f"{name} {shown} is not supported in a {family.name}: {REFUSED[name].why}")


def unknown_rows(hf: Json, family: Family) -> list[str]:
    """The rows that are set, and that nobody here knows: neither read nor refused, nor known to change nothing."""
    known = {*READ, *family.rows, *REFUSED, *PASSED_OVER, *QUANTIZED}
    return sorted(name for name, value in hf.items() if name not in known and value is not None)


NOT_FOLLOWED = (
    "stop_strings", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias",
    "forced_bos_token_id", "forced_eos_token_id", "constraints", "min_new_tokens", "min_length",
    "no_repeat_ngram_size", "exponential_decay_length_penalty", "guidance_scale", "watermarking_config",
)  # fmt: skip
"""Rows of generation_config.json that change which texts transformers writes, whatever the sampling is."""


def unread_rows(folder: Path, hf: Json, generation: Json, family: Family) -> list[str]:
    """A line for all that config.json and generation_config.json say and that is not used here."""
    notes = []
    if rows := unknown_rows(hf, family):
        notes.append(f"{folder / 'config.json'}: {len(rows)} rows are not known and not read: {', '.join(rows)}")
    if hf.get("auto_map"):
        notes.append(f"{folder / 'config.json'}: its own code (auto_map) is not run: it is read as a {family.name}")
    if rows := [name for name in NOT_FOLLOWED if generation.get(name)]:
        notes.append(f"{folder / 'generation_config.json'}: not followed when sampling: {', '.join(rows)}")
    return notes


def quantized_by(folder: Path, hf: Json) -> str | None:
    """The method that a checkpoint's weights were quantised by, as its config.json or a file beside it says."""
    for name in QUANTIZED:
        if value := hf.get(name):
            found = value if isinstance(value, dict) else {}
            bits = next((bits for bits in ("4bit", "8bit") if found.get(f"load_in_{bits}")), None)
            method = found.get("quant_method") or found.get("quantization_method") or found.get("quant_algo")
            return str(method or ("bitsandbytes" if bits else "mlx" if name == "quantization" else name))
    files = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
    return next((method for file, method in files.items() if (folder / file).exists()), None)


def _usual(hf: Json, name: str, value: Any) -> bool:
    """Whether a row of REFUSED says what is so anyway. A truth value is no number here."""
    if any(value == usual and isinstance(value, bool) is isinstance(usual, bool) for usual in REFUSED[name].usual):
        return True
    heads = hf.get("num_attention_heads") or hf.get("n_head")
    width = hf.get("hidden_size") or hf.get("n_embd")
    match name:
        case "layer_types":
            return isinstance(value, list) and set(value) == {"full_attention"}
        case "no_rope_layers":
            return isinstance(value, list) and set(value) == {1}
        case "sliding_window":  # no shorter than any text
            return isinstance(value, int) and value >= hf.get("max_position_embeddings", 0) > 0
        case "head_dim":
            return isinstance(value, int) and value * (heads or 0) == width
    return False
