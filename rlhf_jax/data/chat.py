"""Conversations as text: by the tokenizer's chat template, and which characters of it the model is to write.

Where an answer stands is read from marks (`templates`). A template that loops over numbers, or makes messages of its
own, leaves none: there the answer is found by what changes when it says something else.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

from rlhf_jax.data.conversations import message
from rlhf_jax.data.rejects import BadRow
from rlhf_jax.data.templates import REASONING, Span, Tools, keeps_marks, run_marked, run_template
from rlhf_jax.data.tokenizer import PreTrainedTokenizerBase

PLAIN_NAMES = {"user": "Human", "assistant": "Assistant", "system": "System"}
Conversation = Sequence[dict[str, Any]]
Specials = tuple[tuple[str, str], ...]


class Spans(NamedTuple):
    """The text of a conversation, and the characters that the model is to write, by the number of the message."""

    text: str
    spans: dict[int, Span]
    endless: tuple[int, ...] = ()
    """Answers that no sign ends: what follows them says so, and is not learned."""
    shown: bool = False
    """Whether every message is of words alone and stands as it is where the template writes that message."""


def render(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Tools = None,
    add_generation_prompt: bool = False,
) -> str:
    """The conversation by the tokenizer's chat template; without one as "\\n\\nHuman: …\\n\\nAssistant: …".

    Raises BadRow when the template refuses the conversation.
    """
    if not tokenizer.chat_template:
        return _plain(conversation)[0] + ("\n\nAssistant:" if add_generation_prompt else "")
    tools = list(tools) if tools else None
    template, special = tokenizer.get_chat_template(tools=tools), tokenizer.special_tokens_map
    return run_template(template, conversation, special, tools=tools, add_generation_prompt=add_generation_prompt)


def answer_spans(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, *, tools: Tools = None, last: bool = False
) -> Spans:
    """The text, and the characters of it that the model is to write; `last`: only those of its last answer are needed.

    A span begins where the prompt of that turn ends as the model meets it when it generates, and ends with the
    template's end of turn. A template without one leaves the end to the sign of the next turn, which then is learned.
    Raises BadRow when an answer does not appear.
    """
    answers = [number for number, turn in enumerate(conversation) if turn["role"] == "assistant"]
    if not tokenizer.chat_template:
        text, turns = _plain(conversation)
        name = len(f"\n\n{PLAIN_NAMES['assistant']}:")
        plain = {number: (turns[number][0] + name, turns[number][1]) for number in answers}
        return Spans(text, plain, tuple(number for number in answers if number < len(conversation) - 1))
    tools = list(tools) if tools else None
    template, special = tokenizer.get_chat_template(tools=tools), tokenizer.special_tokens_map
    text, places = _written(template, conversation, special, tools)
    if last and answers and places[answers[-1]] is not None:
        for number in answers[:-1]:
            _check_calls(text, places[number] or (0, 0), conversation, number)
        answers = answers[-1:]
    spans = _spans(text, places, template, conversation, special, tools, answers)
    stop, endless = stop_sign(template, _hashable(special)), []
    signs = tuple(name for name in tokenizer.all_special_tokens if name)
    for number, (start, end) in spans.items():
        if number == len(conversation) - 1 or text[start:end].endswith((*signs, *([stop] if stop else []))):
            continue
        found = _following(signs).match(text, end) if signs else None
        if found is None:
            endless.append(number)
        else:
            spans[number] = start, found.end()
    stand = (
        span is not None and is_plain(turn) and _long_words(turn) and turn["content"].strip() in text[slice(*span)]
        for turn, span in zip(conversation, places, strict=True)
    )  # fmt: skip
    return Spans(text, spans, tuple(endless), all(stand))


def is_plain(turn: dict[str, Any]) -> bool:
    """Whether a message is words alone, without thoughts."""
    return turn.keys() == {"role", "content"} and "</think>" not in turn["content"]


def _long_words(turn: dict[str, Any]) -> bool:
    """Whether they are too many to be there by chance, as a role's name is."""
    return len(turn["content"].strip()) > 12


@lru_cache(maxsize=64)
def _following(signs: tuple[str, ...]) -> re.Pattern[str]:
    """One of the signs, behind white space."""
    return re.compile(r"\s*(?:" + "|".join(map(re.escape, sorted(signs, key=len, reverse=True))) + ")")


def template_spans(
    template: str, conversation: Conversation, special_tokens: dict[str, Any], *, tools: Tools = None
) -> tuple[str, dict[int, Span]]:
    """The text that a template writes, and the characters of each answer with the template's own end of turn.

    Raises BadRow when the template refuses the conversation, or does not show an answer.
    """
    text, turns = _written(template, conversation, special_tokens, tools)
    answers = [number for number, turn in enumerate(conversation) if turn["role"] == "assistant"]
    return text, _spans(text, turns, template, conversation, special_tokens, tools, answers)


def _spans(
    text: str,
    turns: Sequence[Span | None],
    template: str,
    conversation: Conversation,
    special_tokens: dict[str, Any],
    tools: Tools,
    answers: Sequence[int],
) -> dict[int, Span]:
    """The characters of the answers by their numbers, of the text and those of all messages. Raises BadRow."""
    spans: dict[int, Span] = {}
    for number in answers:
        mine = (template, conversation, special_tokens, tools, number)
        after = max((end for _, end in spans.values()), default=0)
        span = _marked(text, turns[number], mine) or _compared(text, after, mine)
        if span is None:
            raise BadRow(f"the chat template does not show message {number + 1}, an answer")
        _check_calls(text, span, conversation, number)
        spans[number] = span
    return spans


def _check_calls(text: str, span: Span, conversation: Conversation, number: int) -> None:
    """Raises BadRow for a message whose calls of tools do not stand in its characters."""
    if any(name not in text[slice(*span)] for name in _names(conversation[number])):
        raise BadRow(f"the chat template does not show the tool calls of message {number + 1}")


@lru_cache(maxsize=64)
def generation_prompt(template: str, special_tokens: Specials) -> str:
    """The text that the template writes where the assistant is to begin; empty when it writes nothing there.

    Empty, too, where neither marks nor the text without it tell where it begins.
    """
    special = dict(special_tokens)
    asked = partial(run_template, template, (message("user", "?"),), special)
    try:
        whole, without = asked(add_generation_prompt=True), asked()
    except BadRow:
        return ""
    try:
        marked, _, tail = run_marked(template, (message("user", "?"),), special, add_generation_prompt=True)
    except BadRow:
        marked, tail = "", 0
    if marked == whole and tail:
        return whole[tail:]
    return whole[len(without) :] if whole.startswith(without) else ""


@lru_cache(maxsize=64)
def stop_sign(template: str, special_tokens: Specials) -> str:
    """The end of an answer: the text that the template writes between it and the next turn, or nothing."""
    turns = [message(role, word) for word in ("73101", "73102") for role in ("user", "assistant")]
    try:
        text, spans = template_spans(template, turns, dict(special_tokens))
    except BadRow:
        return ""
    return text[slice(*spans[1])].rpartition("73101")[2].strip()


@lru_cache(maxsize=64)
def _is_marked(template: str, special_tokens: Specials) -> bool:
    """Whether the marks show where messages are. True where that cannot be tried."""
    turns = [message(role, f"7310{n}") for n, role in enumerate(("user", "assistant", "user", "assistant"))]
    try:
        text, found, _ = run_marked(template, turns, dict(special_tokens))
    except BadRow:
        return True
    return all(span and turn["content"] in text[slice(*span)] for turn, span in zip(turns, found, strict=True))


def _written(
    template: str, conversation: Conversation, special_tokens: dict[str, Any], tools: Tools
) -> tuple[str, Sequence[Span | None]]:
    """The text that the template writes, and the characters of each message, by the marks.

    None for a message that these do not show, and for all where they would change what is written.
    """
    run = partial(run_template, template, conversation, special_tokens, tools=tools)
    if not _is_marked(template, _hashable(special_tokens)):
        return run(), [None] * len(conversation)
    if keeps_marks(template):
        return run_marked(template, conversation, special_tokens, tools=tools)[:2]
    text = run()
    try:
        marked, turns, _ = run_marked(template, conversation, special_tokens, tools=tools)
    except BadRow:
        marked, turns = "", ()
    return text, turns if marked == text else [None] * len(conversation)


Mine = tuple[str, Conversation, dict[str, Any], Tools, int]


def _marked(text: str, span: Span | None, mine: Mine) -> Span | None:
    """An answer inside the characters of its turn: behind what the model is given, without space at its end."""
    template, conversation, special, _, number = mine
    if span is None:
        return None
    start, end = span
    if number == len(conversation) - 1:
        end = len(text)  # what some templates write after the last turn, an EOS, is the model's too
    saying = _Saying(mine).__getitem__
    begin = start + _header(text[start:end], generation_prompt(template, _hashable(special)), saying)
    end = _end(text, begin, end, conversation[number]["content"])
    shown = text[begin:end]
    words = conversation[number]["content"].split()[-1:]
    if any(word not in shown for word in words) and not any(map(shown.count, _names(conversation[number]))):
        return None if saying("0") == saying("A") or begin >= end else (begin, end)
    return (begin, end) if begin < end else None


class _Saying(dict[str, str | None]):
    """The turn of an answer with a word in its place, by the word; found when it is first asked for."""

    def __init__(self, mine: Mine):
        super().__init__()
        self._mine = mine

    def __missing__(self, word: str) -> str | None:
        template, conversation, special, tools, number = self._mine
        other, turns, _ = run_marked(template, _replaced(conversation, number, word), special, tools=tools)
        found = turns[number]
        self[word] = None if found is None else other[slice(*found)]
        return self[word]


def _compared(text: str, after: int, mine: Mine) -> Span | None:
    """An answer, found by comparison with the conversation in which it says something else."""
    template, conversation, special, tools, number = mine
    run = partial(run_template, template, special_tokens=special, tools=tools)
    begin, left = _differing(text, conversation, number, run)
    if begin is None:
        return None
    said = end = len(text) - left
    if number == len(conversation) - 1:
        end = len(text)
    else:  # its end of turn is what follows it here, too, when nothing follows
        cut = conversation[: number + 1]
        try:
            alone = run(cut)
            _, rest = _differing(alone, cut, number, run)
            end += _common_signs(text[said:], alone[len(alone) - rest :])
        except BadRow:
            pass
    try:
        asked = run(conversation[:number], add_generation_prompt=True) if number else ""
    except BadRow:
        asked = ""
    header = generation_prompt(template, _hashable(special))
    at = text.rfind(header, after, begin) if header else -1
    if asked and text.startswith(asked) and after <= len(asked) <= said:
        begin = len(asked)
    elif at >= 0:
        begin = at + len(header)
    end = _end(text, begin, end, conversation[number]["content"])
    return (begin, end) if begin < end else None


def _differing(
    text: str, conversation: Conversation, number: int, run: Callable[[Conversation], str]
) -> tuple[int | None, int]:
    """How many characters of a text stand before and after what a message says; None when it says nothing."""
    others = [run(_replaced(conversation, number, word)) for word in ("0", "A")]
    if others[0] == others[1] and conversation[number].get("tool_calls"):  # some show the calls instead
        others = [run(_recalled(conversation, number, word)) for word in ("0", "A")]
    if others[0] == others[1]:
        return None, 0
    texts = [text, *others]
    pairs = [(texts[0], texts[1]), (texts[0], texts[2]), (texts[1], texts[2])]
    before = min(_common(a, b) for a, b in pairs)
    after = min(_common(a[::-1], b[::-1]) for a, b in pairs)
    return before, min(after, len(text) - before)


def _header(turn: str, prompt: str, saying: Callable[[str], str | None]) -> int:
    """How many characters of an assistant's turn are given to the model.

    Usually the generation prompt. Where a turn does not begin with that, it is what the turn has in common with the
    same turn saying something else.
    """
    if turn.startswith(prompt):
        return len(prompt)
    first, second = saying("0"), saying("A")
    if first is None or second is None:
        return 0
    return min(_common(turn, first), _common(turn, second), _common(first, second))


def _end(text: str, begin: int, end: int, content: str) -> int:
    """Where an answer ends: the template's space behind it is not learned, its own is."""
    shown = text[begin:end]
    at = shown.rfind(content) if content.strip() else -1
    return begin + max(len(shown.rstrip()), at + len(content) if at >= 0 else 0)


def _replaced(conversation: Conversation, number: int, word: str) -> list[dict[str, Any]]:
    """The conversation in which a message says something else, without a thought: what stays is the template's."""
    kept = {key: value for key, value in conversation[number].items() if key not in REASONING}
    return [*conversation[:number], {**kept, "content": word}, *conversation[number + 1 :]]


def _recalled(conversation: Conversation, number: int, name: str) -> list[dict[str, Any]]:
    """The conversation in which a message calls another tool."""
    calls = [{"type": "function", "function": {"name": name, "arguments": {}}}]
    return [*conversation[:number], {**conversation[number], "tool_calls": calls}, *conversation[number + 1 :]]


def _names(turn: dict[str, Any]) -> list[str]:
    """The names of the tools that a message calls."""
    functions = [call.get("function", call) for call in turn.get("tool_calls") or ()]
    return [str(function.get("name", "")) for function in functions if isinstance(function, dict)]


def _common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _common_signs(a: str, b: str) -> int:
    """The beginning that two texts share, without a sign that only begins alike in both."""
    common = a[: _common(a, b)]
    return len(common) if common == b else len(re.sub(r"[<\[{(][^>\]})\s]*$", "", common))


def _plain(conversation: Conversation) -> tuple[str, list[Span]]:
    text, turns = "", []
    for turn in conversation:
        if turn["role"] not in PLAIN_NAMES or turn.get("tool_calls"):
            raise BadRow("the tokenizer has no chat template, which tools need")
        start = len(text)
        text += f"\n\n{PLAIN_NAMES[turn['role']]}: {turn['content']}"
        turns.append((start, len(text)))
    return text, turns


def _hashable(special_tokens: dict[str, Any]) -> Specials:
    return tuple(sorted((name, str(value)) for name, value in special_tokens.items()))
