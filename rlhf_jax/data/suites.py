"""The files that evaluation reads. Whatever is wrong with one names file and line.

Preferences are rows of chosen and rejected as in training, or sets in their published form: LLMBar (Zeng et al. 2023,
https://arxiv.org/abs/2310.07641) and PandaLM's test set (Wang et al. 2023, https://arxiv.org/abs/2306.05087).
"""

from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.data.columns import refuse
from rlhf_jax.data.formats import Comparison, known, normalise, not_read, recognise
from rlhf_jax.data.rejects import BadRow, Place
from rlhf_jax.data.sources import Broken, read_source
from rlhf_jax.errors import UserError
from rlhf_jax.rewards import ifeval, math
from rlhf_jax.rewards.quantity import quantity

Rows = list[tuple[Place, dict[str, Any]]]
Reasons = dict[str, list[int]]
"""Why rows are not used, or not as they stand -> their lines."""


class PreferenceSet(NamedTuple):
    """Pairs of which people preferred one, and the part of the set that each belongs to ("" without parts)."""

    pairs: list[Comparison]
    subsets: list[str]
    notes: list[str]
    """How many rows were read, and why others were left out."""


class Instruction(NamedTuple):
    """A prompt with instructions that can be verified."""

    prompt: str
    instructions: list[str]
    arguments: list[dict[str, Any]]


class MathProblem(NamedTuple):
    """A question, and a solution that ends in its number."""

    question: str
    answer: str


def read_rows(path: str, limit: int | None) -> Rows:
    """The rows of a jsonl or jsonl.gz file, at most `limit`. Raises UserError for one that cannot be read."""
    rows: Rows = []
    for place, row in islice(read_source(path), limit):
        if isinstance(row, Broken):
            raise UserError(f"{place}: {row.reason}")
        rows.append((place, row))
    return rows


def read_preferences(path: str, limit: int | None) -> PreferenceSet:
    """Pairs in one of the forms above; a field "subset" names the part. Rows without a verdict are counted.

    Raises UserError for a file that cannot be read, has another form, or has no row that can be used.
    """
    rows = read_rows(path, limit)
    columns = set(rows[0][1])
    form = recognise(columns, "comparisons")
    read: Callable[[Place, dict[str, Any]], Comparison]
    if columns >= {"input", "output_1", "output_2", "label"}:
        read = _read_llmbar
    elif columns >= {"instruction", "response1", "response2", "annotator1", "annotator2", "annotator3"}:
        read = _read_pandalm
    elif form is not None:
        read = partial(_read_known, form)
    else:
        names = ", ".join(sorted(columns))
        raise UserError(f"{rows[0][0]}: fields {names}; known are {known('comparisons')}; LLMBar's; PandaLM's")
    pairs: list[Comparison] = []
    subsets: list[str] = []
    reasons: Reasons = {}
    unread: Reasons = {}
    for place, row in rows:
        try:
            pairs.append(read(place, row))
        except BadRow as error:
            reasons.setdefault(str(error), []).append(place.line)
        else:
            subsets.append(str(row.get("subset") or ""))
            note = "" if form is None else not_read(form, {name: row[name] for name in row if name != "subset"})
            if note:
                unread.setdefault(note, []).append(place.line)
    if not pairs:
        raise UserError(f"{path}: no row can be used: {', '.join(reasons)}")
    return PreferenceSet(pairs, subsets, [f"{path}: {len(pairs)} rows read", *tally(path, reasons | unread)])


def tally(name: str, reasons: Reasons) -> list[str]:
    """A line for each reason: how many rows, and the first of their lines."""
    notes = []
    for reason, lines in reasons.items():
        some = ", ".join(map(str, lines[:5])) + (", …" if len(lines) > 5 else "")
        notes.append(f"{name}: {reason}: {len(lines)} rows (lines {some})")
    return notes


def read_instructions(path: str, limit: int | None) -> list[Instruction]:
    """Rows in IFEval's form: prompt, instruction_id_list, kwargs. Raises UserError for any other row."""

    def read(place: Place, row: dict[str, Any]) -> Instruction:
        names, arguments = (_field(place, row, name, list) for name in ("instruction_id_list", "kwargs"))
        known = all(isinstance(name, str) for name in names) and all(isinstance(some, dict) for some in arguments)
        if not names or not known:
            raise UserError(f"{place}: instruction_id_list is a list of names, kwargs one of objects, as many of each")
        ifeval.follow(names, arguments, "")  # for its errors
        return Instruction(_text(place, row, "prompt"), names, arguments)

    return _read_each(path, limit, read)


def read_math_problems(path: str, limit: int | None) -> list[MathProblem]:
    """Rows in GSM8K's form: question, answer. Raises UserError for any other row, and an answer without a number."""

    def read(place: Place, row: dict[str, Any]) -> MathProblem:
        found = MathProblem(_text(place, row, "question"), _text(place, row, "answer"))
        if quantity(math.right_answer(found.answer)) is None:
            raise ValueError(f"the answer {found.answer!r} has no number")
        return found

    return _read_each(path, limit, read)


def read_prompts(path: str, limit: int | None) -> list[str]:
    """Rows with a prompt, or an instruction and perhaps an input. Raises UserError for any other row."""

    def read(place: Place, row: dict[str, Any]) -> str:
        try:
            refuse(row, "prompts", ("prompt", "instruction", "input"))
        except BadRow as error:
            raise ValueError(str(error)) from None
        return _text(place, row, "prompt") if "prompt" in row else _instruction(place, row)

    return _read_each(path, limit, read)


def read_documents(path: str, limit: int | None) -> list[str]:
    """Rows with a text; a .txt file is one document. Raises UserError for any other row, and without any text."""
    if Path(path).suffix == ".txt":
        try:
            texts = [Path(path).read_text(encoding="utf-8")]
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text") from None
    else:
        texts = _read_each(path, limit, lambda place, row: _text(place, row, "text"))
    if not any(text.strip() for text in texts):
        raise UserError(f"{path}: there is no text in it")
    return texts


def pair(place: Place, prompt: str, chosen: str, rejected: str) -> Comparison:
    """A prompt of one turn and two answers, of which the first is the better."""
    answers = tuple(({"role": "assistant", "content": text},) for text in (chosen, rejected))
    return Comparison(user(prompt), answers, (0, 1), place)


def user(text: str) -> tuple[dict[str, Any], ...]:
    """A conversation of one turn."""
    return ({"role": "user", "content": text},)


def _read_each(path: str, limit: int | None, read: Callable[[Place, dict[str, Any]], Any]) -> list[Any]:
    found = []
    for place, row in read_rows(path, limit):
        try:
            found.append(read(place, row))
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
    return found


def _read_llmbar(place: Place, row: dict[str, Any]) -> Comparison:
    label = row.get("label")
    if label not in (1, 2):
        raise UserError(f"{place}: label is {label!r}; it says which output is better, 1 or 2")
    outputs = [_text(place, row, f"output_{number}") for number in (label, 3 - label)]
    return pair(place, _text(place, row, "input"), *outputs)


def _read_known(form: str, place: Place, row: dict[str, Any]) -> Comparison:
    return normalise(form, row, place)


def _read_pandalm(place: Place, row: dict[str, Any]) -> Comparison:
    """By the majority of three annotators; 0 is a tie."""
    votes = [_field(place, row, f"annotator{number}", int) for number in (1, 2, 3)]
    better = next((side for side in (1, 2) if votes.count(side) > 1), None)
    if better is None:
        raise BadRow("a tie, or no majority")
    sides = []
    for name in (f"response{better}", f"response{3 - better}"):
        # The published file has responses that were "True" as JSON's true.
        truth = isinstance(row.get(name), bool)
        sides.append(str(row[name]) if truth else _text(place, row, name))
    return pair(place, _instruction(place, row), *sides)


def _instruction(place: Place, row: dict[str, Any]) -> str:
    given = [_text(place, row, "instruction"), row.get("input") or ""]
    return "\n\n".join(str(part) for part in given if str(part).strip())


def _text(place: Place, row: dict[str, Any], name: str) -> str:
    return _field(place, row, name, str)


def _field(place: Place, row: dict[str, Any], name: str, kind: type) -> Any:
    if name not in row:
        raise UserError(f"{place}: field {name!r} is missing; the row has {', '.join(map(str, row)) or 'no fields'}")
    if not isinstance(row[name], kind):
        wanted = {str: "text", list: "a list", int: "a whole number"}[kind]
        raise UserError(f"{place}: field {name!r} is {type(row[name]).__name__}, not {wanted}")
    return row[name]
