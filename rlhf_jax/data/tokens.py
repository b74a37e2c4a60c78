"""Token ids -> batches. The one place where the shift between inputs and targets happens."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from rlhf_jax.batches import Completions, Prompts, Tokens

Ids = Sequence[int]
Document = Sequence[Ids]
"""Stretches of ids that are in turn given and learned: (prompt, response), or a conversation of several turns."""
Batch = TypeVar("Batch")

SMALLEST_BUCKET = 32


def shift(tokens: Int[Array, "B L"], real: Bool[Array, "B L"], response: Bool[Array, "B L"]) -> Tokens:
    """Inputs and targets of [B, L] token ids, L = T + 1, the last column being padding.

    `real` is False on padding, `response` True on what a model is to emit. Traceable.
    """
    positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    return Tokens(
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:],
        mask=response[:, 1:],
        positions=positions[:, :-1].astype(jnp.int32),
        segment_ids=real[:, :-1].astype(jnp.int32),
    )


def join(prompts: Prompts, completions: Completions, *, pad_id: int) -> Tokens:
    """Prompts and what was sampled after them, as sequences of T = P + N. Traceable; sampled ids are kept."""
    column = jnp.zeros_like(prompts.mask[:, :1])
    return shift(
        jnp.concatenate([prompts.tokens, completions.tokens, jnp.full_like(prompts.tokens[:, :1], pad_id)], 1),
        jnp.concatenate([prompts.mask, completions.mask, column], 1),
        jnp.concatenate([jnp.zeros_like(prompts.mask), completions.mask, column], 1),
    )


def pad_sequences(documents: Sequence[Document], *, length: int, pad_id: int) -> Tokens:
    """Documents -> right-padded numpy `Tokens` of T = `length`, one to a row.

    Masks come from lengths, so an EOS is learned also where it is the padding token.
    Raises ValueError when a document is longer than `length`.
    """
    for row, document in enumerate(documents):
        if size(document) > length:
            raise ValueError(f"sequence {row} has {size(document)} tokens, more than the batch's length of {length}")
    tokens = lay([[document] for document in documents], length, pad_id)
    positions = np.maximum(np.cumsum(tokens.segment_ids, axis=1, dtype=np.int32) - 1, 0)
    return host_batch(Tokens, tokens.inputs, tokens.targets, tokens.mask, positions, tokens.segment_ids)


def pack_sequences(documents: Sequence[Document], *, length: int, pad_id: int) -> Tokens:
    """Documents -> numpy `Tokens` of T = `length`, several to a row.

    Positions restart and segment ids count up with each document, so that nothing leaks from one into the next.
    Raises ValueError when a document is longer than `length`.
    """
    rows = first_fit([size(document) for document in documents], length=length)
    return lay([[documents[number] for number in row] for row in rows], length, pad_id)


def first_fit(sizes: Sequence[int], *, length: int) -> list[list[int]]:
    """Numbers of the documents that share each row: first fit in the order given, over the last 64 open rows.

    Raises ValueError when one is longer than `length`.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for number, needed in enumerate(sizes):
        if needed > length:
            raise ValueError(f"sequence {number} has {needed} tokens, more than the row's length of {length}")
        open_rows = range(max(0, len(rows) - 64), len(rows))
        row = next((r for r in open_rows if room[r] >= needed), None)
        if row is None:
            rows.append([])
            room.append(length)
            row = len(rows) - 1
        rows[row].append(number)
        room[row] -= needed
    return rows


def size(document: Document) -> int:
    """Tokens of a document."""
    return sum(map(len, document))


def bucket(needed: int, *, longest: int | None = None, smallest: int = SMALLEST_BUCKET) -> int:
    """The size to pad `needed` to: a power of two times `smallest`, at most `longest`.

    So batches of any lengths have few shapes, and a program is compiled at most once for each.
    Raises ValueError when `needed` is more than `longest`.
    """
    if longest is not None and needed > longest:
        raise ValueError(f"{needed} are more than {longest}")
    size = smallest
    while size < needed:
        size *= 2
    return size if longest is None else min(size, longest)


def lay(rows: Sequence[Sequence[Document]], length: int, pad_id: int) -> Tokens:
    """numpy `Tokens` of the documents of each row, one after the other."""
    tokens = np.full((len(rows), length + 1), pad_id, np.int32)
    learned = np.zeros(tokens.shape, bool)
    positions = np.zeros(tokens.shape, np.int32)
    segments = np.zeros(tokens.shape, np.int32)
    for row, documents in enumerate(rows):
        start = 0
        for segment, document in enumerate(documents, 1):
            at = start
            for number, ids in enumerate(document):
                tokens[row, at : at + len(ids)] = ids
                learned[row, at : at + len(ids)] = number % 2 == 1
                at += len(ids)
            # The first token of a document is nobody's target: the input before it is another document's.
            learned[row, start] = False
            positions[row, start:at] = np.arange(at - start)
            segments[row, start:at] = segment
            start = at
    return host_batch(Tokens, tokens[:, :-1], tokens[:, 1:], learned[:, 1:], positions[:, :-1], segments[:, :-1])


class LeftPadded:
    """Rows of ids as an array [N, length], padded on the left: what is asked for is made then, as numpy's array.

    `fill` is the padding; None stands for the array that says where there is none.
    """

    def __init__(self, rows: Sequence[Ids], length: int, fill: int | None):
        self._rows, self._fill = rows, fill
        self.shape = len(rows), length

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """The rows of these numbers, or of a slice. Raises ValueError for one longer than `length`."""
        numbers = np.arange(len(self))[rows]
        found = pad_prompts([self._rows[n] for n in numbers.reshape(-1)], length=self.shape[1], pad_id=self._fill or 0)
        array = found.mask if self._fill is None else found.tokens
        return np.asarray(array).reshape(*numbers.shape, self.shape[1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def padded_when_asked(prompts: Sequence[Ids], *, length: int, pad_id: int) -> Prompts:
    """`pad_prompts` of rows that are larger than memory: `take` makes the arrays of some."""
    tokens, mask = LeftPadded(prompts, length, pad_id), LeftPadded(prompts, length, None)
    return host_batch(Prompts, tokens, mask, np.arange(len(prompts), dtype=np.int32))


def pad_prompts(prompts: Sequence[Ids], *, length: int, pad_id: int, rows: Sequence[int] | None = None) -> Prompts:
    """Prompt ids -> left-padded numpy `Prompts` [B, length]. Raises ValueError when one is longer.

    `rows` are the numbers of their rows; counted from 0 unless given.
    """
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, ids in enumerate(prompts):
        if len(ids) > length:
            raise ValueError(f"prompt {row} has {len(ids)} tokens, more than the batch's length of {length}")
        tokens[row, length - len(ids) :] = ids
        mask[row, length - len(ids) :] = True
    numbers = np.asarray(range(len(prompts)) if rows is None else rows, np.int32)
    return host_batch(Prompts, tokens, mask, numbers)


def narrowed(prompts: Prompts, width: int | None = None) -> Prompts:
    """Left-padded prompts, as numpy arrays, without the columns before the last `width`.

    By default as wide as the longest of them needs, in few widths.
    """
    if width is None:
        width = bucket(int(prompts.mask.sum(axis=1).max()), longest=prompts.mask.shape[1])
    return host_batch(Prompts, prompts.tokens[:, -width:], prompts.mask[:, -width:], prompts.row)


def trimmed(completions: Completions) -> Completions:
    """Sampled answers, as numpy arrays, without the columns after the longest of them, in few widths."""
    longest = int(np.asarray(completions.mask).sum(axis=1).max())
    width = bucket(longest, longest=completions.mask.shape[1])
    return host_batch(Completions, *(np.asarray(x)[:, :width] for x in completions))


def take(batch: Batch, rows: Any) -> Batch:
    """The given rows (indices or a slice) of every array in a pytree."""
    return jax.tree.map(lambda x: x[rows], batch)


def host_batch(kind: Callable[..., Batch], *arrays: Any) -> Batch:
    """A batch whose arrays are still numpy; its annotations say what they are on the device."""
    return kind(*arrays)
