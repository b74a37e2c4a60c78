"""The forms in which people keep rows, recognised by their columns, and the few forms they are brought into.

    demonstrations   messages | conversations | prompt, completion | instruction, output[, input] | text
    comparisons      prompt, chosen, rejected | instruction, chosen, rejected[, input] | chosen, rejected
                     prompt, responses, ranks | prompt, responses, scores
    prompts          prompt | question | problem | instruction[, input]
    unpaired         prompt, completion, label

A prompt, chosen or rejected is text, a list of messages {"role", "content"}, or a transcript of "\\n\\nHuman:" and
"\\n\\nAssistant:" turns as in HH-RLHF (Bai et al. 2022, https://arxiv.org/abs/2204.05862). Beside them may stand
tools, a system text and a history (`columns`), and beside chosen and rejected a margin, and the probability that
chosen is the better one: below ½ the two change places. Texts are kept as they are, space around them too.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from rlhf_jax.data import columns
from rlhf_jax.data.answers import EMPTY, calling, finite_number, read_answer, refuse_unlearned, row_tools
from rlhf_jax.data.context import in_context, opened, user_turn
from rlhf_jax.data.conversations import (
    Conversation,
    check_text,
    common_prompt,
    flags,
    messages,
    require_answer,
    require_prompt,
    turns,
    type_name,
    unfollowed,
)
from rlhf_jax.data.rejects import BadRow, Place
from rlhf_jax.data.tools import Tools
from rlhf_jax.errors import UserError

EQUAL = "equal answers"
ENDS_ON_USER = "ends without an answer"


class Demonstration(NamedTuple):
    """A conversation whose assistant turns in `response` are to be learned; its first and last are the assistant's."""

    prompt: Conversation
    response: Conversation
    place: Place
    tools: Tools = None
    learned: tuple[bool, ...] | None = None
    """Whether each message of `response` is to be learned, where not all of the assistant's are."""


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
    tools: Tools = None
    probability: float | None = None
    """That the first answer is the better one, at least ½; None where the row does not say it."""
    turned: bool = False
    """Whether the row has them the other way round."""


class Prompt(NamedTuple):
    """A prompt that is to be answered."""

    prompt: Conversation
    place: Place
    tools: Tools = None


class Unpaired(NamedTuple):
    """A prompt and an answer that was found good or not (KTO)."""

    prompt: Conversation
    response: Conversation
    good: bool
    place: Place
    tools: Tools = None


class Format(NamedTuple):
    """One of the forms: what it is for, the columns it needs and may have, and how a row is brought into shape."""

    kind: str
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    normalise: Callable[[Mapping[str, Any], Place], Any]


def _messages(row: Mapping[str, Any], place: Place) -> Demonstration:
    field = "messages" if "messages" in row else "conversations"
    found = messages(row, field)
    marks = flags(row, field) or (None,) * len(found)
    whole = in_context(row, found, field)
    marks = (None,) * (len(whole) - len(found)) + marks
    if whole[-1]["role"] != "assistant":
        raise BadRow(ENDS_ON_USER)
    first = next(number for number, turn in enumerate(whole) if turn["role"] == "assistant")
    for turn in whole[first:]:
        if turn["role"] == "assistant":
            require_answer(turn, EMPTY)
    return _demonstration(row, require_prompt(whole[:first]), whole[first:], marks[first:], place)


def _completion(row: Mapping[str, Any], place: Place) -> Demonstration:
    return _single(row, in_context(row, messages(row, "prompt"), "prompt"), "completion", place)


def _alpaca(row: Mapping[str, Any], place: Place) -> Demonstration:
    return _single(row, in_context(row, user_turn(row), "instruction"), "output", place)


def _single(row: Mapping[str, Any], prompt: Conversation, field: str, place: Place) -> Demonstration:
    """The answers of a history are learned, too, as LLaMA-Factory does."""
    answer = read_answer(row, field, require_prompt(prompt))
    marks = flags(row, field)[-len(answer) :] or (None,) * len(answer)
    first = opened(row, prompt)
    marks = (None,) * (len(prompt) - first) + marks
    return _demonstration(row, prompt[:first], (*prompt[first:], *answer), marks, place)


def _demonstration(
    row: Mapping[str, Any],
    prompt: Conversation,
    response: Conversation,
    marks: tuple[bool | None, ...],
    place: Place,
) -> Demonstration:
    answers = [turn["role"] == "assistant" for turn in response]
    learned = tuple(answer and mark is not False for answer, mark in zip(answers, marks, strict=True))
    if not any(learned):
        raise BadRow("nothing is to be learned: every answer is marked by 0")
    tools = row_tools(row)
    some = None if learned == tuple(answers) else learned
    return Demonstration(calling(prompt, tools), calling(response, tools), place, tools, some)


def _text(row: Mapping[str, Any], place: Place) -> Text:
    text = check_text(row, "text")
    if not text.strip():
        raise BadRow("empty text")
    return Text(text, place)


def _preference(row: Mapping[str, Any], place: Place) -> Comparison:
    return _pair(row, require_prompt(in_context(row, messages(row, "prompt"), "prompt")), place)


def _instruction_preference(row: Mapping[str, Any], place: Place) -> Comparison:
    return _pair(row, require_prompt(in_context(row, user_turn(row), "instruction")), place)


def _transcripts(row: Mapping[str, Any], place: Place) -> Comparison:
    if isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        if row["chosen"] == row["rejected"]:
            raise BadRow(EQUAL)
        sides = [turns(check_text(row, field), field) for field in ("chosen", "rejected")]
    else:
        sides = [messages(row, field) for field in ("chosen", "rejected")]
        refuse_unlearned(row, "chosen", "rejected")
    prompt, answers = common_prompt(sides, ENDS_ON_USER)
    return _compare(require_prompt(in_context(row, prompt, "chosen")), answers, (0, 1), row, place)


def _ranked(row: Mapping[str, Any], place: Place) -> Comparison:
    prompt = require_prompt(in_context(row, messages(row, "prompt"), "prompt"))
    field = "ranks" if "ranks" in row else "scores"
    responses, numbers = row["responses"], row[field]
    if not isinstance(responses, list) or not isinstance(numbers, list) or len(responses) != len(numbers):
        raise BadRow(f"'responses' and {field!r} are not lists of equal length")
    if len(responses) < 2:
        raise BadRow("fewer than two answers")
    numbers = [finite_number(n, field) for n in numbers]
    order = sorted(set(numbers), reverse=field == "scores")
    if len(order) < 2:
        raise BadRow("every answer has the same rank")
    answers = [read_answer({**row, "response": response}, "response", prompt) for response in responses]
    for response in responses:
        refuse_unlearned({"response": response}, "response")
    return _compare(prompt, answers, tuple(order.index(n) for n in numbers), row, place)


def _prompt(row: Mapping[str, Any], place: Place) -> Prompt:
    tools = row_tools(row)
    prompt = require_prompt(in_context(row, messages(row, "prompt"), "prompt"))
    return Prompt(calling(prompt, tools), place, tools)


def _asked(field: str, row: Mapping[str, Any], place: Place) -> Prompt:
    """A prompt whose column has another name, as sets of problems have it."""
    return _prompt({**row, "prompt": row[field]}, place)


def _instruction(row: Mapping[str, Any], place: Place) -> Prompt:
    tools = row_tools(row)
    return Prompt(calling(require_prompt(in_context(row, user_turn(row), "instruction")), tools), place, tools)


def _unpaired(row: Mapping[str, Any], place: Place) -> Unpaired:
    if not isinstance(row["label"], bool):
        raise BadRow(f"field 'label' is {type_name(row['label'])}, not true or false")
    prompt = require_prompt(in_context(row, messages(row, "prompt"), "prompt"))
    refuse_unlearned(row, "completion")
    answer, tools = read_answer(row, "completion", prompt), row_tools(row)
    return Unpaired(calling(prompt, tools), calling(answer, tools), row["label"], place, tools)


BETWEEN = columns.BETWEEN
FORMATS = {
    "messages": Format("demonstrations", ("messages",), columns.COMMON, _messages),
    "sharegpt": Format("demonstrations", ("conversations",), columns.COMMON, _messages),
    "prompt_completion": Format("demonstrations", ("prompt", "completion"), columns.COMMON, _completion),
    "alpaca": Format("demonstrations", ("instruction", "output"), ("input", *columns.COMMON), _alpaca),
    "text": Format("demonstrations", ("text",), (), _text),
    "preference": Format("comparisons", ("prompt", "chosen", "rejected"), (*BETWEEN, *columns.COMMON), _preference),
    "instruction_preference": Format(
        "comparisons",
        ("instruction", "chosen", "rejected"),
        ("input", *BETWEEN, *columns.COMMON),
        _instruction_preference,
    ),
    "transcripts": Format("comparisons", ("chosen", "rejected"), (*BETWEEN, *columns.COMMON), _transcripts),
    "ranking": Format("comparisons", ("prompt", "responses", "ranks"), columns.COMMON, _ranked),
    "scored": Format("comparisons", ("prompt", "responses", "scores"), columns.COMMON, _ranked),
    "prompts": Format("prompts", ("prompt",), columns.COMMON, _prompt),
    "questions": Format("prompts", ("question",), columns.COMMON, partial(_asked, "question")),
    "problems": Format("prompts", ("problem",), columns.COMMON, partial(_asked, "problem")),
    "instructions": Format("prompts", ("instruction",), ("input", *columns.COMMON), _instruction),
    "unpaired": Format("unpaired", ("prompt", "completion", "label"), columns.COMMON, _unpaired),
}
REWARDED = ("answer", "tests", "instruction_id_list", "kwargs")
"""Columns beside a prompt that the checkers here read."""
COLUMNS = {column for format in FORMATS.values() for column in (*format.columns, *format.optional)} | {*REWARDED}


def recognise(columns: set[str], kind: str) -> str | None:
    """The name of the one format of that kind which the columns fit, None when they fit none.

    Formats whose columns are all contained in those of another that fits too do not count: rows with a label are
    not plain completions. A prompt is a prompt whatever stands beside it: those columns are for rewards.
    Raises UserError when two are left: which one is meant is for the user to say.
    """
    fitting = {name for name, format in FORMATS.items() if columns.issuperset(format.columns)}
    if kind == "prompts":
        fitting = {name for name in fitting if FORMATS[name].kind == kind}
        if "prompts" in fitting:
            return "prompts"
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
    columns.refuse(row, FORMATS[format].kind, (*FORMATS[format].columns, *FORMATS[format].optional))
    try:
        return FORMATS[format].normalise(row, place)
    except RecursionError:
        raise BadRow("nested too deeply") from None


def not_read(format: str, row: Mapping[str, Any]) -> str:
    """A note that names the columns of a row that nothing reads, and flags that nothing follows; empty without any."""
    read = (*FORMATS[format].columns, *FORMATS[format].optional)
    unheard = [
        f"{field}[].{flag} of others than the assistant"
        for field in FORMATS[format].columns
        if isinstance(row.get(field), list)
        for flag in unfollowed(row[field])
    ]
    return columns.not_read(row, FORMATS[format].kind, read, unheard)


def _pair(row: Mapping[str, Any], prompt: Conversation, place: Place) -> Comparison:
    refuse_unlearned(row, "chosen", "rejected")
    answers = [read_answer(row, field, prompt) for field in ("chosen", "rejected")]
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
        a == b and i != j
        for k, (a, i) in enumerate(zip(answers, ranks, strict=True))
        for b, j in list(zip(answers, ranks, strict=True))[:k]
    ):
        raise BadRow(EQUAL)
    margin = 0.0 if row.get("margin") is None else finite_number(row["margin"], "margin")
    probability = None if row.get("probability") is None else _probability(row["probability"], margin)
    turned = probability is not None and probability < 0.5
    if probability is not None and turned:
        answers, probability = answers[::-1], 1.0 - probability
    tools = row_tools(row)
    written = tuple(calling(answer, tools) for answer in answers)
    return Comparison(calling(prompt, tools), written, ranks, place, margin, tools, probability, turned)


def _probability(value: Any, margin: float) -> float:
    probability = finite_number(value, "probability")
    if not 0 <= probability <= 1:
        raise BadRow("field 'probability' holds a number that is not between 0 and 1")
    if probability < 0.5 and margin:
        raise BadRow("field 'probability' says that 'rejected' is the better one, and a margin is between the two")
    return probability
