"""Estimates the memory of each stage by size of model, and the smallest slice and mesh that has it. Nothing is run.

    python tpu/memory.py

Bytes a parameter: one that is trained has its weight, its gradient and Adam's two moments in float32 (4 + 4 + 4 + 4);
one that is frozen has its weight in bfloat16 (2). The rest of the memory is for activations, logits and the KV cache.
"""

from dataclasses import dataclass

TRAINED, FROZEN = 16, 2
RANK = 16
"""The rank of the adapters, which are on all seven kernels of a layer."""
SHARE = 0.5
"""The share of a chip's memory for weights, gradients and moments. The rest depends on batch and length."""
UTILISATION = 0.4
"""The assumed share of a chip's peak, for the chip-hours."""


@dataclass(frozen=True)
class Model:
    """The shape of a decoder with a gated feed-forward (Llama, Qwen)."""

    name: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    tied: bool

    @property
    def kernels(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a layer's seven kernels: q, k, v, o, gate, up, down."""
        q, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        attention = [(self.d_model, q), (self.d_model, kv), (self.d_model, kv), (q, self.d_model)]
        return [*attention, (self.d_model, self.d_ff), (self.d_model, self.d_ff), (self.d_ff, self.d_model)]

    @property
    def parameters(self) -> int:
        """Embeddings, kernels and norms; biases are left out."""
        embeddings = (1 if self.tied else 2) * self.vocab_size * self.d_model
        norms = (2 * self.n_layers + 1) * self.d_model
        return embeddings + self.n_layers * sum(ins * outs for ins, outs in self.kernels) + norms

    @property
    def adapter(self) -> int:
        """Parameters of one adapter."""
        return RANK * self.n_layers * sum(ins + outs for ins, outs in self.kernels)

    @property
    def cache(self) -> int:
        """Bytes of the KV cache for one token of one sequence, bfloat16."""
        return 2 * 2 * self.n_layers * self.n_kv_heads * self.head_dim


@dataclass(frozen=True)
class Chip:
    """A TPU, with the sizes that a slice comes in."""

    name: str
    memory: float
    peak: float
    """FLOP a second, bfloat16."""
    slices: tuple[int, ...]


MODELS = [
    Model("Qwen2.5-0.5B", 151_936, 896, 24, 14, 2, 64, 4_864, tied=True),
    Model("Llama-3.2-1B", 128_256, 2_048, 16, 32, 8, 64, 8_192, tied=True),
    Model("Llama-3.1-8B", 128_256, 4_096, 32, 32, 8, 128, 14_336, tied=False),
    Model("Qwen2.5-32B", 152_064, 5_120, 64, 40, 8, 128, 27_648, tied=False),
    Model("Llama-3.1-70B", 128_256, 8_192, 80, 64, 8, 128, 28_672, tied=False),
]
CHIPS = [
    Chip("v5e", 16e9, 197e12, (1, 4, 8, 16, 32, 64, 128, 256)),
    Chip("v6e", 32e9, 918e12, (1, 4, 8, 16, 32, 64, 128, 256)),
    Chip("v5p", 95e9, 459e12, (4, 8, 16, 32, 64, 128, 256)),
]


def stages(model: Model) -> dict[str, float]:
    """Bytes that stay in memory through a stage's step."""
    size, adapter = model.parameters, model.adapter
    return {
        "SFT": TRAINED * size,
        "DPO": TRAINED * size + FROZEN * size,
        "PPO, four models": 2 * TRAINED * size + 2 * FROZEN * size,
        # Trained: the policy's and the critic's adapters. Frozen: the trunk and the reward model's adapter.
        "PPO, one trunk": 2 * TRAINED * adapter + FROZEN * (size + adapter),
    }


def mesh(model: Model, stage: str, needed: float, chip: Chip) -> str:
    """The smallest slice of the chip whose share of memory holds it, as data × fsdp × tensor; a dash if there is none.

    A rollout reads every weight for every token, and over "fsdp" would gather them for every token: PPO splits heads
    over "tensor", over the four chips of one host at most and no further than there are key-value heads.
    """
    for count in chip.slices:
        if count * chip.memory * SHARE >= needed:
            tensor = min(4, count, model.n_kv_heads) if stage.startswith("PPO") else 1
            return f"1×{count // tensor}×{tensor}"
    return "–"


def table() -> str:
    """Memory and meshes by model and stage."""
    lines = ["| model | stage | GB | " + " | ".join(chip.name for chip in CHIPS) + " |", "|---|---|--:|" + "---|" * 3]
    for model in MODELS:
        for stage, needed in stages(model).items():
            meshes = " | ".join(mesh(model, stage, needed, chip) for chip in CHIPS)
            lines.append(f"| {model.name} | {stage} | {needed / 1e9:,.1f} | {meshes} |")
    return "\n".join(lines)


def hours() -> str:
    """Chip-hours that SFT takes for 10⁹ tokens, and the KV cache, by model."""
    header = "| model | parameters (10⁹) | KV cache of 1,000 tokens (MB) | "
    lines = [header + " | ".join(f"{chip.name} hours" for chip in CHIPS) + " |", "|---|" + "--:|" * 5]
    for model in MODELS:
        flops = 6 * model.parameters * 1e9
        each = " | ".join(f"{flops / (chip.peak * UTILISATION) / 3600:,.0f}" for chip in CHIPS)
        lines.append(f"| {model.name} | {model.parameters / 1e9:.2f} | {model.cache * 1e3 / 1e6:,.0f} | {each} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), hours(), sep="\n\n")
