"""A few tokens and their mask, for people to look at before a run learns from them."""

from collections.abc import Sequence

import numpy as np
from rich.text import Text

from rlhf_jax.batches import Tokens
from rlhf_jax.data.tokenizer import PreTrainedTokenizerBase

GIVEN, LEARNED = 60, 100
"""Tokens that are shown before the first learned one, and from there on."""
STYLES = {True: ("black on green", "black on bright_green"), False: ("dim", "dim underline")}


def sample(tokens: Tokens, tokenizer: PreTrainedTokenizerBase, *, colour: bool, row: int = 0) -> Text:
    """The first document of a row, token by token; what is learned is coloured, or in [[brackets]] without colour."""
    document = np.asarray(tokens.segment_ids[row]) == 1
    ids = np.asarray(tokens.inputs[row])[document].tolist()
    # The mask is aligned with targets: one column ahead of the inputs.
    learned = np.concatenate([[False], np.asarray(tokens.mask[row])[:-1]])[document].tolist()
    first = learned.index(True) if True in learned else 0
    start = max(0, first - GIVEN)
    shown = slice(start, first + LEARNED)
    text = marked([piece(i, tokenizer) for i in ids[shown]], learned[shown], colour=colour)
    before, after = ("… " if start else ""), (" …" if len(ids) > first + LEARNED else "")
    return Text.assemble(before, text, after)


def marked(pieces: Sequence[str], learned: Sequence[bool], *, colour: bool) -> Text:
    """Tokens and their mask: two shades in turn, or "given|tokens[[learned|tokens]]"."""
    text = Text()
    for number, (word, learn) in enumerate(zip(pieces, learned, strict=True)):
        before = number > 0 and learned[number - 1]
        if colour:
            text.append(word, style=STYLES[bool(learn)][number % 2])
            continue
        if learn and not before:
            text.append("[[")
        elif before and not learn:
            text.append("]]")
        elif number:
            text.append("|")
        text.append(word)
    if not colour and len(learned) and learned[-1]:
        text.append("]]")
    return text


def piece(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of one token; characters that no terminal should be sent are escaped."""
    word = str(tokenizer.decode([token]))
    if str(tokenizer.convert_ids_to_tokens(token)).startswith("▁") and not word.startswith(" "):
        word = " " + word
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in word)
