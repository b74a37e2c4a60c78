"""Files of demonstrations and comparisons -> conversations -> token ids. Nothing is dropped in silence.

What stops a reader is the file itself: missing, empty, not JSON, a field missing or of another type; a
UserError names file, line and field. What only makes a row useless is counted in a `Report`, by reason.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf_jax.errors import UserError

Conversation = tuple[dict[str, str], ...]
"""Messages {"role": "user" or "assistant", "content": text}; the last is the user's."""
Report = dict[str, list[int]]
"""Reason -> numbers of the lines (from 1) that it concerns."""

TURN = re.compile(r"\n\n(Human|Assistant):")
EMPTY = "empty response"


class Demonstration(NamedTuple):
    """A prompt and the response that a person wrote."""

    prompt: Conversation
    response: str
    line: int


class Comparison(NamedTuple):
    """A prompt and two responses, of which a person preferred `chosen`."""

    prompt: Conversation
    chosen: str
    rejected: str
    line: int


def read_demonstrations(path: str | Path) -> tuple[list[Demonstration], Report]:
    """jsonl or jsonl.gz with instruction, output and perhaps input (Alpaca, Dolly), or prompt, completion.

    A prompt that is a transcript of Human and Assistant turns becomes those turns.
    """
    rows: list[Demonstration] = []
    report: Report = {}
    style = _style(path, [("prompt", "completion"), ("instruction", "output")])
    for row in _load(path, style, optional=("input",)):
        prompt = _prompt(row)
        if not _content(prompt):
            _note(report, "empty prompt", row["line"])
        elif not row[style[1]].strip():
            _note(report, EMPTY, row["line"])
        else:
            rows.append(Demonstration(prompt, row[style[1]].strip(), row["line"]))
    return _some(path, rows, report), report


def read_comparisons(path: str | Path) -> tuple[list[Comparison], Report]:
    """jsonl or jsonl.gz with chosen, rejected, and a prompt or an instruction (with an input, if any).

    Without either, chosen and rejected are whole transcripts as in HH-RLHF (Bai et al. 2022,
    https://arxiv.org/abs/2204.05862): the prompt is everything up to and including the last
    "\\n\\nAssistant:".
    """
    rows: list[Comparison] = []
    report: Report = {}
    style = _style(
        path,
        [("prompt", "chosen", "rejected"), ("instruction", "chosen", "rejected"), ("chosen", "rejected")],
    )
    for row in _load(path, style, optional=("input",)):
        parted = _part_transcripts(row) if style == ("chosen", "rejected") else _part_fields(row)
        if isinstance(parted, str):
            _note(report, parted, row["line"])
        else:
            rows.append(parted)
    return _some(path, rows, report), report


def encode_demonstrations(
    rows: Sequence[Demonstration], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[tuple[list[int], list[int]]], Report]:
    """(prompt ids, response ids) of each row that fits into `max_length` tokens; the response ends in EOS.

    Prompt and response are tokenised apart. The prompt is rendered by the tokenizer's chat template up to
    where the assistant begins; without one it is "\\n\\nHuman: …\\n\\nAssistant:", after one BOS. Too long a
    prompt loses its beginning (the BOS stays), but keeps at least `max_length` // 4 tokens: a response that
    leaves less is left out, for a response is never cut. Both are in the report, by line.
    """
    encoded, report = _encode(rows, tokenizer, max_length, lambda row: (row.response,))
    return [(prompt, response) for prompt, response in encoded], report


def encode_comparisons(
    rows: Sequence[Comparison], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[tuple[list[int], list[int], list[int]]], Report]:
    """(prompt ids, chosen ids, rejected ids), as `encode_demonstrations`; both share the prompt's ids."""
    encoded, report = _encode(rows, tokenizer, max_length, lambda row: (row.chosen, row.rejected))
    return [(prompt, chosen, rejected) for prompt, chosen, rejected in encoded], report


def encode_prompts(prompts: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of prompts up to where the assistant begins; BOS once, where the tokenizer has one."""
    return _prompt_ids([_render(prompt, tokenizer) for prompt in prompts], tokenizer)


def _encode(
    rows: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    responses: Callable[[Any], tuple[str, ...]],
) -> tuple[list[list[list[int]]], Report]:
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, so a model could not learn where a response ends")
    report: Report = {}
    kept, texts = [], []
    for row in rows:
        try:
            texts.append(_render(row.prompt, tokenizer))
            kept.append(row)
        except Exception as error:  # Strict templates raise, each in its way, on two turns of one speaker.
            _note(report, f"refused by the chat template: {error}", row.line)
    prompts = _prompt_ids(texts, tokenizer)
    space = "" if tokenizer.chat_template or _adds_space(tokenizer) else " "
    columns = [
        _plain_ids([space + text for text in column], tokenizer)
        for column in zip(*(responses(row) for row in kept), strict=True)
    ]
    encoded = []
    for row, prompt, *plain in zip(kept, prompts, *columns, strict=True):
        answers = [[*ids, tokenizer.eos_token_id] for ids in plain]
        room = max_length - max(len(ids) for ids in answers)
        if room < min(len(prompt), max_length // 4):
            _note(report, f"response too long for {max_length} tokens", row.line)
            continue
        if len(prompt) > room:
            _note(report, f"prompt shortened to fit {max_length} tokens", row.line)
            start = prompt[:1] if prompt[0] == tokenizer.bos_token_id else []
            prompt = start + prompt[len(prompt) - room + len(start) :]
        encoded.append([prompt, *answers])
    return encoded, report


def _render(prompt: Conversation, tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template:
        return str(tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True))
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in prompt) + "\n\nAssistant:"


def _prompt_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    if tokenizer.chat_template:  # It writes its own BOS, if the model wants one.
        return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [bos + ids for ids in _plain_ids(texts, tokenizer)]


def _plain_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of text in which the name of a special token, such as "</s>", is only text."""
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """SentencePiece-like tokenizers put a space before the first word by themselves."""
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0]
    return first.startswith(("▁", "Ġ"))


def _prompt(row: dict[str, Any]) -> Conversation:
    if "instruction" in row:
        text = "\n\n".join(part for part in (row["instruction"].strip(), row["input"].strip()) if part)
        return ({"role": "user", "content": text},)
    return _turns(row["prompt"])


def _turns(text: str) -> Conversation:
    """The turns of a transcript that ends where the assistant is to speak; other text is one user turn."""
    text = "\n\n" + text.lstrip() if text.lstrip().startswith("Human:") else text
    if not text.startswith("\n\nHuman:"):
        return ({"role": "user", "content": text.strip()},)
    parts = TURN.split(text)[1:]
    turns = list(zip(parts[::2], (part.strip() for part in parts[1::2]), strict=True))
    if turns[-1] == ("Assistant", ""):
        turns.pop()
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple({"role": roles[speaker], "content": content} for speaker, content in turns)


def _content(prompt: Conversation) -> str:
    return "".join(turn["content"] for turn in prompt)


def _part_transcripts(row: dict[str, Any]) -> Comparison | str:
    """The comparison in two transcripts, or why there is none."""
    sides = row["chosen"], row["rejected"]
    for side in sides:
        speakers = TURN.findall(side)
        if "Assistant" not in speakers:
            return "no Assistant turn"
        if speakers[-1] == "Human":
            return "ends on a Human turn"
    if sides[0] == sides[1]:
        return "chosen and rejected are equal"
    (prompt, _, chosen), (other, _, rejected) = (side.rpartition("\n\nAssistant:") for side in sides)
    if prompt != other:
        return "prompts differ before the last reply"
    return _compare(_turns(prompt + "\n\nAssistant:"), chosen, rejected, row["line"])


def _part_fields(row: dict[str, Any]) -> Comparison | str:
    return _compare(_prompt(row), row["chosen"], row["rejected"], row["line"])


def _compare(prompt: Conversation, chosen: str, rejected: str, line: int) -> Comparison | str:
    chosen, rejected = chosen.strip(), rejected.strip()
    if not _content(prompt):
        return "empty prompt"
    if not chosen or not rejected:
        return "empty last reply"
    if chosen == rejected:
        return "chosen and rejected are equal"
    return Comparison(prompt, chosen, rejected, line)


def _style(path: str | Path, styles: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The first of `styles` whose fields the file's first row has."""
    _, first = next(_json_lines(path))
    for style in styles:
        if all(field in first for field in style):
            return style
    known = "; ".join(", ".join(style) for style in styles)
    raise UserError(f"{path}:1: fields {', '.join(first) or '(none)'}; known are: {known}")


def _load(path: str | Path, fields: Sequence[str], *, optional: Sequence[str]) -> Dataset:
    """The checked fields of every row, with its line number, as a `datasets` table.

    Checked before `datasets` sees them: its own reader names neither line nor field, and guesses types.
    """

    def text(row: dict[str, Any], line: int, field: str) -> str:
        if field not in row:
            raise UserError(f"{path}:{line}: field {field!r} is missing")
        if not isinstance(row[field], str):
            raise UserError(f"{path}:{line}: field {field!r} is {type(row[field]).__name__}, not text")
        return row[field]

    rows = []
    for line, row in _json_lines(path):
        rows.append({field: text(row, line, field) for field in fields} | {"line": line})
        rows[-1] |= {field: text({field: row.get(field) or ""}, line, field) for field in optional}
    return Dataset.from_list(rows)


def _json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of each line that is not blank."""
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        number = 0
        with gzip.open(path, "rb") if zipped else open(path, "rb") as file:
            for at, raw in enumerate(file, 1):
                if not raw.strip():
                    continue
                number = at
                try:
                    row = json.loads(raw.decode("utf-8-sig" if at == 1 else "utf-8"))
                except UnicodeDecodeError:
                    raise UserError(f"{path}:{at}: not UTF-8 text") from None
                except ValueError as error:
                    raise UserError(f"{path}:{at}: not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise UserError(f"{path}:{at}: a JSON {type(row).__name__}, not an object with fields")
                yield at, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged gzip file after line {number}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not number:
        raise UserError(f"{path}: the file has no rows")


def _some(path: str | Path, rows: list, report: Report) -> list:
    if not rows:
        reasons = ", ".join(f"{reason} ({len(lines)})" for reason, lines in report.items())
        raise UserError(f"{path}: no row can be used: {reasons}")
    return rows


def _note(report: Report, reason: str, line: int) -> None:
    report.setdefault(reason, []).append(line)
