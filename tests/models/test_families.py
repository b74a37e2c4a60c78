"""Every family against its torch class: logits, greedy generation, rewards, and back."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from rlhf_jax.models import (
    ScalarModel,
    Transformer,
    load_hf,
    load_hf_reward_model,
    save_hf,
    save_hf_reward_model,
)
from rlhf_jax.models.families import FAMILIES
from rlhf_jax.sampling import generate

WIDTH, NEW, PAD = 12, 5, 0
LENGTHS = np.array([12, 5, 9])
MASK = np.arange(WIDTH)[None] >= WIDTH - LENGTHS[:, None]
POSITIONS = np.maximum(MASK.cumsum(axis=1) - 1, 0)
TOKENS = np.where(MASK, np.random.default_rng(0).integers(1, 64, MASK.shape), PAD)

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": PAD,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
WINDOW = {"sliding_window": 4}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], **WINDOW}
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.1, 1.7], "long_factor": [2.0, 4.0],
        "partial_rotary_factor": 0.5,
    },
    "max_position_embeddings": 64, "original_max_position_embeddings": 20,
}  # fmt: skip
GEMMA3_ROPES = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
    }
}  # fmt: skip

# Of each family the first is the richest, and is also generated from and rewarded with.
MODELS = {
    "llama: llama3 rope, grouped, wide heads, biases": ("llama", {
        "rope_parameters": LLAMA3, "head_dim": 10, "attention_bias": True, "mlp_bias": True}),
    "llama: linear rope, tied": ("llama", {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.5}, "tie_word_embeddings": True}),
    "mistral: window shorter than the sequence": ("mistral", {**WINDOW, "head_dim": 6}),
    "mistral: no window, tied": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2: qkv bias, tied, window in the upper layer": ("qwen2", {
        "use_sliding_window": True, "max_window_layers": 1, **WINDOW, "tie_word_embeddings": True}),
    "qwen2: untied": ("qwen2", {}),
    "qwen3: norm of each head, wide heads": ("qwen3", {"head_dim": 12, "rms_norm_eps": 1e-2}),
    "qwen3: biases, tied": ("qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "gemma2: windows, soft caps, query scale, two norms": ("gemma2", {
        "head_dim": 12, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
        **ALTERNATING}),
    "gemma2: no caps, other windows, biases": ("gemma2", {
        "head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 3, "attention_bias": True}),
    "gemma3: two thetas, linear scaling, norm of each head": ("gemma3_text", {
        "head_dim": 12, "query_pre_attn_scalar": 5, "final_logit_softcapping": 3.0, **ALTERNATING, **GEMMA3_ROPES}),
    "gemma3: untied, all layers local": ("gemma3_text", {
        "head_dim": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": False, **WINDOW}),
    "olmo2: norm of the projections, norms of outputs": ("olmo2", {"rms_norm_eps": 1e-2}),
    "olmo2: biases, tied": ("olmo2", {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    "smollm3: a layer without positions": ("smollm3", {"no_rope_layers": [1, 0], "rope_parameters": {
        "rope_type": "default", "rope_theta": 50.0}}),
    "smollm3: windows, biases, untied": ("smollm3", {
        "no_rope_layers": [0, 1], "use_sliding_window": True, **WINDOW, "tie_word_embeddings": False,
        "attention_bias": True, "mlp_bias": True}),
    "gpt2: learned positions, layer norms, biases": ("gpt2", {"n_inner": 40}),
    "gpt2: untied, exact gelu": ("gpt2", {"tie_word_embeddings": False, "activation_function": "gelu"}),
    "pythia: parallel residual, part of a head turns": ("gpt_neox", {"rope_parameters": {
        "rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5}}),
    "pythia: one after the other, tied, no attention bias": ("gpt_neox", {
        "use_parallel_residual": False, "tie_word_embeddings": True, "attention_bias": False,
        "hidden_act": "gelu_new"}),
    "phi3: longrope, part of a head turns, window": ("phi3", {**LONGROPE, **WINDOW}),
    "phi3: plain, tied": ("phi3", {"tie_word_embeddings": True}),
}  # fmt: skip
RICHEST = {family: name for name, (family, _) in reversed(MODELS.items())}


def torch_model(name, classes=AutoModelForCausalLM, **more):
    """Small, and every weight matters: norms are not 1, biases not 0, logits of order 1."""
    torch.manual_seed(0)
    family, changes = MODELS[name]
    sizes = {k: v for k, v in SIZES.items() if not (family == "gpt2" and k == "intermediate_size")}
    config = AutoConfig.for_model(family, **(sizes | changes | more))
    model = classes.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            centre = 1.0 if "norm" in weight_name or "ln_" in weight_name else 0.0
            if family.startswith("gemma") or weight_name.endswith("bias"):
                centre = 0.0
            weight.copy_(centre + 0.3 * torch.randn_like(weight))
    return model


def torch_logits(model, **kwargs):
    with torch.no_grad():
        return model(torch.tensor(TOKENS), attention_mask=torch.tensor(MASK.astype(int)), **kwargs).logits.numpy()


def jax_forward(model, params):
    arguments = (TOKENS, POSITIONS, MASK.astype(np.int32))
    return jax.jit(model.apply)({"params": params}, *map(jnp.asarray, arguments))


def reload(folder, classes=AutoModelForCausalLM):
    model, info = classes.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def test_every_family_is_tested():
    assert set(RICHEST) == set(FAMILIES) and len(FAMILIES) == 11


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_torch_and_so_are_those_of_what_is_saved(name, tmp_path):
    """In a batch with left padding; each row has its own positions."""
    theirs = torch_model(name)
    theirs.save_pretrained(tmp_path / "in")
    config, params = load_hf(tmp_path / "in")
    expected = torch_logits(theirs, position_ids=torch.tensor(POSITIONS))[MASK]
    assert expected.std() > 0.3
    assert_allclose(np.asarray(jax_forward(Transformer(config), params))[MASK], expected, atol=1e-4)

    save_hf(tmp_path / "out", config, params)
    back = reload(tmp_path / "out")
    assert type(back) is type(theirs)
    assert_allclose(torch_logits(back, position_ids=torch.tensor(POSITIONS))[MASK], expected, atol=1e-5)
    again, same = load_hf(tmp_path / "out")
    assert again == config
    chex.assert_trees_all_equal(same, params)


@pytest.mark.parametrize("name", RICHEST.values())
def test_greedy_generation_is_that_of_transformers(name, tmp_path):
    theirs = torch_model(name)
    theirs.save_pretrained(tmp_path)
    config, params = load_hf(tmp_path)
    written = theirs.generate(
        torch.tensor(TOKENS), attention_mask=torch.tensor(MASK.astype(int)), max_new_tokens=NEW, do_sample=False
    )
    completions = generate(
        Transformer(config), params, jnp.asarray(TOKENS), jnp.asarray(MASK), jax.random.key(0),
        max_new_tokens=NEW, temperature=0.0, eos_id=None, pad_id=PAD,
    )  # fmt: skip
    assert_array_equal(completions.tokens, written.numpy()[:, WIDTH:])


@pytest.mark.parametrize("name", RICHEST.values())
def test_rewards_are_those_of_torch_and_so_are_those_of_what_is_saved(name, tmp_path):
    theirs = torch_model(name, AutoModelForSequenceClassification, num_labels=1)
    theirs.save_pretrained(tmp_path / "in")
    config, params = load_hf_reward_model(tmp_path / "in")
    expected = torch_logits(theirs, position_ids=torch.tensor(POSITIONS))[:, 0]
    assert expected.std() > 0.1
    values = jax_forward(ScalarModel(config), params)
    assert_allclose(values[:, -1], expected, atol=1e-4)

    save_hf_reward_model(tmp_path / "out", config, params)
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": PAD}))  # a tokenizer says so otherwise
    back = reload(tmp_path / "out", AutoModelForSequenceClassification)
    assert type(back) is type(theirs)
    assert_allclose(torch_logits(back, position_ids=torch.tensor(POSITIONS))[:, 0], expected, atol=1e-5)
    again, same = load_hf_reward_model(tmp_path / "out")
    assert again == config
    chex.assert_trees_all_equal(same, params)
