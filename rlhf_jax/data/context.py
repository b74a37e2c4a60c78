"""Columns that stand in front of a prompt: a system text, and the turns before it."""

from collections.abc import Mapping
from typing import Any

from rlhf_jax.data import columns
from rlhf_jax.data.conversations import Conversation, check_text, message, messages, require_answer
from rlhf_jax.data.rejects import BadRow


def in_context(row: Mapping[str, Any], conversation: Conversation, field: str) -> Conversation:
    """The conversation of a field behind the row's history and its system text.

    Raises BadRow when the conversation has a system text of its own that says something else, or turns of its own and
    a history beside it.
    """
    history = _history(row)
    if history:
        if any(turn["role"] == "assistant" for turn in conversation):
            raise BadRow(f"earlier turns in column 'history', and others in {field!r}")
        at = next((n for n, turn in enumerate(conversation) if turn["role"] != "system"), len(conversation))
        conversation = (*conversation[:at], *history, *conversation[at:])
    for name in columns.SYSTEM:
        if columns.given(row, name) is None:
            continue
        system = message("system", check_text(row, name))
        if not conversation or conversation[0]["role"] != "system":
            conversation = (system, *conversation)
        elif conversation[0]["content"].strip() != system["content"].strip():
            raise BadRow(f"a system text in column {name!r}, and another before it")
    return conversation


def opened(row: Mapping[str, Any], prompt: Conversation) -> int:
    """The number of messages of a prompt before the first answer that its history holds; all of them without one."""
    if columns.given(row, columns.HISTORY) is None:
        return len(prompt)
    return next((number for number, turn in enumerate(prompt) if turn["role"] == "assistant"), len(prompt))


def user_turn(row: Mapping[str, Any]) -> Conversation:
    """The user's words from an instruction and its input: below each other, each as it is."""
    parts = [check_text(row, "instruction")]
    if row.get("input") is not None:
        parts.append(check_text(row, "input"))
    return (message("user", "\n\n".join(part for part in parts if part.strip())),)


def _history(row: Mapping[str, Any]) -> Conversation:
    """Pairs of texts, the user's and the answer to it, or messages."""
    history = columns.given(row, columns.HISTORY)
    if history is None:
        return ()
    if not isinstance(history, list):
        raise BadRow("column 'history' is not a list of pairs, or of messages")
    if all(isinstance(each, dict) for each in history):
        found = messages(row, columns.HISTORY)
    else:
        pairs = [each for each in history if isinstance(each, list) and len(each) == 2]
        if len(pairs) != len(history):
            raise BadRow("column 'history' is not a list of pairs, or of messages")
        turns = [(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
        found = tuple(message(role, check_text({"history": text}, "history")) for role, text in turns)
    for turn in found:
        if turn["role"] == "assistant":
            require_answer(turn, "empty answer in column 'history'")
    if found[-1]["role"] == "user":
        raise BadRow("column 'history' ends without an answer")
    return found
