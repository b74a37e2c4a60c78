"""Messages: checked one by one, and read out of transcripts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.data.rejects import BadRow
from rlhf_jax.data.tools import called, read_calls, spoken_calls

Conversation = tuple[dict[str, Any], ...]
"""Messages {"role": …, "content": text}; an assistant's may have tool_calls and reasoning_content beside it."""

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "ai", "bot", "chatbot", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call", "tool_calls"), "assistant"),
    **dict.fromkeys(
        ("tool", "function", "ipython", "observation", "tool_response", "tool_result", "tool_output",
         "function_response", "function_result"),
        "tool",
    ),
}  # fmt: skip
"""Names of speakers, with those of ShareGPT, LLaMA-Factory, ms-swift, OpenAssistant and of older files."""
CALLS = ("function_call", "tool_call", "tool_calls")
"""Speakers whose words are calls of tools, as JSON."""
LEARNED, HIDDEN = ("weight", "train", "training", "trainable", "loss_mask", "loss", "learn"), ("masked",)
"""Flags of a message: whether it is learned, and whether it is not."""
UNCLEAR = ("mask", "loss_scale", "loss_weight", "train_detail", "training_detail")
"""Flags of a message that are none of the above: read either way, or of parts of a message."""
TURN = re.compile(r"\n\n(Human|Assistant):")
SURROGATE = re.compile("[\ud800-\udfff]")


def message(role: str, content: str) -> dict[str, Any]:
    """A message that holds only text."""
    return {"role": role, "content": content}


def type_name(value: Any) -> str:
    """The name of a value's type, for messages."""
    return "null" if value is None else type(value).__name__


def check_text(row: Mapping[str, Any], field: str) -> str:
    """The text of a field. Raises BadRow when it is not text, or text that no UTF-8 file can hold."""
    value = row[field]
    if not isinstance(value, str):
        raise BadRow(f"field {field!r} is {type_name(value)}, not text")
    check_characters(value, field)
    return value


def check_characters(value: Any, where: str) -> None:
    """Raises BadRow for half of a surrogate pair or a NUL in any text inside a value."""
    if isinstance(value, str):
        if SURROGATE.search(value):
            raise BadRow(f"{where}: a lone surrogate, which is no character")
        if "\0" in value:
            raise BadRow(f"{where}: a NUL character")
    elif isinstance(value, dict):
        for key, item in value.items():
            check_characters(key, where)
            check_characters(item, where)
    elif isinstance(value, list):
        for item in value:
            check_characters(item, where)


def messages(row: Mapping[str, Any], field: str) -> Conversation:
    """The messages of a field that holds text (one user's turn, or a transcript) or a list of messages.

    Raises BadRow when there are none, or one is not a message.
    """
    value = row[field]
    if not isinstance(value, list):
        text = check_text(row, field)
        begun = text.lstrip().startswith(("Human:", "Assistant:"))
        return turns(text, field) if begun else (message("user", text),)
    if not value:
        raise BadRow(f"field {field!r} has no messages")
    return tuple(_message(each, field, number) for number, each in enumerate(value, 1))


def turns(transcript: str, field: str) -> Conversation:
    """The turns of a Human/Assistant transcript; in a prompt, an Assistant without words at its end asks for it.

    Raises BadRow when there are none, when words come before the first, and when an answer has no Assistant.
    """
    before, *parts = TURN.split("\n\n" + transcript.lstrip())
    if "Assistant" not in parts[::2] and field in ("chosen", "rejected"):
        raise BadRow("no Assistant turn")
    if before.strip():
        raise BadRow(f"field {field!r} has words before the first turn of its transcript")
    roles = {"Human": "user", "Assistant": "assistant"}
    found = [message(roles[who], text.removeprefix(" ")) for who, text in zip(parts[::2], parts[1::2], strict=True)]
    if field == "prompt" and found[-1]["role"] == "assistant" and not found[-1]["content"].strip():
        found.pop()
    if not found:
        raise BadRow(f"field {field!r} has no messages")
    return tuple(found)


def common_prompt(sides: Sequence[Conversation], unfinished: str) -> tuple[Conversation, list[Conversation]]:
    """The prompt that whole conversations share, and the last answer of each. Raises BadRow when they do not."""
    for side in sides:
        if side[-1]["role"] != "assistant":
            raise BadRow(unfinished)
    if any(side[:-1] != sides[0][:-1] for side in sides):
        raise BadRow("prompts differ")
    return sides[0][:-1], [side[-1:] for side in sides]


def require_prompt(prompt: Conversation) -> Conversation:
    """The prompt, when it asks anything. Raises BadRow otherwise."""
    if not any(turn["content"].strip() for turn in prompt if turn["role"] != "system"):
        raise BadRow("empty prompt")
    if prompt[-1]["role"] == "assistant":
        raise BadRow("the prompt ends with the assistant")
    return prompt


def turn_starts(conversation: Conversation) -> list[int]:
    """Where the conversation can begin instead, from the oldest turn to the last: a user's words stand there.

    A turn is what the user says and everything up to when the user speaks again, calls of tools and their results
    too. Where a tool's result comes only after the user's next words, its call would be lost: nothing begins there.
    """
    roles = [turn["role"] for turn in conversation]
    said = [turn["role"] == "user" and bool(turn["content"].strip()) for turn in conversation]
    first = next((number for number, role in enumerate(roles) if role != "system"), 0)
    starts = []
    for start in range(first + 1, len(roles)):
        if roles[start] not in ("user", "system") or roles[start - 1] in ("user", "system"):
            continue
        end = next((n for n in range(start, len(roles)) if roles[n] not in ("user", "system")), len(roles))
        if any(said[start:end]) and roles[end : end + 1] != ["tool"]:
            starts.append(start)
    return starts


def without_oldest(conversation: Conversation, start: int) -> Conversation:
    """The conversation from message `start` on, behind all system messages that stand before."""
    return (*(turn for turn in conversation[:start] if turn["role"] == "system"), *conversation[start:])


def require_answer(turn: Mapping[str, Any], reason: str) -> None:
    """Raises BadRow unless a message says something or calls a tool."""
    if not turn["content"].strip() and not turn.get("tool_calls"):
        raise BadRow(reason)


def same_words(first: Conversation, second: Conversation) -> bool:
    """Whether two conversations are alike but for space around their texts."""
    bare = [tuple({**turn, "content": turn["content"].strip()} for turn in one) for one in (first, second)]
    return bare[0] == bare[1]


def flags(row: Mapping[str, Any], field: str) -> tuple[bool | None, ...]:
    """For each message of a field whether it is to be learned, as its flags say; None where it has none.

    Raises BadRow for a flag that is not yes or no, for two that contradict each other, and for unclear ones.
    """
    value = row[field]
    if not isinstance(value, list):
        return ()
    return tuple(_flag(each, f"message {number} of {field!r}") for number, each in enumerate(value, 1))


def unfollowed(value: Sequence[Any]) -> list[str]:
    """Flags that ask for learning what another than the assistant says: no answer, it is not learned."""
    found: dict[str, None] = {}
    for each in value:
        if isinstance(each, dict) and _role(each) not in (None, "assistant"):
            found |= dict.fromkeys(name for name in LEARNED if each.get(name) in (True, 1))
    return list(found)


def _role(value: Mapping[str, Any]) -> str | None:
    role = value.get("role", value.get("from"))
    return ROLES.get(_name(role)) if isinstance(role, str) else None


def _name(role: str) -> str:
    return re.sub("[ -]", "_", role.lower())


def _message(value: Any, field: str, number: int) -> dict[str, Any]:
    where = f"message {number} of {field!r}"
    if not isinstance(value, dict):
        raise BadRow(f"{where} is {type_name(value)}, not an object")
    value = {key: item for key, item in value.items() if item is not None and key not in (*LEARNED, *HIDDEN)}
    known = _role(value)
    role = value.pop("role", value.pop("from", None))
    if known is None:
        raise BadRow(f"{where} has no known role: {str(role)[:40]!r}")
    if not {"content", "value", "tool_calls", "function_call"} & value.keys():
        raise BadRow(f"{where} has no content")
    content = _joined(value.pop("content", value.pop("value", "")), where)
    calls = read_calls(value.pop("tool_calls", None), where)
    calls += [called(call) for call in read_calls(value.pop("function_call", None), where)]
    if _name(role) in CALLS and not calls:
        content, calls = "", spoken_calls(content, where)
    if calls and known != "assistant":
        raise BadRow(f"{where} calls tools, and is not the assistant's")
    found = {"role": known, "content": content, **value, **({"tool_calls": calls} if calls else {})}
    check_characters(found, where)
    return found


def _flag(value: Any, where: str) -> bool | None:
    if not isinstance(value, dict):
        return None
    found = {}
    for name in (*LEARNED, *HIDDEN, *UNCLEAR):
        flag = value.get(name)
        if flag is None:
            continue
        if name in UNCLEAR:
            raise BadRow(f'{where} has {name!r}, which cannot be used: say "weight": 0 or 1')
        if not isinstance(flag, bool | int | float) or flag not in (0, 1):
            raise BadRow(f"{where} has {name!r} {str(flag)[:20]!r}: a message is learned or it is not, 1 or 0")
        found[name] = bool(flag) != (name in HIDDEN)
    if len(set(found.values())) > 1:
        raise BadRow(f"{where} has flags that contradict each other: {', '.join(found)}")
    return next(iter(found.values()), None)


def _joined(content: Any, where: str) -> str:
    """Text, or the text of parts {"type": "text", "text": …}."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRow(f"{where} has a content that is {type_name(content)}, not text")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRow(f"{where} has a part that is not text")
    return "".join(part["text"] for part in content)
