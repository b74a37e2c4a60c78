"""The type of a tokenizer, for signatures: transformers takes most of a second to import, and `--help` needs none."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    PreTrainedTokenizerBase = Any

__all__ = ["PreTrainedTokenizerBase"]
