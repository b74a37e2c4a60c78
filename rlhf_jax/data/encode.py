"""Rows -> token ids. A conversation is rendered once; given and learned stretches of it are tokenised apart."""

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from rlhf_jax.batches import LabelledAnswer, RankedAnswers
from rlhf_jax.data.chat import Tools, answer_spans, render
from rlhf_jax.data.conversations import Conversation, turn_starts, without_oldest
from rlhf_jax.data.formats import Comparison, Demonstration, Prompt, Text, Unpaired
from rlhf_jax.data.rejects import BadRow, Rejects
from rlhf_jax.data.rows import Read
from rlhf_jax.data.tokenizer import PreTrainedTokenizerBase
from rlhf_jax.data.tokens import Document
from rlhf_jax.errors import UserError

SHIELD, END = "\ufdd3", "\ufdd1"


class _Encoded(NamedTuple):
    """An encoded conversation, the tokens that the model is given, and the tokens of its longest last answer."""

    ids: Any
    given: int
    answer: int


def encode(row: Any, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Any, int]:
    """A row's ids, in at most `max_length` tokens, and how many messages were left out for that.

    Demonstrations and texts become a `Document`, comparisons `RankedAnswers`, unpaired rows a `LabelledAnswer`,
    prompts a list of ids. What is to be learned ends in EOS; BOS stands once.
    A conversation that is too long loses its oldest turns whole: the user's words and the answers to them, which are
    then not learned. The system message, the last turn and its answer stay as they are.
    Raises BadRow when those alone are too long, and UserError when the tokenizer has no EOS.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, so a model could not learn where a response ends")
    if isinstance(row, Text):
        return _encode_text(row, tokenizer, max_length), 0
    if isinstance(row, Prompt):
        (prompt,), shielded = _shield([row.prompt], tokenizer)
        return _fit(partial(_prompt, tokenizer, shielded, row.tools), prompt, max_length)
    if isinstance(row, Demonstration):
        (prompt, response), shielded = _shield([row.prompt, row.response], tokenizer)
        learn = partial(_demonstration, tokenizer, shielded, row.tools, len(response))
        return _fit(learn, (*prompt, *response), max_length)
    (prompt, *answers), shielded = _shield([row.prompt, *_responses(row)], tokenizer)
    (given, responses), dropped = _fit(partial(_answers, tokenizer, shielded, row.tools, answers), prompt, max_length)
    if isinstance(row, Unpaired):
        return LabelledAnswer(given, responses[0], row.good), dropped
    return RankedAnswers(given, responses, row.ranks, row.margin), dropped


def encode_rows(
    rows: Iterable[Read], tokenizer: PreTrainedTokenizerBase, max_length: int, rejects: Rejects
) -> Iterator[tuple[Read, Any]]:
    """(row, ids) of every row that can be used; `rejects` hears of the others, and of prompts made shorter."""
    for read in rows:
        place = read.row.place
        try:
            ids, dropped = encode(read.row, tokenizer, max_length)
        except BadRow as error:
            rejects.reject(place, str(error), read.fields, detail=error.detail)
            continue
        if dropped:
            rejects.note(place, shortened(max_length))
        rejects.use(place)
        yield read, ids


def shortened(max_length: int) -> str:
    """A note for the run about rows that lost turns to fit `max_length` tokens."""
    return f"prompt shortened by whole turns to fit {max_length} tokens"


def encode_windows(
    text: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[tuple[list[int], list[int]]]:
    """A text in windows of at most `max_length` tokens: (ids that are only read, ids that are predicted).

    Each window begins with BOS. Where the tokenizer has none, a window's first token is only read.
    """
    ids = _literal_ids(text, tokenizer)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    size = max_length - len(bos)
    windows = [bos + ids[start : start + size] for start in range(0, len(ids), size)]
    return [(window[:1], window[1:]) for window in windows if len(window) > 1]


def _responses(row: Comparison | Unpaired) -> tuple[Conversation, ...]:
    return row.responses if isinstance(row, Comparison) else (row.response,)


def _fit(
    encode_whole: Callable[[Conversation], _Encoded], conversation: Conversation, max_length: int
) -> tuple[Any, int]:
    """The conversation without its oldest turns, as many as it takes to fit; and how many messages were dropped.

    It is rendered again for each try, for only the template knows what it writes; the tries are bisected.
    """
    whole = encode_whole(conversation)
    if whole.given + whole.answer <= max_length:
        return whole.ids, 0
    starts = turn_starts(conversation)
    tried: dict[int, _Encoded] = {}

    def fits(number: int) -> bool:
        tried[number] = encode_whole(without_oldest(conversation, starts[number]))
        return tried[number].given + tried[number].answer <= max_length

    number = bisect_left(range(len(starts)), True, key=fits)
    if number < len(starts):
        return tried[number].ids, len(conversation) - len(without_oldest(conversation, starts[number]))
    last = tried[number - 1] if starts else whole
    if last.answer > last.given:
        raise BadRow(f"response too long for {max_length} tokens", f"it has {last.answer}, its turn {last.given}")
    beside = f", its answer {last.answer}" if last.answer else ""
    raise BadRow(f"prompt too long for {max_length} tokens", f"its last turn alone has {last.given}{beside}")


def _prompt(
    tokenizer: PreTrainedTokenizerBase, shielded: dict[str, str], tools: Tools, conversation: Conversation
) -> _Encoded:
    text = render(conversation, tokenizer, tools=tools, add_generation_prompt=True).text
    ids = _first_ids(text, tokenizer, shielded)
    return _Encoded(ids, len(ids), 0)


def _demonstration(
    tokenizer: PreTrainedTokenizerBase,
    shielded: dict[str, str],
    tools: Tools,
    learned: int,
    conversation: Conversation,
) -> _Encoded:
    """A `Document` of the conversation; the answers among its last `learned` messages are to be learned."""
    text, spans = answer_spans(conversation, tokenizer, tools=tools)
    document: list[list[int]] = []
    at = 0
    for number, (start, end) in sorted(spans.items()):
        if number < len(conversation) - learned:
            continue  # An answer of the prompt is context.
        document.append(
            _ids(text[at:start], tokenizer, shielded) if at else _first_ids(text[:start], tokenizer, shielded)
        )
        document.append(_answer_ids(text[start:end], tokenizer, shielded))
        at = end
    document[-1] = _ended(document[-1], tokenizer)
    return _Encoded(tuple(document), sum(map(len, document[:-1])), len(document[-1]))


def _answers(
    tokenizer: PreTrainedTokenizerBase,
    shielded: dict[str, str],
    tools: Tools,
    answers: Sequence[Conversation],
    prompt: Conversation,
) -> _Encoded:
    """One prompt's ids for all of its answers: where they render it differently there is no comparison."""
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
    ids = _first_ids(given, tokenizer, shielded)
    return _Encoded((ids, responses), len(ids), max(map(len, responses)))


def _encode_text(row: Text, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Document:
    """A BOS is given, everything else is learned. A text is not cut: its end is as good as its beginning."""
    ids = _ended(_literal_ids(row.text, tokenizer), tokenizer)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if len(bos) + len(ids) > max_length:
        raise BadRow(f"text too long for {max_length} tokens")
    return bos, ids


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
