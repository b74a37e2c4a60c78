"""A constitution: the principles by which a model criticises, revises and compares answers.

Bai et al. 2022, "Constitutional AI: Harmlessness from AI Feedback", https://arxiv.org/abs/2212.08073.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.data.conversations import Conversation, message
from rlhf_jax.errors import UserError

SHIPPED = Path(__file__).with_name("constitution.json")
"""A short constitution of our own."""
ROLES = {
    "Human": "user", "Assistant": "assistant", "CritiqueRequest": "user", "Critique": "assistant",
    "RevisionRequest": "user", "Revision": "assistant",
}  # fmt: skip
TURN = re.compile(rf"\n\n({'|'.join(ROLES)}):")
READ = ("critique_revision", "rl_preference_principles", "critique_revision_few_shot")


class Principle(NamedTuple):
    """A principle of the first stage: what the model is asked for about its own answer."""

    name: str
    critique: str
    """The request for a critique."""
    revision: str
    """The request for a revision that takes the critique to heart."""


class Constitution(NamedTuple):
    """Principles, and conversations that show how an answer is criticised and revised."""

    principles: tuple[Principle, ...]
    questions: tuple[str, ...]
    """Principles of the second stage: questions by which two answers are compared."""
    examples: tuple[Conversation, ...] = ()
    """Each has question, answer, request and critique, request and revision, as turns of user and assistant."""
    notes: tuple[str, ...] = ()
    """A line for each part of the file that is not used."""


def read_constitution(path: str | Path) -> Constitution:
    """Reads a constitution in the form of the paper's own files, joined in one JSON object:

        critique_revision           {NAME: {"prompt": [request for critique], "edit_request": request for revision}}
        rl_preference_principles    [question by which two answers are compared]
        critique_revision_few_shot  [transcript with Human, Assistant, CritiqueRequest, Critique, RevisionRequest,
                                     Revision]; may be missing

    Raises UserError for a file that cannot be read or has another form.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: the constitution cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: the constitution is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: a constitution is a JSON object with {', '.join(READ)}")
    principles = tuple(
        Principle(name, _request(_get(path, each, f"critique_revision.{name}", "prompt", first=True)),
                  _request(_get(path, each, f"critique_revision.{name}", "edit_request")))
        for name, each in _filled(path, found, "critique_revision", dict).items()
    )  # fmt: skip
    questions = _filled(path, found, "rl_preference_principles", list)
    examples = found.get("critique_revision_few_shot", [])
    if not isinstance(examples, list) or not all(isinstance(text, str) for text in [*questions, *examples]):
        raise UserError(f"{path}: rl_preference_principles and critique_revision_few_shot are lists of texts")
    unread = sorted(found.keys() - set(READ))
    return Constitution(
        principles,
        tuple(text.strip().removesuffix("Options:").strip() for text in questions),
        tuple(transcript(text, path) for text in examples),
        (f"{path}: not used: {', '.join(unread)}",) if unread else (),
    )


def transcript(text: str, where: object = "a transcript") -> Conversation:
    """A critique and its revision as turns of user and assistant. Raises UserError where a turn is out of its place.

    Words of the user's at the end, to which there is no answer, are left out, as in the paper's files.
    """
    before, *parts = TURN.split("\n\n" + text.lstrip())
    said = [message(ROLES[who], words.strip()) for who, words in zip(parts[::2], parts[1::2], strict=True)]
    if said and said[-1]["role"] == "user":
        said.pop()
    expected = [("user", "assistant")[number % 2] for number in range(len(said))]
    if before.strip() or not said or [turn["role"] for turn in said] != expected or "Revision" not in parts:
        raise UserError(
            f"{where}: an example of critique and revision is Human, Assistant, CritiqueRequest, Critique,"
            " RevisionRequest, Revision, and this one begins: " + " ".join(text.split())[:60]
        )
    return tuple(said)


def _filled(path: object, found: dict[str, Any], name: str, kind: type) -> Any:
    value = found.get(name)
    if not isinstance(value, kind) or not value:
        raise UserError(f"{path}: {name} is missing, or is no {kind.__name__} with anything in it")
    return value


def _get(path: object, each: Any, where: str, name: str, *, first: bool = False) -> str:
    value = each.get(name) if isinstance(each, dict) else None
    if first and isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{path}: {where} has no text {name!r}")
    return value


def _request(text: str) -> str:
    """The words of a request, without the names of the turns around it."""
    words = re.sub(r"^(CritiqueRequest|RevisionRequest):", "", text.strip())
    return re.sub(r"(Critique|Revision):$", "", words.strip()).strip()
