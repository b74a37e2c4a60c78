"""Answers, and what else a row says of them: text or messages, marks, numbers, the calls of its tools."""

import math
from collections.abc import Mapping
from typing import Any

from rlhf_jax.data.conversations import (
    Conversation,
    check_characters,
    check_text,
    flags,
    message,
    messages,
    require_answer,
    same_words,
    type_name,
)
from rlhf_jax.data.rejects import BadRow
from rlhf_jax.data.tools import Tools, read_tools, without_unknown

EMPTY = "empty answer"


def read_answer(row: Mapping[str, Any], field: str, prompt: Conversation) -> Conversation:
    """Text, a message list, or a message list that repeats the prompt first, with or without its context.

    Raises BadRow for a list that does not begin and end with the assistant, and for an empty answer.
    """
    value = row[field]
    if isinstance(value, list):
        answer = messages(row, field)
        lengths = range(min(len(prompt), len(answer) - 1), 0, -1)
        again = next((n for n in lengths if same_words(answer[:n], prompt[-n:])), 0)
        answer = answer[again:]
        if any(turn["role"] != "assistant" for turn in answer[:1] + answer[-1:]):
            raise BadRow(f"field {field!r} does not begin and end with the assistant")
    else:
        answer = (message("assistant", check_text(row, field)),)
    require_answer(answer[-1], EMPTY)
    return answer


def refuse_unlearned(row: Mapping[str, Any], *fields: str) -> None:
    """Raises BadRow where the answer of a field, its last message, is marked as not to be learned."""
    for field in fields:
        if flags(row, field)[-1:] == (False,):
            raise BadRow(f"the answer in {field!r} is marked by 0, as not to be learned")


def row_tools(row: Mapping[str, Any]) -> Tools:
    """The tools of a row. Raises BadRow for what is no list of objects, and for characters that are none."""
    tools = read_tools(row)
    check_characters(list(tools or ()), "field 'tools'")
    return tools


def calling(conversation: Conversation, tools: Tools) -> Conversation:
    """The conversation with the calls of its tools; what Arrow put into them is left out."""
    return tuple(
        {**turn, "tool_calls": without_unknown(turn["tool_calls"], tools)} if "tool_calls" in turn else turn
        for turn in conversation
    )


def finite_number(value: Any, field: str) -> float:
    """The number in a field. Raises BadRow for what is none, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"field {field!r} holds {type_name(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadRow(f"field {field!r} holds a number that is not finite")
    return number
