"""The names that each Hugging Face architecture uses: a table for its config.json, and one for its tensors."""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.entries import (
    Entry,
    Json,
    activation,
    embedding_scale,
    fixed,
    flag,
    no_positions,
    number,
    one_window,
    only,
    query_scale,
    rope,
    rope_layers,
    size,
    some_windows,
    two_ropes,
)


class Cut(NamedTuple):
    """Which of our parameters a tensor holds: several lie side by side along the output axis."""

    parts: tuple[str, ...]
    turned: bool = False
    """[out, in] as torch's Linear has it; ours are [in, out]."""
    by_head: bool = False
    """The parts of head 0, then those of head 1, …"""


def linear(theirs: str, *ours: str, turned: bool = True, by_head: bool = False) -> dict[str, Cut]:
    """The tensors of a linear layer, which holds our modules `ours` side by side."""
    return {
        f"{theirs}.weight": Cut(tuple(f"{name}/kernel" for name in ours), turned, by_head),
        f"{theirs}.bias": Cut(tuple(f"{name}/bias" for name in ours), False, by_head),
    }


def norm(theirs: str, ours: str) -> dict[str, Cut]:
    """The tensors of a norm."""
    return {f"{theirs}.weight": Cut((f"{ours}/scale",)), f"{theirs}.bias": Cut((f"{ours}/bias",))}


HEAD = {"lm_head.weight": Cut(("head",), turned=True)}
ENDS = {"model.embed_tokens.weight": Cut(("embedding",)), **norm("model.norm", "final_norm"), **HEAD}
ATTENTION = {
    **linear("self_attn.q_proj", "query"),
    **linear("self_attn.k_proj", "key"),
    **linear("self_attn.v_proj", "value"),
    **linear("self_attn.o_proj", "output"),
}
QK_NORMS = norm("self_attn.q_norm", "query_norm") | norm("self_attn.k_norm", "key_norm")
MLP = {**linear("mlp.gate_proj", "gate"), **linear("mlp.up_proj", "up"), **linear("mlp.down_proj", "down")}
INPUT_NORMS = norm("input_layernorm", "attention_norm") | norm("post_attention_layernorm", "feed_forward_norm")
OUTPUT_NORMS = {
    **norm("post_attention_layernorm", "attention_post_norm"),
    **norm("post_feedforward_layernorm", "feed_forward_post_norm"),
}
BOTH_NORMS = {
    **norm("input_layernorm", "attention_norm"),
    **norm("pre_feedforward_layernorm", "feed_forward_norm"),
    **OUTPUT_NORMS,
}


@dataclass(frozen=True)
class Family:
    """An architecture: its classes, the table of its config, and those of its tensors.

    Tensors whose parts the config has no place for (biases) are left out.
    """

    name: str
    classes: str
    """The beginning of its classes' names, before ForCausalLM and ForSequenceClassification."""
    config: tuple[Entry, ...]
    layer_tensors: dict[str, Cut]
    prefix: str = "model."
    """The beginning of all tensors' names but the heads'; a checkpoint of the bare model goes without."""
    layer: str = "model.layers.{}."
    tensors: dict[str, Cut] | None = None
    """Outside the layers, if they have other names than in a Llama."""
    language_model: str | None = None
    """The class of the language model, where it has another name."""
    passed_over: tuple[str, ...] = ("rotary_emb.inv_freq",)
    """Ends of names: buffers that older versions saved."""
    older_names: tuple[tuple[str, str], ...] = ()

    @property
    def rows(self) -> set[str]:
        """The rows of config.json that the table reads."""
        return {row for entry in self.config for row in entry.rows}

    def read(self, hf: Json) -> ModelConfig:
        """The config that config.json says. Raises ValueError for what is missing or not supported."""
        values: Json = {"family": self.name}
        for entry in self.config:
            values |= entry.read(hf)
        return ModelConfig(**values)

    def write(self, config: ModelConfig) -> Json:
        """config.json. Raises ValueError for a config that no model of this family has."""
        hf: Json = {"model_type": self.name}
        for entry in self.config:
            hf |= entry.write(config)
        back = self.read(hf)
        # How it is computed is for no checkpoint to know.
        ways = ("precision", "scan_layers", "apart_when_decoding", "remat")
        plain = replace(config, **{name: getattr(back, name) for name in ways})
        if not any(plain.windows):
            plain = replace(plain, windows=())
        for name in (f.name for f in fields(config)):
            value, its = getattr(plain, name), getattr(back, name)
            if value != its:
                raise ValueError(f"{name} {value!r} cannot be saved as {self.name}: there it is {its!r}")
        return hf

    def places(self, n_layers: int) -> dict[str, Cut]:
        """Cuts by the full name of the tensor, with the full names of ours."""
        cuts = dict(ENDS if self.tensors is None else self.tensors)
        for i in range(n_layers):
            for theirs, cut in self.layer_tensors.items():
                parts = tuple(f"layer_{i}/{part}" for part in cut.parts)
                cuts[self.layer.format(i) + theirs] = cut._replace(parts=parts)
        return cuts


SIZES = (
    size("vocab_size", "vocab_size"),
    size("d_model", "hidden_size"),
    size("n_layers", "num_hidden_layers"),
    size("n_heads", "num_attention_heads"),
    size("d_ff", "intermediate_size"),
    size("max_length", "max_position_embeddings", lambda hf: 2048),
)
GROUPS = size("n_kv_heads", "num_key_value_heads", lambda hf: hf["num_attention_heads"])
HEAD_DIM = size("head_dim", "head_dim", lambda hf: hf["hidden_size"] // hf["num_attention_heads"])
GIVEN_HEAD_DIM = size("head_dim", "head_dim")
ATTENTION_BIAS = flag("attention_bias", False, "qkv_bias", "output_bias")
MLP_BIAS = flag("mlp_bias", False, "mlp_bias")
SILU = activation("hidden_act", "silu")


def rms(epsilon: float) -> Entry:
    """The epsilon of RMS norms."""
    return number("norm_eps", "rms_norm_eps", epsilon)


def tied(default: bool) -> Entry:
    """Whether the head is the embedding."""
    return flag("tie_word_embeddings", default, "tie_embeddings")


def late_window(hf: Json, layer: int) -> bool:
    """Whether a layer has a window where the first `max_window_layers` have none (Qwen2)."""
    return layer >= hf.get("max_window_layers", 28)


GEMMA = (
    *SIZES, GROUPS, GIVEN_HEAD_DIM, rms(1e-6), tied(True), ATTENTION_BIAS, query_scale(), embedding_scale(),
    activation("hidden_activation", "gelu_pytorch_tanh"), only("use_bidirectional_attention", False),
    fixed(norm_offset=1.0, norm_at="both"),
)  # fmt: skip

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "llama", "Llama",
            (*SIZES, GROUPS, HEAD_DIM, rms(1e-6), tied(False), rope(10_000.0), ATTENTION_BIAS, MLP_BIAS, SILU),
            ATTENTION | MLP | INPUT_NORMS,
        ),
        Family(
            "mistral", "Mistral",
            (*SIZES, GROUPS, HEAD_DIM, rms(1e-6), tied(False), rope(10_000.0), one_window(4096), SILU),
            ATTENTION | MLP | INPUT_NORMS,
        ),
        Family(
            "qwen2", "Qwen2",
            (*SIZES, GROUPS, HEAD_DIM, rms(1e-6), tied(False), rope(10_000.0), SILU, fixed(qkv_bias=True),
             some_windows(late_window, "max_window_layers", switch="use_sliding_window")),
            ATTENTION | MLP | INPUT_NORMS,
        ),
        Family(
            "qwen3", "Qwen3",
            (*SIZES, GROUPS, GIVEN_HEAD_DIM, rms(1e-6), tied(False), rope(10_000.0), SILU, ATTENTION_BIAS,
             fixed(qk_norm="head"), some_windows(late_window, "max_window_layers", switch="use_sliding_window")),
            ATTENTION | QK_NORMS | MLP | INPUT_NORMS,
        ),
        Family(
            "gemma2", "Gemma2",
            (*GEMMA, rope(10_000.0), number("attention_softcap", "attn_logit_softcapping", 50.0),
             number("final_softcap", "final_logit_softcapping", 30.0),
             some_windows(lambda hf, i: (i + 1) % 2 != 0)),
            ATTENTION | MLP | BOTH_NORMS,
        ),
        Family(
            "gemma3_text", "Gemma3Text",
            (*GEMMA, two_ropes(), only("attn_logit_softcapping", None), fixed(qk_norm="head"),
             number("final_softcap", "final_logit_softcapping", None),
             some_windows(lambda hf, i: (i + 1) % hf.get("sliding_window_pattern", 6) != 0, "sliding_window_pattern")),
            ATTENTION | QK_NORMS | MLP | BOTH_NORMS,
            language_model="Gemma3ForCausalLM",
        ),
        Family(
            "olmo2", "Olmo2",
            (*SIZES, GROUPS, HEAD_DIM, rms(1e-5), tied(False), rope(10_000.0), SILU, ATTENTION_BIAS,
             fixed(qk_norm="projection", norm_at="output")),
            ATTENTION | QK_NORMS | MLP | OUTPUT_NORMS,
        ),
        Family(
            "smollm3", "SmolLM3",
            (*SIZES, GROUPS, HEAD_DIM, rms(1e-6), tied(True), rope(2_000_000.0), SILU, ATTENTION_BIAS, MLP_BIAS,
             no_positions(),
             some_windows(lambda hf, i: not rope_layers(hf)[i], switch="use_sliding_window", usual=None)),
            ATTENTION | MLP | INPUT_NORMS,
        ),
        Family(
            "phi3", "Phi3",
            (*SIZES, GROUPS, HEAD_DIM, rms(1e-5), tied(False),
             rope(10_000.0, part=("partial_rotary_factor", 1.0), longrope_names=("su", "yarn")), one_window(None),
             SILU),
            {**linear("self_attn.qkv_proj", "query", "key", "value"), **linear("self_attn.o_proj", "output"),
             **linear("mlp.gate_up_proj", "gate", "up"), **linear("mlp.down_proj", "down"), **INPUT_NORMS},
        ),
        Family(
            "gpt_neox", "GPTNeoX",
            (*SIZES, number("norm_eps", "layer_norm_eps", 1e-5), tied(False),
             Entry((), lambda hf: {"n_kv_heads": hf["num_attention_heads"],
                                   "head_dim": hf["hidden_size"] // hf["num_attention_heads"]}),
             rope(10_000.0, theta_name="rotary_emb_base", part=("rotary_pct", 0.25)),
             flag("use_parallel_residual", True, "parallel_residual"),
             flag("attention_bias", True, "qkv_bias", "output_bias"), activation("hidden_act", "gelu"),
             fixed(norm="layer", gated_mlp=False, mlp_bias=True)),
            {**linear("attention.query_key_value", "query", "key", "value", by_head=True),
             **linear("attention.dense", "output"), **linear("mlp.dense_h_to_4h", "up"),
             **linear("mlp.dense_4h_to_h", "down"), **INPUT_NORMS},
            prefix="gpt_neox.", layer="gpt_neox.layers.{}.",
            tensors={"gpt_neox.embed_in.weight": Cut(("embedding",)),
                     **norm("gpt_neox.final_layer_norm", "final_norm"), **HEAD},
            passed_over=(".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"),
            older_names=(("embed_out.weight", "lm_head.weight"),),
        ),
        Family(
            "gpt2", "GPT2",
            (size("vocab_size", "vocab_size"), size("d_model", "n_embd"), size("n_layers", "n_layer"),
             size("n_heads", "n_head"), size("d_ff", "n_inner", lambda hf: 4 * hf["n_embd"]),
             size("max_length", "n_positions", lambda hf: 1024),
             Entry((), lambda hf: {"n_kv_heads": hf["n_head"], "head_dim": hf["n_embd"] // hf["n_head"]}),
             number("norm_eps", "layer_norm_epsilon", 1e-5), tied(True), activation("activation_function", "gelu_new"),
             only("scale_attn_weights", True), only("scale_attn_by_inverse_layer_idx", False),
             only("add_cross_attention", False),
             fixed(rope_theta=10_000.0, norm="layer", gated_mlp=False, learned_positions=True, qkv_bias=True,
                   output_bias=True, mlp_bias=True)),
            {**linear("attn.c_attn", "query", "key", "value", turned=False),
             **linear("attn.c_proj", "output", turned=False), **linear("mlp.c_fc", "up", turned=False),
             **linear("mlp.c_proj", "down", turned=False),
             **norm("ln_1", "attention_norm"), **norm("ln_2", "feed_forward_norm")},
            prefix="transformer.", layer="transformer.h.{}.",
            tensors={"transformer.wte.weight": Cut(("embedding",)),
                     "transformer.wpe.weight": Cut(("position_embedding",)),
                     **norm("transformer.ln_f", "final_norm"), **HEAD},
            language_model="GPT2LMHeadModel",
            passed_over=(".attn.bias", ".attn.masked_bias"),
        ),
    )
}  # fmt: skip


def family_of(config: ModelConfig) -> Family:
    """Its tables. Raises ValueError for a family that has none."""
    if config.family not in FAMILIES:
        raise ValueError(f"family {config.family!r} is not supported, only {', '.join(sorted(FAMILIES))}")
    return FAMILIES[config.family]
