"""The shape of a decoder."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_jax.models.precision import FLOAT32, Precision
from rlhf_jax.models.rope import LongRope, RopeScaling


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder: a Llama, but for the fields from `family` on. Raises ValueError for one that cannot be.

    Models of other families differ in those fields only; `load_hf` fills them in.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    """Divides n_heads: grouped-query attention where smaller."""
    head_dim: int
    d_ff: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    max_length: int
    """The longest sequence it was made for; written to config.json, enforced by `length_limit` only."""
    precision: Precision = FLOAT32
    scan_layers: bool = False
    """One compiled layer under nn.scan, parameters stacked along axis 0."""
    apart_when_decoding: bool = False
    """Scanned layers are taken apart before tokens are sampled: the CPU backend would copy each matrix and the whole
    cache for each token. Where layers are not scanned it means nothing."""
    remat: bool | Callable[..., Any] = False
    """Compute each layer's activations again in the backward pass: all of them, or those that a policy does not keep,
    such as `jax.checkpoint_policies.dots_with_no_batch_dims_saveable` (it keeps the products with weights)."""
    attention: Literal["auto", "reference", "splash", "cudnn"] = "auto"
    """How a sequence reads itself: by the platform (`fused.attention_kernel`), by XLA's own operations, or by a TPU's
    or a GPU's kernel. A cache is always read by XLA's."""

    family: str = "llama"
    """`model_type` of the checkpoint it is saved as; the decoder does not read it."""
    norm: Literal["rms", "layer"] = "rms"
    """"layer" subtracts the mean and adds a bias (GPT-2, GPT-NeoX)."""
    norm_offset: float = 0.0
    """Added to every norm's scale: 1 in Gemma."""
    norm_at: Literal["input", "output", "both"] = "input"
    """Where attention and the feed-forward have a norm: at their output in OLMo 2, at both in Gemma 2 and 3."""
    parallel_residual: bool = False
    """The feed-forward reads what attention read, not its sum with attention's output (GPT-NeoX)."""
    qk_norm: Literal["head", "projection"] | None = None
    """Queries and keys normed before they turn: each head (Qwen3, Gemma 3), or all heads at once (OLMo 2)."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated_mlp: bool = True
    """down(act(gate(x))·up(x)); otherwise down(act(up(x))) (GPT-2, GPT-NeoX)."""
    learned_positions: bool = False
    """`max_length` embeddings added to those of the tokens, in place of rotary positions (GPT-2)."""
    rotary_fraction: float = 1.0
    """The share of head_dim that turns (GPT-NeoX, Phi-3)."""
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    """The theta of layers with a window, which are not scaled then (Gemma 3)."""
    nope_layers: tuple[int, ...] = ()
    """Layers without positions (SmolLM3)."""
    windows: tuple[int | None, ...] = ()
    """A number for each layer: it sees that many positions, its own among them. None or () sees all."""
    attention_scale: float | None = None
    """The factor of q·k; 1/√head_dim unless given (Gemma)."""
    attention_softcap: float | None = None
    """cap·tanh(scores / cap) (Gemma 2)."""
    final_softcap: float | None = None
    """cap·tanh(logits / cap) (Gemma 2)."""
    embedding_scale: float = 1.0
    """√d_model in Gemma; the tied head does without."""

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "d_model",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "d_ff",
            "max_length",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.rotary_width % 2 or not 0 <= self.rotary_width <= self.head_dim:
            part = "" if self.rotary_fraction == 1 else f"·rotary_fraction {self.rotary_fraction}"
            raise ValueError(f"head_dim must be even for rotary positions, not {self.head_dim}{part}")
        scaling = self.rope_scaling
        if isinstance(scaling, LongRope) and not (
            len(scaling.short_factors) == len(scaling.long_factors) == self.rotary_width // 2
        ):
            raise ValueError(f"long rope needs {self.rotary_width // 2} short and long factors, one a frequency")
        if self.windows and len(self.windows) != self.n_layers:
            raise ValueError(f"{len(self.windows)} windows for {self.n_layers} layers")
        if any(window is not None and window < 1 for window in self.windows):
            raise ValueError(f"a window must be at least 1: {self.windows}")
        if any(not 0 <= layer < self.n_layers for layer in self.nope_layers):
            raise ValueError(f"nope_layers {self.nope_layers} are not all among {self.n_layers} layers")

    @property
    def rotary_width(self) -> int:
        """Dimensions of a head that turn: 0 where positions are learned."""
        return 0 if self.learned_positions else int(self.head_dim * self.rotary_fraction)

    @property
    def length_limit(self) -> int | None:
        """The longest sequence that can be read at all, if there is one."""
        if self.learned_positions:
            return self.max_length
        return self.rope_scaling.original_length if isinstance(self.rope_scaling, LongRope) else None
