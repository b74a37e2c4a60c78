"""Chat templates as programs: compiled and run as transformers does, and once more with marks in what they write.

The marks stand before and after what a template writes in each pass of a loop over the messages. They say which
characters belong to which message, whatever the template does with them: nothing is rendered message by message, which
goes wrong with templates that drop past reasoning or end in an EOS. {% generation %} changes nothing.
"""

import json
import re
import secrets
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, ext, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlhf_jax import clock
from rlhf_jax.data.rejects import BadRow
from rlhf_jax.data.tools import with_arguments

Tools = Sequence[dict[str, Any]] | None
Span = tuple[int, int]

OPEN, CLOSE, SHUT = "\ufdd0", "\ufdd1", "\ufdd2"
"""Code points that are no characters."""
NONCE = secrets.token_hex(8)
"""Drawn for this process: with it between the code points a mark occurs in no text."""
MARK = re.compile(f"([{OPEN}{SHUT}]){NONCE}\\.(\\d+){CLOSE}")
MARKED = "rlhf_jax_mark"
REASONING = ("reasoning_content", "thinking", "reasoning")


def run_template(
    template: str,
    conversation: Sequence[dict[str, Any]],
    special_tokens: dict[str, Any],
    *,
    tools: Tools = None,
    add_generation_prompt: bool = False,
) -> str:
    """The text that the template writes, as transformers' `apply_chat_template` has it.

    Arguments of calls are objects, as templates expect them; where a template asks whether they are text, they stay as
    they came, and where it fails with objects, they are JSON text. Raises BadRow when the template fails.
    """
    chat = _as_transformers(conversation)
    return _run(template, chat, special_tokens, tools, add_generation_prompt, marked=False)


def run_marked(
    template: str,
    conversation: Sequence[dict[str, Any]],
    special_tokens: dict[str, Any],
    *,
    tools: Tools = None,
    add_generation_prompt: bool = False,
) -> tuple[str, tuple[Span | None, ...], int]:
    """The text that the template writes, the characters of each message, and where the text after the last begins.

    A message that no loop wrote has None. Raises BadRow when the template fails.
    """
    chat = _as_transformers(conversation)
    marked = _run(template, chat, special_tokens, tools, add_generation_prompt, marked=True)
    return _unmarked(marked, len(chat))


def _as_transformers(conversation: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copies without null fields, and with the reasoning under each of the names that templates look for."""
    chat = []
    for turn in conversation:
        turn = {key: value for key, value in turn.items() if value is not None}
        reasoning = next((turn[name] for name in REASONING if name in turn), None)
        if reasoning is not None:
            turn = {"thinking": reasoning, **turn, "reasoning_content": reasoning}
        chat.append(turn)
    return chat


def _run(
    template: str,
    chat: list[dict[str, Any]],
    special_tokens: dict[str, Any],
    tools: Tools,
    add_generation_prompt: bool,
    *,
    marked: bool,
) -> str:
    calls = any(turn.get("tool_calls") for turn in chat)
    asks = re.search(r"arguments\s+is\s+(not\s+)?(string|mapping)", template)
    forms = [chat if asks else with_arguments(chat, as_text=False), with_arguments(chat, as_text=True)]
    first: Exception | None = None
    for form in forms if calls else [chat]:
        form = [_Turn(turn, number) for number, turn in enumerate(form)] if marked else [dict(turn) for turn in form]
        try:
            written = _compiled(template, marked).render(
                messages=form,
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
        except Exception as error:  # a template is a program, and may fail in any way
            first = first or error
        else:
            return written
    raise BadRow(f"refused by the chat template: {first}") from None


class _Turn(dict[str, Any]):
    """A message that knows its number."""

    __slots__ = ("_number",)

    def __init__(self, turn: dict[str, Any], number: int):
        super().__init__(turn)
        self._number = number


def _mark(turn: Any, sign: str) -> str:
    """A filter, for templates: those are called directly, and functions only after checks."""
    return f"{sign}{NONCE}.{turn._number}{CLOSE}" if isinstance(turn, _Turn) else ""


def _unmarked(marked: str, count: int) -> tuple[str, tuple[Span | None, ...], int]:
    """The text without its marks; a message shown in several loops is where it last became visible text."""
    turns: list[Span | None] = [None] * count
    began: dict[int, int] = {}
    parts: list[str] = []
    length = visible = tail = at = 0
    for found in MARK.finditer(marked):
        parts.append(part := marked[at : found.start()])
        length, at = length + len(part), found.end()
        visible = length if part and not part.isspace() else visible
        number = int(found[2])
        if found[1] == OPEN:
            began[number] = length
        elif visible > began[number]:
            turns[number], tail = (began[number], length), length
    return "".join([*parts, marked[at:]]), tuple(turns), tail


def check_template(template: str | None, name: object) -> None:
    """Raises ValueError when a chat template is no Jinja, with the line; `name` says whose it is."""
    try:
        _environment().parse(template or "")
    except TemplateSyntaxError as error:
        raise ValueError(
            f"{name}: the chat template cannot be read, its line {error.lineno}: {error.message}; put it right, or"
            " remove it and let turns be written as Human and Assistant"
        ) from None


@lru_cache(maxsize=128)
def keeps_marks(template: str) -> bool:
    """Whether marks stand in what a template writes, and nowhere that it could measure or trim."""
    try:
        tree = _environment().parse(template)
    except TemplateError:
        return False
    captures = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock, nodes.Block)
    return not any(
        isinstance(node, captures) or (isinstance(node, nodes.For) and node.recursive)
        for node in tree.find_all(nodes.Node)
    )


class _Generation(ext.Extension):
    """{% generation %} … {% endgeneration %}: only what is inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=128)
def _compiled(template: str, marked: bool) -> Any:
    """A template as transformers compiles it; marked, with a mark before and after each pass of each loop."""
    environment = _environment()
    tree = environment.parse(template)
    for loop in list(tree.find_all(nodes.For)) if marked else ():
        if isinstance(loop.target, nodes.Name):
            loop.body = [_marks(loop, OPEN), *loop.body, _marks(loop, SHUT)]
    code = environment.compile(tree)
    return environment.template_class.from_code(environment, code, environment.make_globals(None))


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.filters[MARKED] = _mark
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: clock.now().strftime(form)
    return environment


def _marks(loop: nodes.For, sign: str) -> nodes.Node:
    target = nodes.Name(loop.target.name, "load")  # type: ignore[attr-defined]
    mark = nodes.Filter(target, MARKED, [nodes.Const(sign)], [], None, None)
    return nodes.Output([mark]).set_lineno(loop.lineno)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Not Jinja's own, which escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(reason: str) -> None:
    raise TemplateError(reason)
