"""Conversations as text: the tokenizer's chat template, rendered once, and where in it each turn stands.

A template is compiled with a mark before and after what it writes in each pass of a loop over the messages. The marks
say which characters belong to which message, whatever the template does with them: nothing is rendered message by
message, which goes wrong with templates that drop past reasoning or end in an EOS. {% generation %} changes nothing.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import lru_cache, partial
from typing import Any, NamedTuple

from jinja2 import TemplateError, ext, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlhf_jax.data.conversations import message
from rlhf_jax.data.rejects import BadRow
from rlhf_jax.data.tokenizer import PreTrainedTokenizerBase

Tools = Sequence[dict[str, Any]] | None
Span = tuple[int, int]

OPEN, CLOSE, SHUT = "\ufdd0", "\ufdd1", "\ufdd2"
"""Code points that are no characters; with a hash of the messages between them they occur in no text."""
PLAIN_NAMES = {"user": "Human", "assistant": "Assistant", "system": "System"}
REASONING = ("reasoning_content", "thinking", "reasoning")


class Rendered(NamedTuple):
    """The text of a conversation, and the characters that each of its messages became (None: not shown)."""

    text: str
    turns: tuple[Span | None, ...]
    tail: int
    """Where the text after the last turn begins: the generation prompt, if it was asked for."""


def render(
    conversation: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Tools = None,
    add_generation_prompt: bool = False,
) -> Rendered:
    """The conversation by the tokenizer's chat template; without one as "\\n\\nHuman: …\\n\\nAssistant: …".

    Raises BadRow when the template refuses the conversation.
    """
    if not tokenizer.chat_template:
        return _plain(conversation, add_generation_prompt)
    tools = list(tools) if tools else None
    template = tokenizer.get_chat_template(tools=tools)
    return render_template(
        template, conversation, tokenizer.special_tokens_map, tools=tools, add_generation_prompt=add_generation_prompt
    )


def render_template(
    template: str,
    conversation: Sequence[dict[str, Any]],
    special_tokens: dict[str, Any],
    *,
    tools: Tools = None,
    add_generation_prompt: bool = False,
) -> Rendered:
    """Does what `render` does, for the text of a template. Raises BadRow when the template fails."""
    chat = [_with_reasoning(turn) for turn in conversation]
    nonce = hashlib.sha256(json.dumps([chat, tools], default=str).encode()).hexdigest()[:16]
    numbers = {id(turn): number for number, turn in enumerate(chat)}
    try:
        marked = _compiled(template).render(
            messages=chat,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            rlhf_jax_mark=partial(_mark, nonce, numbers),
            **special_tokens,
        )
    except Exception as error:  # a template is a program, and may fail in any way
        raise BadRow(f"refused by the chat template: {error}") from None
    return _unmarked(marked, nonce, len(chat))


def _mark(nonce: str, numbers: dict[int, int], turn: Any, sign: str) -> str:
    return f"{sign}{nonce}.{numbers[id(turn)]}{CLOSE}" if id(turn) in numbers else ""


def answer_spans(
    conversation: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, tools: Tools = None
) -> tuple[str, dict[int, Span]]:
    """The text, and the characters of it that the model is to write, by the number of the assistant's message.

    A span begins where the prompt of that turn ends as the model meets it when it generates, and ends with the
    template's end of turn. Raises BadRow when an answer does not appear.
    """
    if not tokenizer.chat_template:
        text, turns, _ = _plain(conversation, False)
        names = {n: len(f"\n\n{PLAIN_NAMES['assistant']}:") for n, turn in enumerate(conversation)}
        return text, {
            n: (span[0] + names[n], span[1])
            for n, span in enumerate(turns)
            if span and conversation[n]["role"] == "assistant"
        }
    tools = list(tools) if tools else None
    template = tokenizer.get_chat_template(tools=tools)
    return template_spans(template, conversation, tokenizer.special_tokens_map, tools=tools)


def template_spans(
    template: str, conversation: Sequence[dict[str, Any]], special_tokens: dict[str, Any], *, tools: Tools = None
) -> tuple[str, dict[int, Span]]:
    """Does what `answer_spans` does, for the text of a template.

    Raises BadRow when the template refuses the conversation, or does not show an answer whole.
    """
    text, turns, _ = render_template(template, conversation, special_tokens, tools=tools)
    header = generation_prompt(template, tuple(sorted((k, str(v)) for k, v in special_tokens.items())))
    spans = {}
    for number, turn in enumerate(conversation):
        if turn["role"] != "assistant":
            continue
        span = turns[number]
        if span is None:
            raise BadRow(f"the chat template does not show message {number + 1}, an answer")
        start, end = span
        if number == len(conversation) - 1:
            end = len(text)  # what some templates write after the last turn, an EOS, is the model's too

        saying = partial(_saying, template, conversation, number, special_tokens, tools)
        begin = start + _header(text[start:end], header, saying)
        end = start + len(text[start:end].rstrip())
        if begin >= end or _hides(text[begin:end], turn, saying):
            raise BadRow(f"the chat template shows nothing of message {number + 1}, an answer")
        if any(_name(call) not in text[begin:end] for call in turn.get("tool_calls") or ()):
            raise BadRow(f"the chat template does not show the tool calls of message {number + 1}")
        spans[number] = begin, end
    return text, spans


@lru_cache(maxsize=64)
def generation_prompt(template: str, special_tokens: tuple[tuple[str, str], ...]) -> str:
    """The text that the template writes where the assistant is to begin; empty when it writes nothing there."""
    try:
        asked = render_template(template, (message("user", "?"),), dict(special_tokens), add_generation_prompt=True)
    except BadRow:
        return ""
    return asked.text[asked.tail :]


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


def _hides(shown: str, turn: dict[str, Any], saying: Callable[[str], str | None]) -> bool:
    """Whether an answer's words are not to be seen, escaped or cut as they may be."""
    words = turn["content"].split()
    return bool(words) and words[-1] not in shown and saying("0") == saying("A")


def _saying(
    template: str,
    conversation: Sequence[dict[str, Any]],
    number: int,
    special_tokens: dict[str, Any],
    tools: Tools,
    word: str,
) -> str | None:
    """A message's turn if it said something else: what stays is the template's."""
    changed = {key: value for key, value in conversation[number].items() if key not in REASONING}
    other = [*conversation[:number], {**changed, "content": word}, *conversation[number + 1 :]]
    text, turns, _ = render_template(template, other, special_tokens, tools=tools)
    span = turns[number]
    return None if span is None else text[slice(*span)]


def _name(call: dict[str, Any]) -> str:
    function = call.get("function")
    return str((function if isinstance(function, dict) else call).get("name", ""))


def _common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _plain(conversation: Sequence[dict[str, Any]], add_generation_prompt: bool) -> Rendered:
    text, turns = "", []
    for turn in conversation:
        if turn["role"] not in PLAIN_NAMES or turn.get("tool_calls"):
            raise BadRow("the tokenizer has no chat template, which tools need")
        start = len(text)
        text += f"\n\n{PLAIN_NAMES[turn['role']]}: {turn['content']}"
        turns.append((start, len(text)))
    tail = len(text)
    return Rendered(text + ("\n\nAssistant:" if add_generation_prompt else ""), tuple(turns), tail)


def _with_reasoning(turn: dict[str, Any]) -> dict[str, Any]:
    """A copy with the reasoning, under whichever name it came, where templates look for it."""
    reasoning = next((turn[name] for name in REASONING if turn.get(name) is not None), None)
    return dict(turn) if reasoning is None else {**turn, "reasoning_content": reasoning, "thinking": reasoning}


def _unmarked(marked: str, nonce: str, count: int) -> Rendered:
    """The text without its marks; a message shown in several loops is where it last became visible text."""
    turns: list[Span | None] = [None] * count
    began: dict[int, int] = {}
    text, tail, at = "", 0, 0
    for found in re.finditer(f"([{OPEN}{SHUT}]){nonce}\\.(\\d+){CLOSE}", marked):
        text += marked[at : found.start()]
        at = found.end()
        number = int(found[2])
        if found[1] == OPEN:
            began[number] = len(text)
        elif text[began[number] :].strip():
            turns[number], tail = (began[number], len(text)), len(text)
    text += marked[at:]
    return Rendered(text, tuple(turns), tail)


class _Generation(ext.Extension):
    """{% generation %} … {% endgeneration %}: only what is inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=64)
def _compiled(template: str) -> Any:
    """A template as transformers compiles it, with a call of `rlhf_jax_mark` around each pass of each loop."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    tree = environment.parse(template)
    for loop in list(tree.find_all(nodes.For)):
        if isinstance(loop.target, nodes.Name):
            loop.body = [_call(loop, OPEN), *loop.body, _call(loop, SHUT)]
    code = environment.compile(tree)
    return environment.template_class.from_code(environment, code, environment.make_globals(None))


def _call(loop: nodes.For, sign: str) -> nodes.Node:
    target = nodes.Name(loop.target.name, "load")  # type: ignore[attr-defined]
    call = nodes.Call(nodes.Name("rlhf_jax_mark", "load"), [target, nodes.Const(sign)], [], None, None)
    return nodes.Output([call]).set_lineno(loop.lineno)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Not Jinja's own, which escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(reason: str) -> None:
    raise TemplateError(reason)
