"""The files that evaluation reads, and their rows as token ids. Whatever is wrong with one names file and line.

Preferences are rows of chosen and rejected as in training, or sets in their published form: LLMBar (Zeng et al. 2023,
https://arxiv.org/abs/2310.07641) and PandaLM's test set (Wang et al. 2023, https://arxiv.org/abs/2306.05087).
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf_jax.data.encode import encode
from rlhf_jax.data.formats import Comparison, Prompt, known, normalise, recognise
from rlhf_jax.data.rejects import BadRow, Place
from rlhf_jax.data.sources import Broken, read_source
from rlhf_jax.errors import UserError
from rlhf_jax.rewards import ifeval, math

Rows = list[tuple[Place, dict[str, Any]]]
Reasons = dict[str, list[int]]
"""Why rows are not used, or not as they stand -> their lines."""


class Preferences(NamedTuple):
    """Pairs of which people preferred one, and the part of the set that each belongs to ("" without parts)."""

    pairs: list[Comparison]
    subsets: list[str]
    notes: list[str]


class Instruction(NamedTuple):
    """A prompt with instructions that can be verified."""

    prompt: str
    instructions: list[str]
    arguments: list[dict[str, Any]]


class Sum(NamedTuple):
    """A question and a solution with its number."""

    question: str
    answer: str


def read_rows(path: str, limit: int | None) -> Rows:
    """The rows of a jsonl or jsonl.gz file, at most `limit`."""
    rows: Rows = []
    for place, row in islice(read_source(path), limit):
        if isinstance(row, Broken):
            raise UserError(f"{place}: {row.reason}")
        rows.append((place, row))
    return rows


def read_preferences(path: str, limit: int | None) -> Preferences:
    """Pairs in one of the forms above; a field "subset" names the part. Rows without a verdict are counted."""
    rows = read_rows(path, limit)
    columns = set(rows[0][1])
    form = recognise(columns, "comparisons")
    if columns >= {"input", "output_1", "output_2", "label"}:
        part = _part_llmbar
    elif columns >= {"instruction", "response1", "response2", "annotator1", "annotator2", "annotator3"}:
        part = _part_pandalm
    elif form is not None:
        part = partial(_part_known, form)
    else:
        names = ", ".join(sorted(columns))
        raise UserError(f"{rows[0][0]}: fields {names}; known are {known('comparisons')}; LLMBar's; PandaLM's")
    pairs, subsets, reasons = [], [], {}
    for place, row in rows:
        try:
            pairs.append(part(place, row))
        except BadRow as error:
            reasons.setdefault(str(error), []).append(place.line)
        else:
            subsets.append(str(row.get("subset") or ""))
    if not pairs:
        raise UserError(f"{path}: no row can be used: {', '.join(reasons)}")
    return Preferences(pairs, subsets, [f"{path}: {len(pairs)} rows read", *tally(path, reasons)])


def tally(name: str, reasons: Reasons) -> list[str]:
    """Reason by reason, how many rows and the first of their lines."""
    notes = []
    for reason, lines in reasons.items():
        some = ", ".join(map(str, lines[:5])) + (", …" if len(lines) > 5 else "")
        notes.append(f"{name}: {reason}: {len(lines)} rows (lines {some})")
    return notes


def read_instructions(path: str, limit: int | None) -> list[Instruction]:
    """IFEval's form: prompt, instruction_id_list, kwargs."""

    def one(place: Place, row: dict[str, Any]) -> Instruction:
        names, arguments = (_field(place, row, name, list) for name in ("instruction_id_list", "kwargs"))
        known = all(isinstance(name, str) for name in names) and all(isinstance(some, dict) for some in arguments)
        if not names or not known:
            raise UserError(f"{place}: instruction_id_list is a list of names, kwargs one of objects, as many of each")
        ifeval.follow(names, arguments, "")  # for its errors
        return Instruction(_text(place, row, "prompt"), names, arguments)

    return _each(path, limit, one)


def read_sums(path: str, limit: int | None) -> list[Sum]:
    """GSM8K's form: question, answer."""

    def one(place: Place, row: dict[str, Any]) -> Sum:
        found = Sum(_text(place, row, "question"), _text(place, row, "answer"))
        math.grade("", found.answer)  # for its errors
        return found

    return _each(path, limit, one)


def read_prompts(path: str, limit: int | None) -> list[str]:
    """Rows with a prompt, or an instruction and perhaps an input."""

    def one(place: Place, row: dict[str, Any]) -> str:
        return _text(place, row, "prompt") if "prompt" in row else _instruction(place, row)

    return _each(path, limit, one)


def read_documents(path: str, limit: int | None) -> list[str]:
    """Rows with a text; a .txt file is one document."""
    if Path(path).suffix == ".txt":
        try:
            texts = [Path(path).read_text(encoding="utf-8")]
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text") from None
    else:
        texts = _each(path, limit, lambda place, row: _text(place, row, "text"))
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


class Encoded(NamedTuple):
    """Token ids of pairs: (prompt, chosen, rejected) each, and which of the pairs given these are."""

    triples: list[tuple[list[int], list[int], list[int]]]
    kept: list[int]
    notes: list[str]


def encode_pairs(
    name: str, pairs: Sequence[Comparison], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """Encoded as for training: a prompt that is too long loses its beginning, a response never its end."""
    triples, kept, reasons = [], [], {}
    for number, given in enumerate(pairs):
        try:
            found, cut = encode(given, tokenizer, max_length)
        except BadRow as error:
            reasons.setdefault(str(error), []).append(given.place.line)
            continue
        if cut:
            reasons.setdefault(f"prompt shortened to fit {max_length} tokens", []).append(given.place.line)
        best, worst = (found.ranks.index(pick(found.ranks)) for pick in (min, max))
        triples.append((found.prompt, found.responses[best], found.responses[worst]))
        kept.append(number)
    if not triples:
        raise UserError(f"{name}: no pair fits: {', '.join(reasons)}; raise --max-length")
    return Encoded(triples, kept, tally(name, reasons))


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase, room: int) -> list[int]:
    """Ids up to where the assistant begins, without the beginning if there are more than `room`."""
    return encode(Prompt(user(text), Place("", 0)), tokenizer, room)[0]


def encode_document(
    text: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[tuple[list[int], list[int]]]:
    """A document in windows of at most `max_length` tokens: (what is only read, what is to be predicted).

    Each window begins with BOS. Without one its first token is only read, so that it is nobody's to predict.
    """
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    size = max_length - len(bos)
    windows = [bos + ids[start : start + size] for start in range(0, len(ids), size)]
    return [(window[:1], window[1:]) for window in windows if len(window) > 1]


def _each(path: str, limit: int | None, one: Callable[[Place, dict[str, Any]], Any]) -> list[Any]:
    found = []
    for place, row in read_rows(path, limit):
        try:
            found.append(one(place, row))
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
    return found


def _part_llmbar(place: Place, row: dict[str, Any]) -> Comparison:
    label = row.get("label")
    if label not in (1, 2):
        raise UserError(f"{place}: label is {label!r}; it says which output is better, 1 or 2")
    outputs = [_text(place, row, f"output_{number}") for number in (label, 3 - label)]
    return pair(place, _text(place, row, "input"), *outputs)


def _part_known(form: str, place: Place, row: dict[str, Any]) -> Comparison:
    return normalise(form, row, place)


def _part_pandalm(place: Place, row: dict[str, Any]) -> Comparison:
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
    return "\n\n".join(str(part).strip() for part in given if str(part).strip())


def _text(place: Place, row: dict[str, Any], name: str) -> str:
    return _field(place, row, name, str)


def _field(place: Place, row: dict[str, Any], name: str, kind: type) -> Any:
    if name not in row:
        raise UserError(f"{place}: field {name!r} is missing; the row has {', '.join(map(str, row)) or 'no fields'}")
    if not isinstance(row[name], kind):
        wanted = {str: "text", list: "a list", int: "a whole number"}[kind]
        raise UserError(f"{place}: field {name!r} is {type(row[name]).__name__}, not {wanted}")
    return row[name]
