"""The type of a tokenizer, for signatures: transformers takes most of a second to import, and `--help` needs none."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    PreTrainedTokenizerBase = Any

__all__ = ["PreTrainedTokenizerBase", "Steady", "backend", "specials_of"]


class Steady:
    """A tokenizer for reading many rows, in which it does not change: what it says of itself is asked for once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._inner = tokenizer.inner() if isinstance(tokenizer, Steady) else tokenizer

    def inner(self) -> PreTrainedTokenizerBase:
        """The tokenizer itself."""
        return self._inner

    @cached_property
    def specials(self) -> tuple[tuple[str, str], ...]:
        """`specials_of` the tokenizer."""
        return specials_of(self._inner)

    def __getattr__(self, name: str) -> Any:
        """An attribute or a method of the tokenizer, as it was when it was first asked for."""
        self.__dict__[name] = found = getattr(self._inner, name)
        return found

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Calls the tokenizer."""
        return self._inner(*args, **options)


def specials_of(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, str], ...]:
    """The names and texts of the special tokens, such as ("eos_token", "</s>"), in an order of their own."""
    if isinstance(tokenizer, Steady):
        return tokenizer.specials
    return tuple(sorted((name, str(value)) for name, value in tokenizer.special_tokens_map.items()))


def backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tokenizer of the library tokenizers that a fast one calls, set as it calls it for text as it stands.

    None where there is none, or where the class has a way of its own to call it.
    """
    from transformers import PreTrainedTokenizerFast

    inner = tokenizer.inner() if isinstance(tokenizer, Steady) else tokenizer
    if not isinstance(inner, PreTrainedTokenizerFast):
        return None
    own = any(getattr(type(inner), name) is not getattr(PreTrainedTokenizerFast, name) for name in CALLED)
    if own or inner.split_special_tokens:
        return None
    found = inner.backend_tokenizer
    if found.encode_special_tokens:
        found.encode_special_tokens = False
    if found.truncation is not None:
        found.no_truncation()
    if found.padding is not None:
        found.no_padding()
    return found


CALLED = ("__call__", "_encode_plus")
"""The methods through which a text goes."""
