"""A model with its tokenizer, read from a Hugging Face folder. A stage starts from it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from rlhf_jax.batches import Completions, Prompts
from rlhf_jax.data.templates import check_template
from rlhf_jax.errors import UserError, first_line
from rlhf_jax.models import FLOAT32, ModelConfig, Precision, load_hf, load_hf_config, load_hf_reward_model
from rlhf_jax.models.files import checkpoint_folder, read_json
from rlhf_jax.models.hf import unread
from rlhf_jax.models.tokenizer import check_vocabulary, read_tokenizer, without_media
from rlhf_jax.models.weights import param_shapes
from rlhf_jax.sampling.ends import ended, is_end
from rlhf_jax.sharding import current_mesh, parameter_sharding
from rlhf_jax.types import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SCANNED_ABOVE = 8
"""A model of more layers than these has one layer compiled for all of them, and computes activations again."""


class Layout(NamedTuple):
    """How a model that is read computes."""

    precision: Precision = FLOAT32
    scan_layers: bool | None = None
    """One compiled layer for all; None for models of more than `SCANNED_ABOVE` layers."""
    remat: bool | None = None
    """Activations of a layer are computed again in the backward pass; None where layers are scanned."""


LAYOUT = Layout()


class Pretrained(NamedTuple):
    """A language model (or a reward model: parameters of a `ScalarModel`) and its tokenizer."""

    config: ModelConfig
    params: Params
    """The parameters; None for a model that is not initialised yet."""
    tokenizer: "PreTrainedTokenizerBase"
    name: str | None = None
    """The folder, or the name on the Hub, that the model was read from."""
    ends: tuple[int, ...] = ()
    """The tokens that end an answer by generation_config.json, or else by config.json."""
    notes: tuple[str, ...] = ()
    """A line for each thing that the folder says and that is not used: for whoever loads the model to say."""

    @property
    def eos_id(self) -> tuple[int, ...]:
        """The tokens that each end an answer; the tokenizer's EOS, in which texts to learn from end, is among them."""
        return tuple(dict.fromkeys((*self.ends, self.tokenizer.eos_token_id)))

    @property
    def pad_id(self) -> int:
        """The padding token; the EOS token where the tokenizer has none. Masks come from lengths, never from it."""
        tokenizer = self.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def read_prompts(self, prompts: Prompts) -> list[str]:
        """Prompts as text, special tokens included."""
        rows = zip(np.asarray(prompts.tokens), np.asarray(prompts.mask), strict=True)
        return self.tokenizer.batch_decode([ids[mask].tolist() for ids, mask in rows])

    def read_answers(self, completions: Completions) -> list[str]:
        """Answers as text, without special tokens and without the token that ended each."""
        tokens = np.asarray(completions.tokens)
        said = np.asarray(completions.mask) & ~is_end(tokens, self.eos_id)
        rows = zip(tokens, said, strict=True)
        return self.tokenizer.batch_decode([ids[real].tolist() for ids, real in rows], skip_special_tokens=True)

    def ended(self, completions: Completions) -> np.ndarray:
        """Whether each answer ended by itself: [B], bool."""
        return np.asarray(ended(completions, self.eos_id))


def load_policy(path_or_name: str, layout: Layout = LAYOUT) -> Pretrained:
    """Reads a language model. Raises UserError for a folder or a name that cannot be read."""
    return _load(path_or_name, load_hf, layout)


def load_reward_model(path_or_name: str, layout: Layout = LAYOUT) -> Pretrained:
    """Reads a …ForSequenceClassification with one label. Raises UserError for a name that cannot be read."""
    return _load(path_or_name, load_hf_reward_model, layout)


def load_tokenizer(path_or_name: str) -> "PreTrainedTokenizerBase":
    """Reads a tokenizer. Raises UserError when it cannot be read, or has no EOS token."""
    try:
        return read_tokenizer(checkpoint_folder(path_or_name))
    except (ValueError, OSError) as error:
        raise UserError(first_line(error)) from None


def end_ids(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end an answer: those of generation_config.json, or else of config.json, if they name any.

    Raises ValueError for ids that are none, and for those that a model of `vocab_size` tokens does not have: in
    either file, for the tokens of beginning and padding too. −1 says that there is none.
    """
    found: tuple[int, ...] = ()
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        values = read_json(path) if path.exists() else {}
        for key in ("bos_token_id", "pad_token_id", "eos_token_id"):
            value = values.get(key)
            ids = [token for token in (value if isinstance(value, list) else [value]) if token not in (None, -1)]
            for token in ids:
                if isinstance(token, bool) or not isinstance(token, int):
                    raise ValueError(f"{path}: {key} {value!r} is no token's number")
                if not 0 <= token < vocab_size:
                    raise ValueError(
                        f"{path}: {key} is {token}, and the model has {vocab_size} tokens, 0 to {vocab_size - 1}:"
                        " name one of those"
                    )
        found = tuple(ids) or found
    return found


def hf_shardings(path_or_name: str | Path) -> Callable[[str], NamedSharding] | None:
    """The argument `shardings` of `load_hf` and `load_hf_reward_model`: each device then reads only its slices.

    None without a mesh.
    """
    mesh = current_mesh()
    if mesh is None:
        return None
    config = load_hf_config(path_or_name)
    shapes = param_shapes(config)
    for name in [name for name in shapes if name.startswith("layer_0/")]:  # where layers are scanned
        shapes[name.replace("layer_0/", "layers/")] = (config.n_layers, *shapes[name])
    return lambda name: parameter_sharding(mesh, name, shapes.get(name.removeprefix("trunk/"), ()))


def _load(path_or_name: str, read: Callable[..., tuple[ModelConfig, Any]], layout: Layout) -> Pretrained:
    """All that is cheap to check is checked before the first tensor is read."""
    try:
        folder = checkpoint_folder(path_or_name)
        config = load_hf_config(folder)
        ends, notes = end_ids(folder, config.vocab_size), unread(folder)
        tokenizer, left_out = without_media(read_tokenizer(folder), config.vocab_size)
        if left_out:
            notes.append(f"{folder}: tokens that are no text, and that the model lacks, are left out: {left_out}")
        check_vocabulary(tokenizer, config.vocab_size, folder)
        check_template(tokenizer.chat_template, folder)
        scan = config.n_layers > SCANNED_ABOVE if layout.scan_layers is None else layout.scan_layers
        config, params = read(folder, shardings=hf_shardings(folder), precision=layout.precision, scan_layers=scan)
        remat = scan if layout.remat is None else layout.remat
        config = replace(config, remat=remat, apart_when_decoding=jax.default_backend() == "cpu")
    except (ValueError, OSError) as error:
        raise UserError(first_line(error)) from None
    return Pretrained(config, params, tokenizer, path_or_name, ends, tuple(notes))
