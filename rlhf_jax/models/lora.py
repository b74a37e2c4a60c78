"""Low-rank adapters as trees that lie over a tree of parameters: one frozen trunk can carry many of them.

An adapter has the trunk's names and, beside each kernel it adapts, three leaves: `lora_a` [in, r], `lora_b` [r, out]
and the number `lora_scale` (with an axis of layers before, where layers are scanned). `Linear` adds scale·(xA)B where
it finds them, so that no second kernel comes to be.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PRNGKeyArray

from rlhf_jax.models.precision import NORMS_AND_BIASES
from rlhf_jax.models.transformer import LORA_LEAVES, Dropout
from rlhf_jax.models.weights import flat, nested
from rlhf_jax.types import ScalarLike


def init_lora(
    key: PRNGKeyArray, params: Any, *, rank: int, alpha: ScalarLike, targets: str, rank_stabilized: bool = False
) -> Any:
    """An adapter that changes nothing yet: A normal with variance 1/in, B zero, in float32.

        W + s·AB,   s = α/r, or α/√r if rank-stabilized

    `targets` is a regular expression, looked for in names such as "layer_0/query/kernel" (scanned:
    "layers/query/kernel"); only kernels of `Linear` can be targets. Only shapes of `params` are read. `lora_scale`
    lies in the tree so that each adapter carries its own; it gets no gradient, and is to stay as it is.

    Raises ValueError for a rank below 1, and for targets that match no kernel.
    Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685; Kalajdzievski 2023, https://arxiv.org/abs/2312.03732.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    kernels = {name: leaf for name, leaf in sorted(flat(params).items()) if name.endswith("/kernel") and leaf.ndim > 1}
    names = [name for name in kernels if re.search(targets, name)]
    if not names:
        raise ValueError(f"targets {targets!r} match no kernel; there are kernels such as {next(iter(kernels), None)}")
    adapter: dict[str, jax.Array] = {}
    for name, name_key in zip(names, jax.random.split(key, len(names)), strict=True):
        *layers, width, features = kernels[name].shape
        a = jax.random.normal(name_key, (*layers, width, rank)) * width**-0.5
        b = jnp.zeros((*layers, rank, features))
        scale = jnp.full(layers, alpha / rank ** (0.5 if rank_stabilized else 1.0), jnp.float32)
        module = name.removesuffix("kernel")
        adapter |= {module + leaf: value for leaf, value in zip(LORA_LEAVES, (a, b, scale), strict=True)}
    return nested(adapter)


def with_lora(params: Any, own: Any) -> Any:
    """One tree of both, without a copy: what a model is applied to. Where both have a leaf, that of `own` counts.

    `own` is an adapter, or all that a role has for itself: {"trunk": adapter, "head": …} over {"trunk": params} is a
    ScalarModel, {} over params is params, and all parameters over {} are those.
    """
    if not (isinstance(params, dict) and isinstance(own, dict)):
        return own
    return params | {name: with_lora(params.get(name, {}), value) for name, value in own.items()}


def with_dropout(own: Any, key: PRNGKeyArray, *, rate: ScalarLike) -> Any:
    """`own` with adapters that drop numbers of what A reads, for the loss of one step and with that step's key.

        x W + s·(x̃ A) B,   x̃ = m·x / (1 − rate),   m ~ Bernoulli(1 − rate) for each number of x

    Every module of every layer has numbers of its own; the trunk and a head read x. Not for RL, where the policy that
    samples has to be the one that is trained.
    Reference: Hu et al. 2021, table 11, https://arxiv.org/abs/2106.09685; Srivastava et al. 2014,
    https://jmlr.org/papers/v15/srivastava14a.html.
    """
    leaves = flat(own)
    scales = {name: scale.shape for name, scale in sorted(leaves.items()) if name.endswith("lora_scale")}
    for (name, layers), module_key in zip(scales.items(), jax.random.split(key, len(scales)), strict=True):
        module = name.removesuffix("lora_scale")
        leaves[f"{module}lora_dropout"] = Dropout(jax.random.split(module_key, layers), jnp.full(layers, rate))
    return nested(leaves)


def split_lora(params: Any) -> tuple[Any, Any]:
    """`with_lora`, undone: (parameters without adapters, the adapters)."""
    parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name, leaf in flat(params).items():
        parts[name.rpartition("/")[2] in LORA_LEAVES][name] = leaf
    return nested(parts[0]), nested(parts[1])


def merge_lora(params: Any) -> Any:
    """The plain parameters that do the same; float32 is W + s·AB where there is an adapter, and W where it is int8."""
    frozen, adapters = map(flat, split_lora(params))
    for name in [name for name in frozen if name.endswith("/kernel_scale")]:
        kernel = name.removesuffix("_scale")
        frozen[kernel] = frozen[kernel] * jnp.expand_dims(frozen.pop(name), -2)
    for name in [name.removesuffix("lora_scale") for name in adapters if name.endswith("lora_scale")]:
        a, b, scale = (adapters[name + leaf] for leaf in LORA_LEAVES)
        product = jnp.matmul(a, b, precision="highest") * jnp.expand_dims(scale, (-2, -1))
        frozen[name + "kernel"] = jnp.asarray(frozen[name + "kernel"], jnp.float32) + product
    return nested(frozen)


def quantize_frozen(params: Any) -> Any:
    """Kernels of `Linear` as int8, with a `kernel_scale` for each output: for a trunk that is not trained.

        W ≈ Q·diag(s),   s_j = max_i |W_ij| / 127,   |W_ij − Q_ij·s_j| ≤ s_j / 2

    s is float32, and 1 where a column is 0. Embeddings, an untied language head, norms and biases stay as they are.
    Where layers are scanned, Q is converted to the type of activations one layer at a time; where not, XLA may keep
    all layers converted from the forward to the backward pass and through a rollout (its CPU backend does).

    Reference: Dettmers et al. 2022, §2.1, https://arxiv.org/abs/2208.07339.
    Deviation: activations stay as they are, and no column is set apart.
    """
    leaves = flat(params)
    for name in [name for name, leaf in leaves.items() if name.endswith("/kernel") and leaf.ndim > 1]:
        kernel = jnp.asarray(leaves[name], jnp.float32)
        scale = jnp.abs(kernel).max(axis=-2) / 127
        scale = jnp.where(scale > 0, scale, 1.0)
        leaves[name] = jnp.round(kernel / jnp.expand_dims(scale, -2)).astype(jnp.int8)
        leaves[f"{name}_scale"] = scale
    return nested(leaves)


def cast_frozen(params: Any, dtype: DTypeLike) -> Any:
    """Weights as `dtype`, norms and biases as they are: for a trunk that is not trained."""
    leaves = flat(params)
    cast = {
        name: leaf.astype(dtype) for name, leaf in leaves.items() if name.rpartition("/")[2] not in NORMS_AND_BIASES
    }
    return nested(leaves | cast)
