"""The parameters that a stage trains: all weights, or low-rank adapters over frozen ones.

A stage always has a frozen tree and a trainable tree; `with_lora(frozen, trainable)` is the model. Where all weights
are trained the frozen tree is empty. Only the trainable tree has gradients and an optimiser's state.
"""

import re
from typing import Literal

import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from rlhf_jax.errors import UserError
from rlhf_jax.models import cast_frozen, init_lora, merge_lora, quantize_frozen, with_lora
from rlhf_jax.models.transformer import LORA_LEAVES
from rlhf_jax.models.weights import flat
from rlhf_jax.sharding import create, to_host
from rlhf_jax.types import Params

FrozenDtype = Literal["float32", "bfloat16", "int8"]


def split_trainable(
    params: Params,
    key: PRNGKeyArray,
    *,
    rank: int,
    alpha: float,
    targets: str,
    rank_stabilized: bool,
    frozen_dtype: FrozenDtype | None,
) -> tuple[Params, Params]:
    """(frozen, trainable) of a language model's or a ScalarModel's parameters; rank 0 trains all of them.

    With a rank the trainable tree is a new adapter, which changes nothing yet, and a ScalarModel's head. The frozen
    weights are rounded to `frozen_dtype` if it is given.
    Raises UserError when `targets` is not a regular expression, or matches no kernel.
    Reference: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
    """
    if not rank:
        return {}, params
    head = {"head": params["head"]} if "trunk" in params else {}
    frozen = {name: value for name, value in params.items() if name not in head}
    if "layer_" in targets and "layers" in frozen.get("trunk", frozen):
        raise UserError(
            f"lora-targets {targets!r} tells layers apart, and this model's are scanned, as layers/query/kernel: give"
            " --scan-layers False"
        )
    try:
        adapter = create(
            lambda: init_lora(key, frozen, rank=rank, alpha=alpha, targets=targets, rank_stabilized=rank_stabilized)
        )
    except (ValueError, re.error) as error:
        raise UserError(f"lora-targets {targets!r}: {error}") from None
    if frozen_dtype == "int8":
        frozen = quantize_frozen(frozen)
    elif frozen_dtype:
        frozen = cast_frozen(frozen, jnp.dtype(frozen_dtype))
    return frozen, adapter | head


def merged_on_host(frozen: Params, trainable: Params) -> Params:
    """The model's plain parameters as numpy arrays, adapters merged into the weights."""
    return to_host(merge_lora(with_lora(frozen, trainable)))


def over_trunk(trunk: Params, own: Params) -> Params:
    """One role's parameters where several roles share a trunk: `own` lies over it, or is complete by itself.

    A tree that has only adapters and a scalar head lies over the trunk (a ScalarModel's tree over {"trunk": trunk}).
    The empty tree is the trunk itself. Any other tree is complete. The function is traceable and copies nothing.
    """
    if is_complete(own):
        return own
    return with_lora({"trunk": trunk} if "trunk" in own else trunk, own)


def is_complete(own: Params) -> bool:
    """Whether a role's tree has weights of its own, and not only adapters and a scalar head."""
    return any(not name.startswith("head/") and name.rpartition("/")[2] not in LORA_LEAVES for name in flat(own))
