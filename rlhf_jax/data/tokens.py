"""Token ids -> batches. The one place where the shift between inputs and targets happens."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from rlhf_jax.batches import Completions, Prompts, Tokens

Ids = Sequence[int]
Batch = TypeVar("Batch")


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


def pad_sequences(pairs: Sequence[tuple[Ids, Ids]], *, length: int, pad_id: int) -> Tokens:
    """(prompt, response) ids -> right-padded numpy `Tokens` of T = `length`.

    Masks come from lengths, so an EOS is learned also where it is the padding token.
    Raises ValueError when a pair is longer than `length`.
    """
    tokens = np.full((len(pairs), length + 1), pad_id, np.int32)
    real = np.zeros(tokens.shape, bool)
    response = np.zeros(tokens.shape, bool)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        if end > length:
            raise ValueError(f"sequence {row} has {end} tokens, more than the batch's length of {length}")
        tokens[row, :end] = [*prompt, *answer]
        real[row, :end] = True
        response[row, len(prompt) : end] = True
    positions = np.maximum(np.cumsum(real, axis=1, dtype=np.int32) - 1, 0)
    return _host(
        Tokens, tokens[:, :-1], tokens[:, 1:], response[:, 1:], positions[:, :-1], real[:, :-1].astype(np.int32)
    )


def pack_sequences(pairs: Sequence[tuple[Ids, Ids]], *, length: int, pad_id: int) -> Tokens:
    """(prompt, response) ids -> numpy `Tokens` of T = `length`, several documents to a row.

    First fit in the order given, over the last 64 open rows. Positions restart and segment ids count up with each
    document, so that nothing leaks from one into the next. Raises ValueError when a pair is longer than `length`.
    """
    rows: list[list[tuple[Ids, Ids]]] = []
    room: list[int] = []
    for number, (prompt, answer) in enumerate(pairs):
        size = len(prompt) + len(answer)
        if size > length:
            raise ValueError(f"sequence {number} has {size} tokens, more than the row's length of {length}")
        open_rows = range(max(0, len(rows) - 64), len(rows))
        row = next((r for r in open_rows if room[r] >= size), None)
        if row is None:
            rows.append([])
            room.append(length)
            row = len(rows) - 1
        rows[row].append((prompt, answer))
        room[row] -= size
    tokens = np.full((len(rows), length + 1), pad_id, np.int32)
    response = np.zeros(tokens.shape, bool)
    positions = np.zeros(tokens.shape, np.int32)
    segments = np.zeros(tokens.shape, np.int32)
    for row, documents in enumerate(rows):
        start = 0
        for segment, (prompt, answer) in enumerate(documents, 1):
            middle, end = start + len(prompt), start + len(prompt) + len(answer)
            tokens[row, start:end] = [*prompt, *answer]
            # The first token of a document is nobody's target: the input before it is another document's.
            response[row, max(middle, start + 1) : end] = True
            positions[row, start:end] = np.arange(end - start)
            segments[row, start:end] = segment
            start = end
    return _host(Tokens, tokens[:, :-1], tokens[:, 1:], response[:, 1:], positions[:, :-1], segments[:, :-1])


def pad_prompts(prompts: Sequence[Ids], *, length: int, pad_id: int) -> Prompts:
    """Prompt ids -> left-padded numpy `Prompts` [B, length]. Raises ValueError when one is longer."""
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, ids in enumerate(prompts):
        if len(ids) > length:
            raise ValueError(f"prompt {row} has {len(ids)} tokens, more than the batch's length of {length}")
        tokens[row, length - len(ids) :] = ids
        mask[row, length - len(ids) :] = True
    return _host(Prompts, tokens, mask, np.arange(len(prompts), dtype=np.int32))


def take(batch: Batch, rows: Any) -> Batch:
    """The given rows (indices or a slice) of every array in a pytree."""
    return jax.tree.map(lambda x: x[rows], batch)


def _host(kind: Callable[..., Batch], *arrays: np.ndarray) -> Batch:
    """A batch that is still numpy: what flows between the parts is annotated as it is on the device."""
    return kind(*arrays)
