"""Every family beside its torch class, on small random models in a batch with left padding.

    python tests/models/parity.py > experiments/results/families.md
Two minutes on 2 CPU cores, torch among them.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_jax.models import (
    ScalarModel,
    Transformer,
    load_hf,
    load_hf_reward_model,
    save_hf,
    save_hf_reward_model,
)
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
"""The first of each family has the most of what it may have."""


class Kind(NamedTuple):
    """A language model, or a reward model."""

    classes: Any
    options: dict[str, int]
    load: Callable[..., Any]
    save: Callable[..., None]
    ours: type
    chosen: tuple[Any, ...]
    """Which of our outputs are compared: where there is no padding, or at the last token."""
    theirs: Any
    """Which of torch's."""


LANGUAGE = Kind(AutoModelForCausalLM, {}, load_hf, save_hf, Transformer, (MASK,), (MASK,))
REWARD = Kind(
    AutoModelForSequenceClassification, {"num_labels": 1}, load_hf_reward_model, save_hf_reward_model, ScalarModel,
    (slice(None), -1), (slice(None), 0),
)  # fmt: skip


class Agreement(NamedTuple):
    """Of our outputs with torch's."""

    spread: float
    """The standard deviation of torch's."""
    difference: float
    """The largest, of our model as loaded."""
    saved_difference: float
    """The largest, of torch's model as loaded from what we saved."""
    same: bool
    """What we load from what we saved is what was saved, to the bit; torch takes it for the same class."""


def torch_model(name: str, kind: Kind = LANGUAGE) -> Any:
    """Small, and every weight matters: norms are not 1, biases not 0, logits of order 1."""
    torch.manual_seed(0)
    family, changes = MODELS[name]
    sizes = {k: v for k, v in SIZES.items() if not (family == "gpt2" and k == "intermediate_size")}
    config = AutoConfig.for_model(family, **(sizes | changes | kind.options))
    model = kind.classes.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            norm = ("norm" in weight_name or "ln_" in weight_name) and not family.startswith("gemma")
            centre = 1.0 if norm and weight_name.endswith("weight") else 0.0
            weight.copy_(centre + 0.3 * torch.randn_like(weight))
    return model


def torch_outputs(model: Any, kind: Kind) -> np.ndarray:
    mask, positions = torch.tensor(MASK.astype(int)), torch.tensor(POSITIONS)
    with torch.no_grad():
        outputs = model(torch.tensor(TOKENS), attention_mask=mask, position_ids=positions).logits
    return outputs.numpy()[kind.theirs]


def agreement(name: str, kind: Kind, folder: Path) -> Agreement:
    """Torch's model is saved, loaded by us, saved by us, and loaded by both; each row has its own positions."""
    theirs = torch_model(name, kind)
    theirs.save_pretrained(folder / "in")
    config, params = kind.load(folder / "in")
    expected = torch_outputs(theirs, kind)
    arguments = map(jnp.asarray, (TOKENS, POSITIONS, MASK.astype(np.int32)))
    ours = np.asarray(jax.jit(kind.ours(config).apply)({"params": params}, *arguments))[kind.chosen]

    kind.save(folder / "out", config, params)
    path = folder / "out" / "config.json"  # A tokenizer says which token pads otherwise.
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": PAD}))
    back, info = kind.classes.from_pretrained(folder / "out", attn_implementation="eager", output_loading_info=True)
    whole = not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    again, same = kind.load(folder / "out")
    return Agreement(
        float(expected.std()),
        float(np.abs(ours - expected).max()),
        float(np.abs(torch_outputs(back.eval(), kind) - expected).max()),
        whole
        and type(back) is type(theirs)
        and again == config
        and jax.tree.structure(same) == jax.tree.structure(params)
        and all(map(np.array_equal, jax.tree.leaves(same), jax.tree.leaves(params))),
    )


def greedy(name: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """What we write after the prompts, and what transformers writes."""
    theirs = torch_model(name)
    theirs.save_pretrained(folder)
    config, params = load_hf(folder)
    written = theirs.generate(
        torch.tensor(TOKENS), attention_mask=torch.tensor(MASK.astype(int)), max_new_tokens=NEW, do_sample=False
    )
    completions = generate(
        Transformer(config), params, jnp.asarray(TOKENS), jnp.asarray(MASK), jax.random.key(0),
        max_new_tokens=NEW, temperature=0.0, eos_id=None, pad_id=PAD,
    )  # fmt: skip
    return np.asarray(completions.tokens), written.numpy()[:, WIDTH:]


def main() -> None:
    print(f"""# Every family beside its torch class

    python tests/models/parity.py > experiments/results/families.md

Small models with random weights: 2 layers, width {SIZES["hidden_size"]}, {SIZES["num_attention_heads"]} heads.
Three prompts of {", ".join(map(str, LENGTHS))} tokens, left-padded to {WIDTH}. Float32 on CPU:
jax {jax.__version__}, transformers {transformers.__version__}, torch {torch.__version__.partition("+")[0]}.

- σ: the standard deviation of torch's logits, or rewards. Δ: the largest difference from them anywhere.
- greedy: prompts after which our {NEW} tokens are those of transformers' `generate`.
- saved: Δ of the logits and of the rewards of torch's class when loaded from what we wrote, and whether we load the
  same config and parameters from it, to the bit.

| model | logits: σ | Δ | greedy | rewards: σ | Δ | saved: Δ | the same |
|---|---|---|---|---|---|---|---|""")
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            logits = agreement(name, LANGUAGE, Path(folder, "language"))
            rewards = agreement(name, REWARD, Path(folder, "reward"))
            ours, theirs = greedy(name, Path(folder, "greedy"))
        cells = [
            name,
            *(f"{logits.spread:.1f}", f"{logits.difference:.1e}"),
            f"{(ours == theirs).all(axis=1).sum()} of {len(ours)}",
            *(f"{rewards.spread:.1f}", f"{rewards.difference:.1e}"),
            f"{logits.saved_difference:.1e}, {rewards.saved_difference:.1e}",
            "yes" if logits.same and rewards.same else "NO",
        ]
        print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
