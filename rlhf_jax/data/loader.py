"""Documents -> packed batches through grain: shuffled, shared out among hosts, and resumed at the exact example.

batches = document_batches([documents], batch_size=8, length=512, pad_id=0, seed=0)
tokens = next(batches)
state = batches.get_state()          # a JSON value; batches.set_state(state) goes on from there
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from rlhf_jax.batches import Tokens
from rlhf_jax.data.tokens import Document
from rlhf_jax.errors import UserError

if TYPE_CHECKING:
    import grain

    from rlhf_jax.data.iterators import Open

Part = TypeVar("Part")
Shard = tuple[int, int]
"""(number of this host, number of hosts)."""


def document_batches(
    sources: Sequence[Sequence[Document]],
    *,
    batch_size: int,
    length: int,
    pad_id: int,
    seed: int,
    weights: Sequence[float] | None = None,
    shard: Shard = (0, 1),
) -> "grain.DatasetIterator[Tokens]":
    """Endless `Tokens` [batch_size, length] of documents in memory, reshuffled in every epoch.

    Several sources are mixed by `weights` (by default as large as they are), each in epochs of its own. Every
    host sees its share of each epoch, and all of them together see each document once. Raises UserError when a source
    has fewer documents than there are hosts, and unless `weights` has one number above 0 for each source.
    """
    import grain

    from rlhf_jax.data.iterators import Packs

    index, count = shard
    mixed = []
    for number, documents in enumerate(sources):
        if len(documents) < count:
            raise UserError(f"{len(documents)} documents are too few for {count} hosts")
        shuffled = grain.MapDataset.source(documents).shuffle(seed=_seed(seed, number))
        mixed.append(shuffled[index::count].repeat())
    weights = check_weights([float(len(documents)) for documents in sources] if weights is None else weights, sources)
    everything = mixed[0] if len(mixed) == 1 else grain.MapDataset.mix(mixed, weights=weights)
    one = grain.ReadOptions(num_threads=1, prefetch_buffer_size=64)
    return iter(Packs(everything.to_iter_dataset(one), batch_size, length, pad_id))


def streamed_batches(
    sources: "Sequence[Open]",
    *,
    batch_size: int,
    length: int,
    pad_id: int,
    seed: int,
    weights: Sequence[float] | None = None,
    shard: Shard = (0, 1),
    window: int = 1024,
) -> "grain.DatasetIterator[Tokens]":
    """Endless `Tokens` of sources that are not in memory: shuffled within a window of so many rows, and read again and
    again, in passes that each have an order of files.

    In all else it is `document_batches`. A source gives a host its share of each pass. Raises
    UserError unless `weights` has one number above 0 for each source; the iterator raises one when a source has no row
    that can be used.
    """
    from rlhf_jax.data.iterators import Packs

    rows = _streamed_rows(sources, seed, weights, shard, window)
    return iter(Packs(rows, batch_size, length, pad_id))


def streamed_parts(
    sources: "Sequence[Open]",
    lay: Callable[[Sequence[Any]], Part],
    *,
    batch_size: int,
    seed: int,
    weights: Sequence[float] | None = None,
    window: int = 1024,
) -> "grain.DatasetIterator[Part]":
    """Endless lay(rows) of so many rows of sources that are not in memory, in the order of `streamed_batches`.

    Every host reads all of them. Raises UserError as `streamed_batches`.
    """
    return iter(_streamed_rows(sources, seed, weights, (0, 1), window).batch(batch_size, batch_fn=lay))


def _streamed_rows(
    sources: "Sequence[Open]", seed: int, weights: Sequence[float] | None, shard: Shard, window: int
) -> "grain.IterDataset[Any]":
    """The rows of all sources, each shuffled within a window, mixed."""
    import grain
    from grain.experimental import ThreadPrefetchIterDataset, WindowShuffleIterDataset

    from rlhf_jax.data.iterators import Rows

    # A thread reads the next window while this one is learned, so that no step waits for a whole window.
    ahead = [ThreadPrefetchIterDataset(Rows(one, shard, _seed(seed, number)), prefetch_buffer_size=window)
             for number, one in enumerate(sources)]  # fmt: skip
    mixed = [
        WindowShuffleIterDataset(rows, window_size=window, seed=_seed(seed, number))
        for number, rows in enumerate(ahead)
    ]
    weights = check_weights(weights, sources)
    return mixed[0] if len(mixed) == 1 else grain.IterDataset.mix(mixed, weights=weights)


def mix_once(sources: Sequence[Sequence[Any]], weights: Sequence[float], *, seed: int) -> list[Any]:
    """The most elements that can be had in these proportions without repeating one, each source shuffled.

    Raises UserError unless `weights` has one number above 0 for each source.
    """
    import grain

    shuffled = [
        grain.MapDataset.source(elements).shuffle(seed=_seed(seed, number)) for number, elements in enumerate(sources)
    ]
    return list(grain.MapDataset.mix(shuffled, weights=check_weights(weights, sources)))


def _seed(seed: int, number: int) -> int:
    return int(np.random.default_rng([seed, 3, number]).integers(2**31))


def check_weights(weights: Sequence[float] | None, sources: Sequence[Any]) -> list[float]:
    """The weights of sources, by default all alike. Raises UserError unless each has one number above 0."""
    weights = [1.0] * len(sources) if weights is None else weights
    if len(weights) != len(sources):
        raise UserError(f"{len(weights)} weights for {len(sources)} sources")
    if not all(0 < weight < float("inf") for weight in weights):
        raise UserError("the weight of a source must be a number above 0")
    return [float(weight) for weight in weights]
