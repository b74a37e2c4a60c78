"""The tokenizer of a checkpoint: read from its folder, never by code that lies there, and made ready for others."""

import copy
import json
import re
from pathlib import Path
from typing import Any, Literal

from rlhf_jax.errors import first_line
from rlhf_jax.models.files import read_json

VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "spiece.model", "sentencepiece.bpe.model",
    "vocab.txt",
)  # fmt: skip
"""The files that a tokenizer may be made from; without any of them there is none."""
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def read_tokenizer(folder: Path) -> Any:
    """Reads the tokenizer of a model's folder with transformers' own classes.

    Raises FileNotFoundError or ValueError in one line that names the folder, the file and what to do: for a tokenizer
    that is missing, broken, of a newer version, or of a class whose Python lies in the folder; for one without an EOS
    token; and for named chat templates without a default one.
    """
    there = [name for name in VOCABULARIES if (folder / name).exists()]
    if not there:
        raise FileNotFoundError(
            f"{folder} has no tokenizer (no {VOCABULARIES[0]}): save the model's own tokenizer there, by"
            " tokenizer.save_pretrained"
        )
    settings = _read_settings(folder, there)
    if code := has_code_of_its_own(settings, "AutoTokenizer"):
        raise ValueError(
            f"{folder / SETTINGS[0]}: the tokenizer is code of its own (auto_map {code}), which is never run; save"
            " the tokenizer as a tokenizer.json, and take auto_map out"
        )
    tokenizer = _from_pretrained(folder, there[0])
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{folder}: the tokenizer has no EOS token, and every answer must end in one: name one as eos_token in"
            f" {SETTINGS[0]}"
        )
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        raise ValueError(
            f"{folder}: its chat templates are {', '.join(sorted(templates))}, and none is the default: name one of"
            f' them "default" in {SETTINGS[0]}, or give it as chat_template.jinja'
        )
    return tokenizer


def has_code_of_its_own(settings: dict[str, Any], kind: str) -> str | None:
    """The class of Python in the folder that `auto_map` names for an Auto… class of transformers; None for none."""
    named = settings.get("auto_map")
    if isinstance(named, dict):
        named = named.get(kind)
    names = [name for name in (named if isinstance(named, list) else [named]) if name]
    return str(names[0]) if names else None


MEDIA = re.compile("image|audio|video|vision", re.I)
"""Names of special tokens that stand for what is no text."""


def without_media(tokenizer: Any, vocab_size: int) -> tuple[Any, list[str]]:
    """The tokenizer without the special tokens for images and the like that the model's table ends before; and those.

    A text model that was made from one of several media (Gemma 3 1B) has its tokenizer; such a token is text then.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = [name for name, number in tokenizer.get_vocab().items() if number >= vocab_size]
    if not names or not all(name in special and MEDIA.search(name) for name in names):
        return tokenizer, []  # the others are an error, which names them
    from tokenizers import Tokenizer

    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] not in names]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(saved))
    return tokenizer, sorted(names)


def check_vocabulary(tokenizer: Any, vocab_size: int, where: str | Path) -> None:
    """Raises ValueError, with both sizes, for a tokenizer that gives ids which a model of `vocab_size` does not have.

    JAX reads the last row of the table for each of those.
    """
    vocabulary = tokenizer.get_vocab()
    outside = sorted((number, token) for token, number in vocabulary.items() if not 0 <= number < vocab_size)
    if outside:
        first, token = outside[0]
        count = max(vocabulary.values()) + 1
        raise ValueError(
            f"{where}: the tokenizer has {count} tokens and the model has {vocab_size}: {token!r} is {first}, which"
            " the model's table does not have; take the tokenizer that the model was saved with, or give the model's"
            " embedding as many rows"
        )


def with_padding(tokenizer: Any, vocab_size: int, *, side: Literal["left", "right"], may_grow: bool = False) -> Any:
    """A copy that pads on that side, as its users will, with a token that ends no text where there is one.

    A classifier of transformers takes its reward at the last token that is not padding: where padding is the EOS, it
    looks before the end. Taken is the tokenizer's own padding token; or else a token that stands in no text by its
    name; that for unknown words; a new one, where the model's table has a row to spare. Or else with `may_grow` the
    BOS, or a new one for which the table has to grow, and without it the EOS.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = side  # the second is what is saved
    eos = tokenizer.eos_token
    if tokenizer.pad_token not in (None, eos):
        return tokenizer
    spare = [token for token in (_unused(tokenizer), tokenizer.unk_token) if token not in (None, eos)]
    if may_grow and tokenizer.bos_token not in (None, eos):
        last = tokenizer.bos_token
    else:
        last = PAD if may_grow else eos
    new = [PAD] if len(tokenizer) < vocab_size else []
    tokenizer.add_special_tokens({"pad_token": [*spare, *new, last][0]})
    return tokenizer


PAD = "<pad>"
NO_WORDS = (r"pad", r"reserved|unused|dummy")
"""Names of special tokens that stand in no text, the better ones first."""


def _unused(tokenizer: Any) -> str | None:
    names = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    names = [name for name in names if not MEDIA.search(name)]
    return next((name for words in NO_WORDS for name in names if re.search(words, name, re.I)), None)


def _read_settings(folder: Path, there: list[str]) -> dict[str, Any]:
    """tokenizer_config.json, {} if there is none. Raises ValueError for a file of the tokenizer's that is no JSON."""
    try:
        for name in (*there, *SETTINGS):
            if name.endswith(".json") and (folder / name).exists():
                read_json(folder / name)
        return read_json(folder / SETTINGS[0]) if (folder / SETTINGS[0]).exists() else {}
    except (ValueError, OSError) as error:
        raise ValueError(f"{first_line(error)}: save the tokenizer anew, by tokenizer.save_pretrained") from None


def _from_pretrained(folder: Path, file: str) -> Any:
    from tokenizers import __version__ as version
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions, and transformers all kinds
        raise ValueError(
            f"{folder / file}: transformers cannot read the tokenizer ({first_line(error)}); if a newer version has"
            f" written it, upgrade tokenizers (here {version}) and transformers, else save it anew by"
            " tokenizer.save_pretrained"
        ) from None
