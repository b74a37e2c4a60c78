"""Rendered text -> token ids, as transformers has them, cut where what is given and what is learned meet.

Names of special tokens that people wrote are put behind shields before rendering, and are only text.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from rlhf_jax.data.conversations import Conversation
from rlhf_jax.data.tokenizer import PreTrainedTokenizerBase, backend

SHIELD, END = "\ufdd3", "\ufdd1"
Shields = dict[str, str]
"""A string that occurs nowhere -> the name of the special token that it stands for."""
Piece = tuple[int, int, int]
"""A token's id, and the characters that it is."""


def stretches(
    text: str, cuts: Sequence[int], tokenizer: PreTrainedTokenizerBase, shields: Shields, *, first: bool = True
) -> list[list[int]]:
    """Ids of the stretches of a text between its beginning, the cuts (ascending) and the last of them.

    They are the ids of the whole text, parted; where one token would reach over a cut, both sides are tokenised apart.
    `first` is False for text that other text stands before.
    """
    if first and not any(hidden in text for hidden in shields):
        clean = _parted(text, cuts, tokenizer)
        if clean is not None:
            return clean
    pieces = _pieces(text[: cuts[-1]], tokenizer, shields, first=first)
    parts: list[list[int]] = []
    at = number = 0
    for n, cut in enumerate(cuts):
        past = next((i for i in range(number, len(pieces)) if pieces[i][1] >= cut), len(pieces))
        over = next((i for i in range(number, past) if pieces[i][2] > cut), None)
        if over is not None:
            kept = pieces[number:over] if at else []  # the first stretch is what the model is given without the others
            last = _pieces(text[pieces[over][1] if at else 0 : cut], tokenizer, shields, first=first and not at)
            rest = [later - cut for later in cuts[n + 1 :]]
            after = stretches(text[cut:], rest, tokenizer, shields, first=False) if rest else []
            return [*parts, [i for i, _, _ in (*kept, *last)], *after]
        parts.append([i for i, _, _ in pieces[number:past]])
        at, number = cut, past
    return parts


def _parted(text: str, cuts: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[list[int]] | None:
    """The stretches where each cut falls between two tokens, by the tokenizer's own index; None where that is not so.

    It says the same as the pieces, in a third of the time. Of several tokens of one character the index has the first.
    """
    encoder = backend(tokenizer)
    if encoder is None:
        return None
    whole = encoder.encode(text[: cuts[-1]], add_special_tokens=False)
    ids, parts, at = whole.ids, [], 0
    for cut in cuts[:-1]:
        past = len(ids) if cut >= cuts[-1] else whole.char_to_token(cut)
        if past is None or (past < len(ids) and whole.token_to_chars(past)[0] < cut):
            return None
        if past > at and whole.token_to_chars(past - 1)[1] > cut:
            return None
        parts.append(ids[at:past])
        at = past
    return [*parts, ids[at:]]


def literal_ids(text: str, tokenizer: PreTrainedTokenizerBase, *, first: bool = True) -> list[int]:
    """Ids of text in which the name of a special token, such as "</s>", is only text."""
    return _encoded(text, tokenizer, first=first, split_special_tokens=True)["input_ids"]


def shield(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Conversation], Shields]:
    """Conversations in which names of special tokens are replaced by strings that occur nowhere, and what those mean.

    A "<|im_end|>" that a user wrote must not end the user's turn.
    """
    names = sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)
    turns = [turn for conversation in conversations for turn in conversation]
    if all(
        turn.keys() == {"role", "content"} and not any(name in turn["content"] for name in names) for turn in turns
    ):
        return list(conversations), {}
    whole = json.dumps(conversations, ensure_ascii=False, default=str)
    present = [name for name in names if json.dumps(name, ensure_ascii=False)[1:-1] in whole]
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
    return shielded, {hidden: name for name, hidden in shields.items()}


def _pieces(text: str, tokenizer: PreTrainedTokenizerBase, shields: Shields, *, first: bool) -> list[Piece]:
    found: list[Piece] = []
    at = 0
    pattern = "(" + "|".join(map(re.escape, shields)) + ")"
    for part in re.split(pattern, text) if any(hidden in text for hidden in shields) else [text]:
        start, at = at, at + len(part)
        if part in shields:
            found += [(i, start, at) for i in literal_ids(shields[part], tokenizer, first=first and not start)]
        elif part:
            whole = _encoded(part, tokenizer, first=first and not start)
            # Without offsets every part is one piece: then each stretch is tokenised apart.
            spans = whole.get("offset_mapping") or [(0, len(part))] * len(whole["input_ids"])
            found += [(i, start + a, start + b) for i, (a, b) in zip(whole["input_ids"], spans, strict=True)]
    return found


def _encoded(text: str, tokenizer: PreTrainedTokenizerBase, *, first: bool, **options: Any) -> dict[str, Any]:
    """Ids and, where the tokenizer has them, offsets; without the space that some put before a text's first word."""
    offsets = bool(getattr(tokenizer, "is_fast", False))
    options |= {"add_special_tokens": False, "verbose": False, "return_offsets_mapping": offsets}
    if not first and _adds_space(tokenizer):
        line, whole = tokenizer("\n", **options)["input_ids"], tokenizer("\n" + text, **options)
        if whole["input_ids"][: len(line)] == line:
            spans = [(a - 1, b - 1) for a, b in whole.get("offset_mapping", ())[len(line) :]]
            return {"input_ids": whole["input_ids"][len(line) :], "offset_mapping": spans}
    whole = tokenizer(text, **options)
    return {"input_ids": whole["input_ids"], "offset_mapping": whole.get("offset_mapping", ())}


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """SentencePiece-like tokenizers put a space before the first word by themselves."""
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0]
    return first.startswith(("▁", "Ġ"))
