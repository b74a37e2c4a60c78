"""Parts of a conversation that a chat template leaves out: digits are put into every text and looked for."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from rlhf_jax.data.rejects import BadRow
from rlhf_jax.data.templates import REASONING, Tools

KNOWN = {"role", "content", "tool_calls", "tool_call_id", "id", "name", "type", *REASONING}
"""Fields of messages that are looked for in the text, or that only tie messages to each other."""
Show = Callable[[Sequence[dict[str, Any]], Tools], str]


def left_out(conversation: Sequence[dict[str, Any]], tools: Tools, show: Show, template: str) -> list[str]:
    """Notes about what is not in the text that show(conversation, tools) gives.

    Thoughts, names, words beside calls, tools, and fields of messages that the template does not name are counted.
    Raises BadRow where a message is missing: without what was asked or found, an answer would be learned from nothing.
    """
    planted, tried, wanted = _planted(conversation, tools)
    try:
        text = show(planted, tried)
    except BadRow:  # a template may refuse the digits; the texts themselves are there or not
        text = None
    if text is None:
        text = show(conversation, tools)
        wanted = [(number, part, words) for number, part, words in _words(conversation) if words]
    missing = {(number, part) for number, part, digits in wanted if digits not in text}
    notes = set()
    for number, turn in enumerate(conversation):
        parts = {part for n, part, _ in wanted if n == number and part in ("content", "calls")}
        if parts and all((number, part) in missing for part in parts):
            raise BadRow(f"the chat template does not show message {number + 1}, of the {turn['role']}")
        notes |= {part for n, part in missing if n == number}
        unknown = [key for key in turn if key not in KNOWN and not re.search(rf"\b{re.escape(str(key))}\b", template)]
        notes |= {f"{key!r} of messages" for key in unknown}
    notes |= {part for number, part in missing if number < 0}
    names = {"content": "words beside a call", "calls": "calls", "thought": "reasoning", "name": "names of speakers"}
    return [f"not shown by the chat template: {names.get(note, note)}" for note in sorted(notes)]


def _planted(
    conversation: Sequence[dict[str, Any]], tools: Tools
) -> tuple[list[dict[str, Any]], Tools, list[tuple[int, str, str]]]:
    """The conversation and tools with digits in every text, and (message, part, digits) of each; tools are -1."""
    whole = json.dumps([conversation, tools], default=str)
    base = int(hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest(), 16) % 10**12
    planted = _Planted(base, [])
    plant = planted.put
    chat = []
    for number, turn in enumerate(conversation):
        turn = dict(turn)
        thought, tag, words = turn["content"].rpartition("</think>")
        opening, start, inner = thought.rpartition("<think>")
        thought = opening + start + plant(number, "thought", inner) if tag else ""
        turn["content"] = thought + tag + plant(number, "content", words)
        if any(isinstance(turn.get(name), str) for name in REASONING):
            reasoning = next(turn[name] for name in REASONING if isinstance(turn.get(name), str))
            turn |= {name: plant(number, "thought", reasoning) for name in REASONING if name in turn}
        if isinstance(turn.get("name"), str):
            turn["name"] = plant(number, "name", turn["name"])
        if turn.get("tool_calls"):
            turn["tool_calls"] = [_renamed(call, partial(plant, number, "calls")) for call in turn["tool_calls"]]
        chat.append(turn)
    tried = [_renamed(tool, partial(plant, -1, "tools")) for tool in tools] if tools else None
    return chat, tried, planted.wanted


class _Planted(NamedTuple):
    """Digits that are put into texts, and where they are looked for."""

    base: int
    wanted: list[tuple[int, str, str]]
    """(message, part, digits)."""

    def put(self, number: int, part: str, text: str) -> str:
        """The text with digits of its own in its middle; as it is where it has no words."""
        words = text.strip()
        if not words:
            return text
        digits = f"{self.base:012d}{len(self.wanted):06d}"
        self.wanted.append((number, part, digits))
        at = text.index(words) + (len(words) + 1) // 2
        return text[:at] + digits + text[at:]


def _renamed(call: dict[str, Any], plant: Callable[[str], str]) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return call
    changed = {**function, "name": plant(function["name"])}
    return {**call, "function": changed} if "function" in call else changed


def _words(conversation: Sequence[dict[str, Any]]) -> list[tuple[int, str, str]]:
    """(message, part, the last of its words)."""
    return [(n, "content", next(iter(turn["content"].split()[-1:]), "")) for n, turn in enumerate(conversation)]
