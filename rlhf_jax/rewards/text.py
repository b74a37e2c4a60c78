"""Prompts and completions as TRL's users have them: texts, or lists of messages. No array library is imported."""

from collections.abc import Mapping, Sequence
from typing import Any

Text = str | Sequence[Mapping[str, Any]]


def text_of(messages: Text) -> str:
    """A text, or the content of the last message: the parts of type "text", where it has parts."""
    if isinstance(messages, str):
        return messages
    content = messages[-1].get("content") if messages else ""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if part.get("type") == "text")
    return content if isinstance(content, str) else ""
