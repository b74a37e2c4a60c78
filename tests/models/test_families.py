"""Every family against its torch class: logits, greedy generation, rewards, and back; and their config.json."""

import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from parity import LANGUAGE, MASK, MODELS, POSITIONS, REWARD, RICHEST, TOKENS, agreement, greedy, torch_model
from transformers import AutoConfig

from rlhf_jax.models import Transformer, load_hf
from rlhf_jax.models.families import FAMILIES


def test_every_family_is_tested():
    assert set(RICHEST) == set(FAMILIES) and len(FAMILIES) == 11


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_torch_and_so_are_those_of_what_is_saved(name, tmp_path):
    found = agreement(name, LANGUAGE, tmp_path)
    assert found.spread > 0.3 and found.difference < 1e-4 and found.saved_difference < 1e-5 and found.same, found


@pytest.mark.parametrize("name", RICHEST.values())
def test_rewards_are_those_of_torch_and_so_are_those_of_what_is_saved(name, tmp_path):
    found = agreement(name, REWARD, tmp_path)
    assert found.spread > 0.1 and found.difference < 1e-4 and found.saved_difference < 1e-5 and found.same, found


@pytest.mark.parametrize("name", RICHEST.values())
def test_greedy_generation_is_that_of_transformers(name, tmp_path):
    assert_array_equal(*greedy(name, tmp_path))


@pytest.mark.parametrize("name", RICHEST.values())
def test_scanned_layers_equal_loop_layers(name, tmp_path):
    torch_model(name).save_pretrained(tmp_path)
    config, params = load_hf(tmp_path)
    layers = [params[f"layer_{i}"] for i in range(config.n_layers)]
    stacked = {key: value for key, value in params.items() if not key.startswith("layer_")}
    stacked["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    arguments = tuple(map(jnp.asarray, (TOKENS, POSITIONS, MASK.astype(np.int32))))
    scanned = jax.jit(Transformer(replace(config, scan_layers=True)).apply)({"params": stacked}, *arguments)
    looped = jax.jit(Transformer(config).apply)({"params": params}, *arguments)
    assert_allclose(scanned[MASK], looped[MASK], atol=1e-5)
    read_config, read = load_hf(tmp_path, scan_layers=True)
    assert read_config == replace(config, scan_layers=True)
    jax.tree.map(assert_array_equal, read, stacked)


SIZES = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 12, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 4096,
}  # fmt: skip
LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 512}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 3.0]}
PUBLISHED = {
    "Llama 2": {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_scaling": None},
    "Llama 3.2": {
        "model_type": "llama", "rope_theta": 500000.0, "head_dim": 8, "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
    },
    "a longer Llama": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 8.0}},
    "Mistral 0.1": {"model_type": "mistral", "sliding_window": 4096, "rope_theta": 10000.0},
    "Mistral 0.3": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6},
    "Qwen2.5": {
        "model_type": "qwen2", "max_window_layers": 7, "sliding_window": 32768, "use_sliding_window": False,
        "rope_theta": 1e6, "tie_word_embeddings": True,
    },
    "Qwen2.5 with windows": {
        "model_type": "qwen2", "max_window_layers": 7, "sliding_window": 32768, "use_sliding_window": True,
    },
    "Qwen3": {
        "model_type": "qwen3", "head_dim": 16, "attention_bias": False, "max_window_layers": 28, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "use_sliding_window": False,
    },
    "Gemma 2": {
        "model_type": "gemma2", "head_dim": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096,
    },
    "Gemma 3 1B": {
        "model_type": "gemma3_text", "head_dim": 16, "attn_logit_softcapping": None, "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    "Gemma 3, scaled": {
        "model_type": "gemma3_text", "head_dim": 16, "rope_local_base_freq": 20000, "rope_theta": 1000000,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 512,
    },
    "OLMo 2": {"model_type": "olmo2", "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 500000},
    "SmolLM3": {
        "model_type": "smollm3", "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 3,
        "rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False, "max_window_layers": 28,
    },
    "GPT-2": {
        "model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "n_ctx": 1024, "n_positions": 1024,
        "vocab_size": 64, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    },
    "Pythia": {
        "model_type": "gpt_neox", "hidden_act": "gelu", "rotary_emb_base": 10000, "rotary_pct": 0.25,
        "use_parallel_residual": True, "tie_word_embeddings": False,
    },
    "Phi-3 4k": {
        "model_type": "phi3", "original_max_position_embeddings": 4096, "rope_scaling": None, "sliding_window": 2047,
    },
    "Phi-4 mini": {
        "model_type": "phi3", "partial_rotary_factor": 0.75, "original_max_position_embeddings": 512,
        "rope_scaling": LONGROPE, "sliding_window": 262144, "tie_word_embeddings": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_as_first_published_are_read_as_transformers_reads_them(name):
    """In the words of transformers 4, where those of 5 are others."""
    given = (SIZES if PUBLISHED[name]["model_type"] != "gpt2" else {}) | PUBLISHED[name]
    family = FAMILIES[given["model_type"]]
    assert family.read(given) == family.read(AutoConfig.for_model(**copy.deepcopy(given)).to_dict())


@pytest.mark.parametrize("name", MODELS)
def test_what_a_config_leaves_out_is_what_it_is_in_transformers_or_an_error(name):
    family = FAMILIES[MODELS[name][0]]
    written = torch_model(name).config.to_dict()
    compared = 0
    # Where ours are the same for all families: lengths are not enforced, and the shapes of tensors tell of heads.
    others = {"model_type", "max_position_embeddings", "original_max_position_embeddings", "num_key_value_heads"}
    for left_out in set(written) - others:
        given = {key: value for key, value in written.items() if key != left_out}
        try:
            ours = family.read(given)
        except ValueError as error:
            assert f"{left_out} is missing" in str(error)
            continue
        assert ours == family.read(AutoConfig.for_model(**copy.deepcopy(given)).to_dict()), left_out
        compared += 1
    assert compared > 5
