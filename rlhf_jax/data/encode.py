"""Rows -> token ids. A conversation is rendered once; given and learned stretches of it are tokenised apart."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf_jax.data.chat import Tools, answer_spans, render
from rlhf_jax.data.conversations import Conversation
from rlhf_jax.data.formats import Comparison, Demonstration, Prompt, Text, Unpaired
from rlhf_jax.data.rejects import BadRow, Rejects
from rlhf_jax.data.rows import Read
from rlhf_jax.data.tokens import Document
from rlhf_jax.errors import UserError

SHIELD, END = "\ufdd3", "\ufdd1"


class EncodedRanking(NamedTuple):
    """Ids of a prompt and of its answers, each of which ends in EOS."""

    prompt: list[int]
    responses: list[list[int]]
    ranks: tuple[int, ...]
    margin: float


class EncodedUnpaired(NamedTuple):
    """Ids of a prompt and of an answer that was found good or not."""

    prompt: list[int]
    response: list[int]
    good: bool


def encode(row: Any, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Any, int]:
    """A row's ids, in at most `max_length` tokens, and how many tokens were cut from its prompt's beginning.

    Demonstrations and texts become a `Document`, comparisons an `EncodedRanking`, unpaired rows an
    `EncodedUnpaired`, prompts a list of ids. What is to be learned ends in EOS; BOS stands once. Too long a prompt
    loses its beginning (a BOS stays), but keeps at least `max_length` // 4 tokens: an answer, which is never cut,
    raises BadRow when it leaves less.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, so a model could not learn where a response ends")
    if isinstance(row, Text):
        return _encode_text(row, tokenizer, max_length)
    if isinstance(row, Prompt):
        ids = encode_prompt(row.prompt, tokenizer, tools=row.tools)
        return _shorten(ids, max_length, tokenizer)
    if isinstance(row, Demonstration):
        return _encode_demonstration(row, tokenizer, max_length)
    answers = row.responses if isinstance(row, Comparison) else (row.response,)
    prompt, responses = _encode_answers(row.prompt, answers, tokenizer, row.tools)
    room = _room(prompt, max(map(len, responses)), max_length)
    prompt, cut = _shorten(prompt, room, tokenizer)
    if isinstance(row, Unpaired):
        return EncodedUnpaired(prompt, responses[0], row.good), cut
    return EncodedRanking(prompt, responses, row.ranks, row.margin), cut


def encode_rows(
    rows: Iterable[Read], tokenizer: PreTrainedTokenizerBase, max_length: int, rejects: Rejects
) -> Iterator[tuple[Read, Any]]:
    """(row, ids) of every row that can be used; `rejects` hears of the others, and of prompts made shorter."""
    for read in rows:
        place = read.row.place
        try:
            ids, cut = encode(read.row, tokenizer, max_length)
        except BadRow as error:
            rejects.reject(place, str(error), read.fields)
            continue
        if cut:
            rejects.note(place, f"prompt shortened to fit {max_length} tokens")
        rejects.use(place)
        yield read, ids


def encode_prompt(prompt: Conversation, tokenizer: PreTrainedTokenizerBase, *, tools: Tools = None) -> list[int]:
    """Token ids up to where the assistant begins; BOS once, where the tokenizer has one."""
    (prompt,), shielded = _shield([prompt], tokenizer)
    text = render(prompt, tokenizer, tools=tools, add_generation_prompt=True).text
    return _first_ids(text, tokenizer, shielded)


def _encode_demonstration(
    row: Demonstration, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Document, int]:
    (prompt, response), shielded = _shield([row.prompt, row.response], tokenizer)
    text, spans = answer_spans((*prompt, *response), tokenizer, tools=row.tools)
    document: list[list[int]] = []
    at = 0
    for number, (start, end) in sorted(spans.items()):
        if number < len(prompt):
            continue  # An answer of the prompt is context.
        document.append(
            _ids(text[at:start], tokenizer, shielded) if at else _first_ids(text[:start], tokenizer, shielded)
        )
        document.append(_answer_ids(text[start:end], tokenizer, shielded))
        at = end
    document[-1] = _ended(document[-1], tokenizer)
    return _shorten_document(document, max_length, tokenizer)


def _encode_answers(
    prompt: Conversation, answers: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, tools: Tools
) -> tuple[list[int], list[list[int]]]:
    """One prompt's ids for all of its answers: where they render it differently there is no comparison."""
    (prompt, *answers), shielded = _shield([prompt, *answers], tokenizer)
    found = []
    for answer in answers:
        if len(answer) != 1:
            raise BadRow("an answer of more than one message")
        text, spans = answer_spans((*prompt, *answer), tokenizer, tools=tools)
        found.append((text, *spans[len(prompt)]))
    # A template may give one answer more than another (an empty thought): what all are given is the prompt.
    cut = min(start for _, start, _ in found)
    given = found[0][0][:cut]
    if any(text[:cut] != given for text, _, _ in found):
        raise BadRow("the chat template writes the prompt differently for each answer")
    responses = [_ended(_answer_ids(text[cut:end], tokenizer, shielded), tokenizer) for text, _, end in found]
    return _first_ids(given, tokenizer, shielded), responses


def _encode_text(row: Text, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Document, int]:
    """A BOS is given, everything else is learned. A text is not cut: its end is as good as its beginning."""
    ids = _ended(_literal_ids(row.text, tokenizer), tokenizer)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if len(bos) + len(ids) > max_length:
        raise BadRow(f"text too long for {max_length} tokens")
    return (bos, ids), 0


def _room(prompt: Sequence[int], longest: int, max_length: int) -> int:
    room = max_length - longest
    if room < min(len(prompt), max_length // 4):
        raise BadRow(f"response too long for {max_length} tokens")
    return room


def _shorten(ids: list[int], room: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """The end of a prompt, with its BOS; and how many tokens that leaves out."""
    if len(ids) <= room:
        return ids, 0
    start = ids[:1] if room and ids[0] == tokenizer.bos_token_id else []
    return start + ids[len(ids) - room + len(start) :], len(ids) - room


def _shorten_document(
    document: list[list[int]], max_length: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[Document, int]:
    """Everything before the last answer is its prompt. An earlier answer that is cut is no longer learned."""
    before = [(i % 2 == 1, ids) for i, ids in enumerate(document[:-1])]
    length = sum(len(ids) for _, ids in before)
    room = _room([0] * length, len(document[-1]), max_length)
    if length <= room:
        return tuple(document), 0
    bos = document[0][:1] == [tokenizer.bos_token_id]
    drop = length - room + bos
    given: list[int] = document[0][:1] if bos else []
    rest: list[list[int]] = []
    for learned, ids in before:
        kept = ids[min(drop, len(ids)) :]
        if drop > 0:
            given = given + kept
            drop -= len(ids) - len(kept)
        elif learned and not rest:
            rest += [kept]
        elif not learned and not rest:
            given = given + kept
        else:
            rest += [kept]
    return (given, *rest, document[-1]), length - room


def _first_ids(text: str, tokenizer: PreTrainedTokenizerBase, shielded: dict[str, str]) -> list[int]:
    """Ids of what a sequence begins with. A chat template writes its own BOS, if the model wants one."""
    ids = _ids(text, tokenizer, shielded)
    if tokenizer.chat_template or tokenizer.bos_token_id is None:
        return ids
    return [tokenizer.bos_token_id, *ids]


def _answer_ids(text: str, tokenizer: PreTrainedTokenizerBase, shielded: dict[str, str]) -> list[int]:
    return _ids(text[1:] if text.startswith(" ") and _adds_space(tokenizer) else text, tokenizer, shielded)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, shielded: dict[str, str]) -> list[int]:
    """Ids of rendered text: special tokens are the template's, those that people wrote were put behind a shield."""
    if not any(shield in text for shield in shielded):
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids: list[int] = []
    for part in re.split("(" + "|".join(map(re.escape, shielded)) + ")", text):
        if part in shielded:
            ids += _literal_ids(shielded[part], tokenizer)
        elif part:
            ids += tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _literal_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of text in which the name of a special token, such as "</s>", is only text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """With an EOS at the end, if the template did not write one."""
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def _shield(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Conversation], dict[str, str]]:
    """Conversations in which names of special tokens are replaced by strings that occur nowhere, and what those mean.

    A "<|im_end|>" that a user wrote must not end the user's turn.
    """
    names = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
    whole = json.dumps(conversations, ensure_ascii=False, default=str)
    present = [name for name in names if name and json.dumps(name, ensure_ascii=False)[1:-1] in whole]
    if not present:
        return list(conversations), {}
    nonce = hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    shields = {name: f"{SHIELD}{nonce}.{number}{END}" for number, name in enumerate(present)}
    pattern = re.compile("|".join(map(re.escape, present)))

    def replace(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda found: shields[found[0]], value)
        if isinstance(value, dict):
            return {key: item if key == "role" else replace(item) for key, item in value.items()}
        return [replace(item) for item in value] if isinstance(value, list) else value

    shielded = [tuple(replace(turn) for turn in conversation) for conversation in conversations]
    return shielded, {shield: name for name, shield in shields.items()}


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """SentencePiece-like tokenizers put a space before the first word by themselves."""
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0]
    return first.startswith(("▁", "Ġ"))
