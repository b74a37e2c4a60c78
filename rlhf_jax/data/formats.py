"""The forms in which people keep rows, recognised by their columns, and the few forms they are brought into.

    demonstrations   messages | conversations | prompt, completion | instruction, output[, input] | text
    comparisons      prompt, chosen, rejected | instruction, chosen, rejected[, input] | chosen, rejected
                     prompt, responses, ranks | prompt, responses, scores
    prompts          prompt
    unpaired         prompt, completion, label

A prompt, chosen or rejected is text, a list of messages {"role", "content"}, or a transcript of "\\n\\nHuman:" and
"\\n\\nAssistant:" turns as in HH-RLHF (Bai et al. 2022, https://arxiv.org/abs/2204.05862).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rlhf_jax.data.conversations import (
    Conversation,
    check_text,
    common_prompt,
    message,
    messages,
    require_answer,
    require_prompt,
    said,
    turns,
    type_name,
)
from rlhf_jax.data.rejects import BadRow, Place
from rlhf_jax.errors import UserError

EMPTY, EQUAL = "empty answer", "equal answers"
ENDS_ON_USER = "ends without an answer"


class Demonstration(NamedTuple):
    """A conversation whose assistant turns in `response` are to be learned; its first and last are the assistant's."""

    prompt: Conversation
    response: Conversation
    place: Place
    tools: tuple[dict[str, Any], ...] | None = None


class Text(NamedTuple):
    """Plain text, every token of which is learned (ptx)."""

    text: str
    place: Place


class Comparison(NamedTuple):
    """A prompt and two or more ranked answers, one assistant message each; rank 0 is best."""

    prompt: Conversation
    responses: tuple[Conversation, ...]
    ranks: tuple[int, ...]
    place: Place
    margin: float = 0.0
    tools: tuple[dict[str, Any], ...] | None = None


class Prompt(NamedTuple):
    """A prompt that is to be answered."""

    prompt: Conversation
    place: Place
    tools: tuple[dict[str, Any], ...] | None = None


class Unpaired(NamedTuple):
    """A prompt and an answer that was found good or not (KTO)."""

    prompt: Conversation
    response: Conversation
    good: bool
    place: Place
    tools: tuple[dict[str, Any], ...] | None = None


class Format(NamedTuple):
    """One of the forms: what it is for, the columns it needs and may have, and how a row is brought into shape."""

    kind: str
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    normalise: Callable[[Mapping[str, Any], Place], Any]


def _messages(row: Mapping[str, Any], place: Place) -> Demonstration:
    field = "messages" if "messages" in row else "conversations"
    whole = messages(row, field)
    if whole[-1]["role"] != "assistant":
        raise BadRow(ENDS_ON_USER)
    first = next(number for number, turn in enumerate(whole) if turn["role"] == "assistant")
    for turn in whole[first:]:
        if turn["role"] == "assistant":
            require_answer(turn, EMPTY)
    return Demonstration(require_prompt(whole[:first]), whole[first:], place, _tools(row))


def _completion(row: Mapping[str, Any], place: Place) -> Demonstration:
    prompt = require_prompt(messages(row, "prompt"))
    return Demonstration(prompt, _answer(row, "completion", prompt), place, _tools(row))


def _alpaca(row: Mapping[str, Any], place: Place) -> Demonstration:
    prompt = require_prompt(_instruction(row))
    return Demonstration(prompt, _answer(row, "output", prompt), place)


def _text(row: Mapping[str, Any], place: Place) -> Text:
    text = check_text(row, "text")
    if not text.strip():
        raise BadRow("empty text")
    return Text(text, place)


def _preference(row: Mapping[str, Any], place: Place) -> Comparison:
    return _pair(row, require_prompt(messages(row, "prompt")), place)


def _instruction_preference(row: Mapping[str, Any], place: Place) -> Comparison:
    return _pair(row, require_prompt(_instruction(row)), place)


def _transcripts(row: Mapping[str, Any], place: Place) -> Comparison:
    if isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        if row["chosen"] == row["rejected"]:
            raise BadRow(EQUAL)
        sides = [turns(check_text(row, field), field) for field in ("chosen", "rejected")]
    else:
        sides = [messages(row, field) for field in ("chosen", "rejected")]
    prompt, answers = common_prompt(sides, ENDS_ON_USER)
    return _compare(require_prompt(prompt), answers, (0, 1), row, place)


def _ranked(row: Mapping[str, Any], place: Place) -> Comparison:
    prompt = require_prompt(messages(row, "prompt"))
    field = "ranks" if "ranks" in row else "scores"
    responses, numbers = row["responses"], row[field]
    if not isinstance(responses, list) or not isinstance(numbers, list) or len(responses) != len(numbers):
        raise BadRow(f"'responses' and {field!r} are not lists of equal length")
    if len(responses) < 2:
        raise BadRow("fewer than two answers")
    numbers = [_number(n, field) for n in numbers]
    order = sorted(set(numbers), reverse=field == "scores")
    if len(order) < 2:
        raise BadRow("every answer has the same rank")
    answers = [_answer({"response": response}, "response", prompt) for response in responses]
    return _compare(prompt, answers, tuple(order.index(n) for n in numbers), row, place)


def _prompt(row: Mapping[str, Any], place: Place) -> Prompt:
    return Prompt(require_prompt(messages(row, "prompt")), place, _tools(row))


def _unpaired(row: Mapping[str, Any], place: Place) -> Unpaired:
    if not isinstance(row["label"], bool):
        raise BadRow(f"field 'label' is {type_name(row['label'])}, not true or false")
    prompt = require_prompt(messages(row, "prompt"))
    return Unpaired(prompt, _answer(row, "completion", prompt), row["label"], place, _tools(row))


FORMATS = {
    "messages": Format("demonstrations", ("messages",), ("tools",), _messages),
    "sharegpt": Format("demonstrations", ("conversations",), ("tools",), _messages),
    "prompt_completion": Format("demonstrations", ("prompt", "completion"), ("tools",), _completion),
    "alpaca": Format("demonstrations", ("instruction", "output"), ("input",), _alpaca),
    "text": Format("demonstrations", ("text",), (), _text),
    "preference": Format("comparisons", ("prompt", "chosen", "rejected"), ("margin", "tools"), _preference),
    "instruction_preference": Format(
        "comparisons", ("instruction", "chosen", "rejected"), ("input", "margin"), _instruction_preference
    ),
    "transcripts": Format("comparisons", ("chosen", "rejected"), ("margin", "tools"), _transcripts),
    "ranking": Format("comparisons", ("prompt", "responses", "ranks"), ("tools",), _ranked),
    "scored": Format("comparisons", ("prompt", "responses", "scores"), ("tools",), _ranked),
    "prompts": Format("prompts", ("prompt",), ("tools",), _prompt),
    "unpaired": Format("unpaired", ("prompt", "completion", "label"), ("tools",), _unpaired),
}
COLUMNS = {column for format in FORMATS.values() for column in (*format.columns, *format.optional)}


def recognise(columns: set[str], kind: str) -> str | None:
    """The name of the one format of that kind which the columns fit, None when they fit none.

    Formats whose columns are all contained in those of another that fits too do not count: rows with a label are
    not plain completions. A prompt is a prompt whatever stands beside it: those columns are for rewards.
    Raises UserError when two are left: which one is meant is for the user to say.
    """
    fitting = {name for name, format in FORMATS.items() if columns.issuperset(format.columns)}
    if kind == "prompts":
        fitting = {name for name in fitting if FORMATS[name].kind == kind}
    largest = {
        name for name in fitting
        if not any(set(FORMATS[name].columns) < set(FORMATS[other].columns) for other in fitting)
    }  # fmt: skip
    wanted = sorted(name for name in largest if FORMATS[name].kind == kind)
    if len(wanted) > 1:
        raise UserError(f"columns {', '.join(sorted(columns))} could be {' or '.join(wanted)}: say which")
    return wanted[0] if wanted else None


def known(kind: str) -> str:
    """The formats of a kind, for messages."""
    return "; ".join(f"{name}: {', '.join(f.columns)}" for name, f in FORMATS.items() if f.kind == kind)


def normalise(format: str, row: Mapping[str, Any], place: Place) -> Any:
    """A row in one of the forms above. Raises BadRow with the reason when it cannot be."""
    for column in FORMATS[format].columns:
        if column not in row:
            raise BadRow(f"field {column!r} is missing")
    try:
        return FORMATS[format].normalise(row, place)
    except RecursionError:
        raise BadRow("nested too deeply") from None


def _instruction(row: Mapping[str, Any]) -> Conversation:
    parts = [check_text(row, "instruction").strip()]
    if row.get("input") is not None:
        parts.append(check_text(row, "input").strip())
    return ({"role": "user", "content": "\n\n".join(part for part in parts if part)},)


def _pair(row: Mapping[str, Any], prompt: Conversation, place: Place) -> Comparison:
    answers = [_answer(row, field, prompt) for field in ("chosen", "rejected")]
    return _compare(prompt, answers, (0, 1), row, place)


def _compare(
    prompt: Conversation,
    answers: list[Conversation],
    ranks: tuple[int, ...],
    row: Mapping[str, Any],
    place: Place,
) -> Comparison:
    for answer in answers:
        if len(answer) != 1:
            raise BadRow("an answer of more than one message")
        require_answer(answer[0], EMPTY)
    if any(
        said(a) == said(b) and i != j
        for k, (a, i) in enumerate(zip(answers, ranks, strict=True))
        for b, j in list(zip(answers, ranks, strict=True))[:k]
    ):
        raise BadRow(EQUAL)
    margin = 0.0 if row.get("margin") is None else _number(row["margin"], "margin")
    return Comparison(prompt, tuple(answers), ranks, place, margin, _tools(row))


def _answer(row: Mapping[str, Any], field: str, prompt: Conversation) -> Conversation:
    """Text, a message list, or a message list that repeats the prompt first."""
    value = row[field]
    if isinstance(value, list):
        answer = messages(row, field)
        if len(answer) > len(prompt) and said(answer[: len(prompt)]) == said(prompt):
            answer = answer[len(prompt) :]
        if any(turn["role"] != "assistant" for turn in answer[:1] + answer[-1:]):
            raise BadRow(f"field {field!r} does not begin and end with the assistant")
    else:
        answer = (message("assistant", check_text(row, field).strip()),)
    require_answer(answer[-1], EMPTY)
    return answer


def _tools(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...] | None:
    tools = row.get("tools")
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("field 'tools' is not a list of objects")
    return tuple(tools) or None


def _number(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"field {field!r} holds {type_name(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadRow(f"field {field!r} holds a number that is not finite")
    return number
