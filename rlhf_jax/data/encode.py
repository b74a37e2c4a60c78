"""Rows -> token ids. A conversation is rendered once, and parted where what is given and what is learned meet."""

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

from rlhf_jax.batches import LabelledAnswer, RankedAnswers
from rlhf_jax.data.chat import answer_spans, is_plain, render
from rlhf_jax.data.conversations import Conversation, turn_starts, without_oldest
from rlhf_jax.data.formats import EQUAL, Comparison, Demonstration, Prompt, Text, Unpaired
from rlhf_jax.data.pieces import Shields, literal_ids, shield, stretches
from rlhf_jax.data.rejects import BadRow, Rejects
from rlhf_jax.data.rendered import end_signs, header, is_own, refuse_rendered, without_stop
from rlhf_jax.data.rows import Read
from rlhf_jax.data.shown import left_out
from rlhf_jax.data.templates import Tools
from rlhf_jax.data.tokenizer import PreTrainedTokenizerBase, Steady
from rlhf_jax.errors import UserError

ENDED = "an answer ends in the sign of its end, which is learned once"
ENDLESS = "an answer before the last ends without a sign, and its end is not learned: the chat template has none"
TURNED = "chosen and rejected change places: the probability of chosen is below one half"
SPELLED = "names of special tokens are only text"


class Encoding(NamedTuple):
    """A row's ids, how many messages were left out to fit, and what is to be said of the row."""

    ids: Any
    dropped: int
    notes: tuple[str, ...] = ()


class _Encoded(NamedTuple):
    """An encoded conversation, the tokens that the model is given, the tokens of its longest last answer, and whether
    one of its answers has no end."""

    ids: Any
    given: int
    answer: int
    endless: bool = False
    shown: bool = False
    """Whether all of its messages are known to stand in the text."""

    @property
    def size(self) -> int:
        return self.given + self.answer


def encode(row: Any, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Any, int]:
    """The ids of `encode_row`, and how many messages were left out to fit `max_length` tokens."""
    ids, dropped, _ = encode_row(row, tokenizer, max_length)
    return ids, dropped


def encode_row(row: Any, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoding:
    """A row's ids, in at most `max_length` tokens, how many messages were left out for that, and notes for the run.

    Demonstrations and texts become a `Document`, comparisons `RankedAnswers`, unpaired rows a `LabelledAnswer`,
    prompts a list of ids. They are the ids that transformers' `apply_chat_template` gives; what is to be learned ends
    in EOS. BOS stands once.
    A conversation that is too long loses its oldest turns whole: the user's words and the answers to them, which are
    then not learned. The system message, the last turn and its answer stay as they are.
    Raises BadRow when those alone are too long, and where the chat template leaves a message out; UserError when the
    tokenizer has no EOS.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, so a model could not learn where a response ends")
    if isinstance(row, Text):
        return _encode_text(row, tokenizer, max_length)
    for conversation in (row.prompt, *_responses(row)):
        refuse_rendered(conversation, tokenizer)
    bare = [_bare(answer, tokenizer) for answer in _responses(row)]
    (prompt, *answers), shields = shield([row.prompt, *(answer for answer, _ in bare)], tokenizer)
    encode_whole, conversation = _prompt, prompt
    if isinstance(row, Demonstration):
        learned = row.learned or tuple(turn["role"] == "assistant" for turn in answers[0])
        encode_whole, conversation = partial(_demonstration, learned), (*prompt, *answers[0])
    elif not isinstance(row, Prompt):
        encode_whole = partial(_answers, answers)
    found, dropped = _fit(partial(encode_whole, tokenizer, shields, row.tools), conversation, max_length)
    notes = [ENDED] * any(ended for _, ended in bare) + [SPELLED] * bool(shields) + [ENDLESS] * found.endless
    notes += [TURNED] * (isinstance(row, Comparison) and row.turned)
    # An answer that is words alone was found in the text.
    looked_for = [answer for n, answer in enumerate(answers) if n == 0 or not all(map(is_plain, answer))] or [()]
    for answer in [] if found.shown and not dropped and not row.tools else looked_for:
        notes += left_out((*prompt, *answer), row.tools, partial(_show, tokenizer), _template(tokenizer, row.tools))
    return Encoding(_result(row, found.ids), dropped, tuple(dict.fromkeys(notes)))


def encode_rows(
    rows: Iterable[Read], tokenizer: PreTrainedTokenizerBase, max_length: int, rejects: Rejects
) -> Iterator[tuple[Read, Any]]:
    """(row, ids) of every row that can be used; `rejects` hears of the others, and of rows not used as they stand."""
    steady: Any = Steady(tokenizer)
    return settled(((read, outcome(read.row, steady, max_length)) for read in rows), rejects)


class Outcome(NamedTuple):
    """Everything that came of encoding a row: its ids and notes for the run, or why it cannot be used."""

    ids: Any = None
    notes: tuple[str, ...] = ()
    reason: str | None = None
    detail: str = ""


def outcome(row: Any, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Outcome:
    """Encodes a row, whatever comes of it. Raises UserError when the tokenizer has no EOS."""
    try:
        ids, dropped, notes = encode_row(row, tokenizer, max_length)
    except BadRow as error:
        return Outcome(reason=str(error), detail=error.detail)
    return Outcome(compact(ids), (*([shortened(max_length)] if dropped else []), *notes))


def settled(found: Iterable[tuple[Read, Outcome]], rejects: Rejects) -> Iterator[tuple[Read, Any]]:
    """(row, ids) of the rows that can be used; `rejects` hears of what is to be said of them and of the others."""
    for read, (ids, notes, reason, detail) in found:
        place = read.row.place
        if reason is not None:
            rejects.reject(place, reason, read.fields, detail=detail)
            continue
        for note in (*notes, *([read.note] if read.note else [])):
            rejects.note(place, note)
        rejects.use(place)
        yield read, ids


def compact(ids: Any) -> Any:
    """The ids of `encode_row`, with arrays of four bytes a token for its lists, which take eight and more."""
    if isinstance(ids, RankedAnswers):
        return ids._replace(prompt=array("i", ids.prompt), responses=[array("i", some) for some in ids.responses])
    if isinstance(ids, LabelledAnswer):
        return ids._replace(prompt=array("i", ids.prompt), response=array("i", ids.response))
    return tuple(array("i", some) for some in ids) if isinstance(ids, tuple) else array("i", ids)


def shortened(max_length: int) -> str:
    """A note for the run about rows that lost turns to fit `max_length` tokens."""
    return f"prompt shortened by whole turns to fit {max_length} tokens"


def encode_windows(
    text: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[tuple[list[int], list[int]]]:
    """A text in windows of at most `max_length` tokens: (ids that are only read, ids that are predicted).

    Each window begins with BOS. Where the tokenizer has none, a window's first token is only read.
    """
    ids = literal_ids(text, tokenizer)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    size = max_length - len(bos)
    windows = [bos + ids[start : start + size] for start in range(0, len(ids), size)]
    return [(window[:1], window[1:]) for window in windows if len(window) > 1]


def _responses(row: Any) -> tuple[Conversation, ...]:
    if isinstance(row, Prompt):
        return ()
    return row.responses if isinstance(row, Comparison) else (row.response,)


def _result(row: Any, ids: Any) -> Any:
    if isinstance(row, Unpaired):
        return LabelledAnswer(ids[0], ids[1][0], row.good)
    if not isinstance(row, Comparison):
        return ids
    given, responses = ids
    ranked = list(zip(responses, row.ranks, strict=True))
    if any(a == b and i != j for k, (a, i) in enumerate(ranked) for b, j in ranked[:k]):
        raise BadRow(EQUAL)  # the words differ in what the chat template does not show
    doubt = 0.0 if row.probability is None else 1.0 - row.probability
    return RankedAnswers(given, responses, row.ranks, row.margin, doubt)


def _bare(answer: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[Conversation, bool]:
    """The messages of an answer without signs of the end that its writer put there, and whether there were any."""
    turns = [without_stop(turn, tokenizer) if turn["role"] == "assistant" else (turn, False) for turn in answer]
    return tuple(turn for turn, _ in turns), any(ended for _, ended in turns)


def _show(tokenizer: PreTrainedTokenizerBase, conversation: Sequence[dict[str, Any]], tools: Tools) -> str:
    asks = conversation[-1]["role"] != "assistant"
    return render(conversation, tokenizer, tools=tools, add_generation_prompt=asks)


def _template(tokenizer: PreTrainedTokenizerBase, tools: Tools) -> str:
    return tokenizer.get_chat_template(tools=list(tools) if tools else None) if tokenizer.chat_template else ""


def _fit(
    encode_whole: Callable[[Conversation], _Encoded], conversation: Conversation, max_length: int
) -> tuple[_Encoded, int]:
    """The conversation without its oldest turns, as many as it takes to fit; and how many messages were dropped.

    It is rendered again for each try, for only the template knows what it writes; the tries are bisected.
    """
    whole = encode_whole(conversation)
    if whole.size <= max_length:
        return whole, 0
    starts = turn_starts(conversation)
    tried = cache(lambda number: encode_whole(without_oldest(conversation, starts[number])))
    number = bisect_left(range(len(starts)), True, key=lambda number: tried(number).size <= max_length)
    if number < len(starts):
        return tried(number), len(conversation) - len(without_oldest(conversation, starts[number]))
    last = tried(number - 1) if starts else whole
    if last.answer > last.given:
        raise BadRow(f"response too long for {max_length} tokens", f"it has {last.answer}, its turn {last.given}")
    beside = f", its answer {last.answer}" if last.answer else ""
    raise BadRow(f"prompt too long for {max_length} tokens", f"its last turn alone has {last.given}{beside}")


def _prompt(
    tokenizer: PreTrainedTokenizerBase, shields: Shields, tools: Tools, conversation: Conversation
) -> _Encoded:
    text = render(conversation, tokenizer, tools=tools, add_generation_prompt=True)
    ids = _begun(text, [len(text)], tokenizer, shields)[0]
    return _Encoded(ids, len(ids), 0)


def _demonstration(
    learned: Sequence[bool],
    tokenizer: PreTrainedTokenizerBase,
    shields: Shields,
    tools: Tools,
    conversation: Conversation,
) -> _Encoded:
    """A `Document` of the conversation up to the last message that is to be learned.

    `learned` says it of the last messages; an answer before them, or one that is not, is context.
    """
    found = answer_spans(conversation, tokenizer, tools=tools)
    # Counted from the end, for the oldest turns may be gone.
    marks = zip(reversed(range(len(conversation))), reversed(learned), strict=False)
    wanted = sorted(number for number, learn in marks if learn and conversation[number]["role"] == "assistant")
    if not wanted:  # those that were to be learned had to go
        raise BadRow("the answers that are to be learned are too long ago to fit")
    cuts = [cut for number in wanted for cut in found.spans[number]]
    document = _begun(found.text, cuts, tokenizer, shields)
    document[-1] = _ended(document[-1], tokenizer)
    endless = any(number in found.endless for number in wanted[:-1])
    return _Encoded(tuple(document), sum(map(len, document[:-1])), len(document[-1]), endless, found.shown)


def _answers(
    answers: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    shields: Shields,
    tools: Tools,
    prompt: Conversation,
) -> _Encoded:
    """One prompt's ids for all of its answers: where they render it differently there is no comparison."""
    found, shown = [], True
    for answer in answers:
        if len(answer) != 1:
            raise BadRow("an answer of more than one message")
        whole = answer_spans((*prompt, *answer), tokenizer, tools=tools, last=True)
        found.append((whole.text, *whole.spans[len(prompt)]))
        shown = shown and whole.shown
    # A template may give one answer more than another (an empty thought): what all are given is the prompt.
    cut = min(start for _, start, _ in found)
    text = found[0][0][:cut]
    if any(other[:cut] != text for other, _, _ in found):
        raise BadRow("the chat template writes the prompt differently for each answer")
    given = _begun(text, [cut], tokenizer, shields)[0]
    # From a special token on, a text is tokenised by itself.
    at = max(0, *(text.rfind(name) for name in tokenizer.all_special_tokens if name))
    responses = []
    for text, _, end in found:
        _, response = stretches(text[at:], [cut - at, end - at], tokenizer, shields)
        responses.append(_ended(response, tokenizer))
    return _Encoded((given, responses), len(given), max(map(len, responses)), shown=shown)


def _encode_text(row: Text, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoding:
    """A BOS is given, everything else is learned. A text is not cut: its end is as good as its beginning.

    Text that the chat template has written keeps its special tokens. In other text only a BOS at its beginning and an
    EOS at its end are those tokens.
    """
    text, notes = row.text, []
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    sign = header(text, tokenizer, anywhere=True)
    if sign is not None:
        if not is_own(sign, tokenizer):
            raise BadRow(f"the text is rendered by another chat template: the tokenizer does not know {sign!r}")
        kept = text.rstrip() if text.rstrip().endswith(end_signs(tokenizer)) else text
        ids, bos = stretches(kept, [len(kept)], tokenizer, {})[0], bos if not tokenizer.chat_template else []
        bos = [] if ids[:1] == bos else bos
    else:
        if bos and text.startswith(tokenizer.bos_token):
            text = text.removeprefix(tokenizer.bos_token)
        if text.rstrip().endswith(tokenizer.eos_token):
            text = text.rstrip().removesuffix(tokenizer.eos_token)
        notes = [SPELLED] if any(name and name in text for name in tokenizer.all_special_tokens) else []
        if not text.strip():
            raise BadRow("empty text")
        ids = literal_ids(text, tokenizer)
    ids = _ended(ids, tokenizer)
    if len(bos) + len(ids) > max_length:
        raise BadRow(f"text too long for {max_length} tokens")
    return Encoding((bos, ids), 0, tuple(notes))


def _begun(text: str, cuts: Sequence[int], tokenizer: PreTrainedTokenizerBase, shields: Shields) -> list[list[int]]:
    """Ids of a text's stretches. A chat template writes its own BOS, if the model wants one."""
    first, *others = stretches(text, cuts, tokenizer, shields)
    bos = [] if tokenizer.chat_template or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [[*bos, *first], *others]


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """With an EOS at the end, if the template did not write one."""
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]
