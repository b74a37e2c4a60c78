"""Encoded comparisons and unpaired answers -> batches: packed, or one answer to a row."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax.batches import PackedRankings, Preferences, Rankings, Unpaired
from rlhf_jax.data.encode import EncodedRanking, EncodedUnpaired
from rlhf_jax.data.tokens import bucket, first_fit, lay, pad_sequences, size


def pad_rankings(rankings: Sequence[EncodedRanking], *, length: int, pad_id: int) -> Rankings:
    """One answer to a row; prompts with fewer answers than others get masked ones."""
    most = max(len(ranking.responses) for ranking in rankings)
    documents = []
    for ranking in rankings:
        missing = [((), ())] * (most - len(ranking.responses))
        documents += [*((ranking.prompt, response) for response in ranking.responses), *missing]
    ranks, mask = _ranks(rankings, most)
    return _host(Rankings, pad_sequences(documents, length=length, pad_id=pad_id), ranks, mask)


def pad_preferences(pairs: Sequence[EncodedRanking], *, length: int, pad_id: int) -> Preferences:
    """Pairs, one answer to a row. Raises ValueError when a ranking has not exactly two answers."""
    sides = []
    for rank in (0, 1):
        if any(sorted(pair.ranks) != [0, 1] for pair in pairs):
            raise ValueError("a ranking of more than two answers is not a pair")
        documents = [(pair.prompt, pair.responses[pair.ranks.index(rank)]) for pair in pairs]
        sides.append(pad_sequences(documents, length=length, pad_id=pad_id))
    return _host(Preferences, *sides, np.array([pair.margin for pair in pairs], np.float32))


def pack_rankings(
    rankings: Sequence[EncodedRanking],
    *,
    length: int,
    pad_id: int,
    prompts: int | None = None,
    answers: int | None = None,
) -> PackedRankings:
    """Several answers to a row of T = `length`, each a document with its prompt, for reward models and DPO.

    The number of rows is a power of two, so that batches of as many prompts have few shapes; `prompts` and `answers`
    fill P and K up to that many. Raises ValueError when a document is longer than `length`.
    """
    count = len(rankings) if prompts is None else prompts
    most = max(len(ranking.responses) for ranking in rankings) if answers is None else answers
    documents = [(ranking.prompt, response) for ranking in rankings for response in ranking.responses]
    numbers = [p * most + k for p, ranking in enumerate(rankings) for k in range(len(ranking.responses))]
    fitted = first_fit([size(document) for document in documents], length=length)
    fitted += [[]] * (bucket(len(fitted), smallest=1) - len(fitted))
    tokens = lay([[documents[i] for i in row] for row in fitted], length, pad_id)
    owner = np.full(tokens.mask.shape, count * most, np.int32)
    row, column = np.zeros((2, count, most), np.int32)
    for r, members in enumerate(fitted):
        at = 0
        for i in members:
            prompt, response = documents[i]
            start, end = at + len(prompt), at + len(prompt) + len(response)
            # Target t is input t + 1; as in `mask`, a document's first token is nobody's target.
            owner[r, max(start, at + 1) - 1 : end - 1] = numbers[i]
            row.flat[numbers[i]], column.flat[numbers[i]] = r, end - 1
            at = end
    ranks, mask = _ranks(rankings, most, count)
    margin = np.zeros(count, np.float32)
    margin[: len(rankings)] = [ranking.margin for ranking in rankings]
    return _host(PackedRankings, tokens, owner, row, column, ranks, mask, margin)


def stack_packed(batches: Sequence[PackedRankings]) -> PackedRankings:
    """Batches of as many prompts and answers as one, along a new first axis; empty rows make them of one length."""
    rows = max(len(batch.owner) for batch in batches)

    def longer(x: Any, value: int = 0) -> Any:
        return np.pad(x, [(0, rows - len(x)), (0, 0)], constant_values=value)

    padded = [
        batch._replace(tokens=jax.tree.map(longer, batch.tokens), owner=longer(batch.owner, batch.row.size))
        for batch in batches
    ]
    return jax.tree.map(lambda *arrays: np.stack(arrays), *padded)


def packed_logprobs(logprobs: Float[Array, "B T"], batch: PackedRankings) -> Float[Array, "P K"]:
    """log π(y|x) of every answer: the sum over its own tokens. Traceable; 0 for those that only fill the batch."""
    real = jnp.where(batch.tokens.mask, logprobs, 0.0)
    sums = jax.ops.segment_sum(real.reshape(-1), batch.owner.reshape(-1), num_segments=batch.row.size + 1)
    return sums[:-1].reshape(batch.row.shape)


def packed_rewards(values: Float[Array, "B T"], batch: PackedRankings) -> Float[Array, "P K"]:
    """The scalar head's value at every answer's last token. Traceable; 0 for those that only fill the batch."""
    return jnp.where(batch.mask, values[batch.row, batch.column], 0.0)


def pad_unpaired(rows: Sequence[EncodedUnpaired], *, longest: int, pad_id: int) -> Unpaired:
    """One answer to a row, padded to the bucket of the longest."""
    documents = [(row.prompt, row.response) for row in rows]
    length = bucket(max(map(size, documents)), longest=longest)
    tokens = pad_sequences(documents, length=length, pad_id=pad_id)
    return _host(Unpaired, tokens, np.array([row.good for row in rows]))


def _ranks(rankings: Sequence[EncodedRanking], most: int, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    ranks = np.zeros((count or len(rankings), most), np.int32)
    mask = np.zeros(ranks.shape, bool)
    for p, ranking in enumerate(rankings):
        ranks[p, : len(ranking.ranks)] = ranking.ranks
        mask[p, : len(ranking.ranks)] = True
    return ranks, mask


def _host(kind: Callable[..., Any], *arrays: Any) -> Any:
    """A batch that is still numpy: what flows between the parts is annotated as it is on the device."""
    return kind(*arrays)
