"""A model with its tokenizer, read from a Hugging Face folder. A stage starts from it."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jax.sharding import NamedSharding

from rlhf_jax.batches import Completions, Prompts
from rlhf_jax.errors import UserError
from rlhf_jax.models import FLOAT32, ModelConfig, Precision, load_hf, load_hf_config, load_hf_reward_model
from rlhf_jax.models.weights import param_shapes
from rlhf_jax.sharding import current_mesh, parameter_sharding
from rlhf_jax.types import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Pretrained(NamedTuple):
    """A language model (or a reward model: parameters of a `ScalarModel`) and its tokenizer."""

    config: ModelConfig
    params: Params
    """The parameters; None for a model that is not initialised yet."""
    tokenizer: "PreTrainedTokenizerBase"
    name: str | None = None
    """The folder, or the name on the Hub, that the model was read from."""

    @property
    def eos_id(self) -> int:
        """The token that ends an answer."""
        return self.tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        """The padding token; the EOS token where the tokenizer has none. Masks come from lengths, never from it."""
        return self.eos_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def read_prompts(self, prompts: Prompts) -> list[str]:
        """Prompts as text, special tokens included."""
        rows = zip(np.asarray(prompts.tokens), np.asarray(prompts.mask), strict=True)
        return self.tokenizer.batch_decode([ids[mask].tolist() for ids, mask in rows])

    def read_answers(self, completions: Completions) -> list[str]:
        """Answers as text without special tokens."""
        rows = zip(np.asarray(completions.tokens), np.asarray(completions.mask), strict=True)
        return self.tokenizer.batch_decode([ids[real].tolist() for ids, real in rows], skip_special_tokens=True)

    def ended(self, completions: Completions) -> np.ndarray:
        """Whether each answer ended by itself: [B], bool."""
        return ((np.asarray(completions.tokens) == self.eos_id) & np.asarray(completions.mask)).any(axis=1)


def load_policy(path_or_name: str, precision: Precision = FLOAT32) -> Pretrained:
    """Reads a language model. Raises UserError for a folder or a name that cannot be read."""
    return _load(path_or_name, load_hf, precision)


def load_reward_model(path_or_name: str, precision: Precision = FLOAT32) -> Pretrained:
    """Reads a …ForSequenceClassification with one label. Raises UserError for a name that cannot be read."""
    return _load(path_or_name, load_hf_reward_model, precision)


def load_tokenizer(path_or_name: str) -> "PreTrainedTokenizerBase":
    """Reads a tokenizer. Raises UserError when it cannot be read, or has no EOS token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_name, local_files_only=Path(path_or_name).is_dir())
    except (ValueError, OSError) as error:
        raise UserError(f"{path_or_name}: {str(error).splitlines()[0]}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path_or_name}: the tokenizer has no EOS token, and every answer must end in one")
    return tokenizer


def hf_shardings(path_or_name: str | Path) -> Callable[[str], NamedSharding] | None:
    """The argument `shardings` of `load_hf` and `load_hf_reward_model`: each device then reads only its slices.

    None without a mesh.
    """
    mesh = current_mesh()
    if mesh is None:
        return None
    shapes = param_shapes(load_hf_config(path_or_name))
    return lambda name: parameter_sharding(mesh, name, shapes.get(name.removeprefix("trunk/"), ()))


def _load(path_or_name: str, read: Callable[..., tuple[ModelConfig, Any]], precision: Precision) -> Pretrained:
    try:
        config, params = read(path_or_name, shardings=hf_shardings(path_or_name), precision=precision)
    except (ValueError, OSError) as error:
        raise UserError(str(error).splitlines()[0]) from None
    return Pretrained(config, params, load_tokenizer(path_or_name), path_or_name)
