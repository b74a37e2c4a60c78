"""Rows that are read as they are needed: of each source the first ones at once, the others in passes."""

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_jax.batches import Prompts, RankedAnswers, Tokens
from rlhf_jax.data.encode import encode_rows
from rlhf_jax.data.formats import Text
from rlhf_jax.data.heldout import opening_of_row, split_head
from rlhf_jax.data.loader import check_weights, streamed_batches, streamed_parts
from rlhf_jax.data.order import PromptStream, RankingStream
from rlhf_jax.data.preferences import clamped, reordered
from rlhf_jax.data.rejects import Rejects
from rlhf_jax.data.rows import Read
from rlhf_jax.data.tokenizer import PreTrainedTokenizerBase
from rlhf_jax.data.tokens import Document, pad_prompts
from rlhf_jax.sharding import host_share
from rlhf_jax.tasks.asked import Asked
from rlhf_jax.tasks.task import PromptRow

if TYPE_CHECKING:
    import grain

    from rlhf_jax.data.iterators import Pass

STREAM_HEAD = 2560
"""Rows at the beginning of a source of which some are held out."""
Rows = Callable[..., Iterator[Read]]
"""rows(rejects, …): `read_rows` of a source."""


@dataclass(frozen=True)
class Streaming:
    """How sources are streamed."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    pad_id: int
    seed: int
    window: int
    """Rows among which a stream is shuffled."""
    heldout: int
    """At most so many of the first demonstrations of a source, and at most a tenth, are held out."""
    in_order: bool
    """All passes have one order of files."""

    def demonstrations(
        self, sources: Sequence[Rows], weights: Sequence[float] | None, counted: Rejects
    ) -> tuple[list[Document], list[Document], Callable[[int, int], "grain.DatasetIterator[Tokens]"]]:
        """(the first ones of each source, those held out of them, batches(batch size, seed) of the others)."""
        found = [
            StreamedSource(
                rows, self.tokenizer, self.max_length, budget=self.heldout, counted=counted, in_order=self.in_order
            )
            for rows in sources
        ]

        def batches(batch_size: int, seed: int) -> "grain.DatasetIterator[Tokens]":
            share = host_share()
            return streamed_batches(
                [one.open for one in found], batch_size=batch_size // share[1], length=self.max_length,
                pad_id=self.pad_id, seed=seed, weights=weights, shard=share, window=self.window,
            )  # fmt: skip

        return [ids for one in found for ids in one.head], [ids for one in found for ids in one.validation], batches

    def comparisons(
        self,
        sources: Sequence[Rows],
        names: Sequence[str],
        weights: Sequence[float] | None,
        counted: Rejects,
        *,
        heldout: Sequence[str],
        answers: int,
        clamp: float | None,
    ) -> RankingStream:
        """All comparisons but those with the openings of the held-out ones, with so many answers at most.

        Raises UserError for weights that are not as many as the `names`.
        """
        check_weights(weights, names)
        opened = [
            ranking_opener(
                rows, self.tokenizer, self.max_length, heldout=frozenset(heldout), answers=answers, clamp=clamp,
                seed=self.seed, counted=counted, in_order=self.in_order,
            )
            for rows in sources
        ]  # fmt: skip

        def batches(batch_size: int, seed: int) -> "grain.DatasetIterator[list[RankedAnswers]]":
            return streamed_parts(opened, list, batch_size=batch_size, seed=seed, weights=weights, window=self.window)

        return RankingStream(batches, self.max_length)

    def prompts(
        self,
        sources: Sequence[Rows],
        asked: Asked,
        weights: Sequence[float] | None,
        counted: Rejects,
        left_out: Rejects,
        *,
        heldout: Collection[str],
        length: int,
    ) -> PromptStream:
        """All prompts but those with the openings of the held-out ones, each of at most so many tokens.

        Without `weights` all sources are drawn from alike. `left_out` hears of prompts that cannot be encoded so,
        which stop nobody, `counted` of all other rows.
        """
        opened = [
            prompt_opener(
                rows,
                self.tokenizer,
                length,
                asked,
                heldout=frozenset(heldout),
                counted=counted,
                left_out=left_out,
                in_order=self.in_order,
            )
            for rows in sources
        ]

        def lay(rows: Sequence[tuple[PromptRow, list[int]]]) -> tuple[Prompts, list[PromptRow]]:
            texts, ids = zip(*rows, strict=True)
            return pad_prompts(ids, length=length, pad_id=self.pad_id), list(texts)

        def batches(batch_size: int, seed: int) -> "grain.DatasetIterator[tuple[Prompts, list[PromptRow]]]":
            return streamed_parts(opened, lay, batch_size=batch_size, seed=seed, weights=weights, window=self.window)

        return batches


def opener(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    keep: Callable[[Read, Any], Any],
    *,
    counted: Rejects,
    in_order: bool,
    left_out: Rejects | None = None,
) -> Callable[[int, "Pass"], Iterator[tuple[int, Any]]]:
    """open(start, pass) for `loader`: a source's rows, as keep(row, ids) makes them; None leaves one out.

    `rows(rejects, …)` is `read_rows` of the source. `counted` hears of rows that cannot be used, in the first pass of
    the first reader, and instead of it `left_out`, if given, of those that cannot be encoded. `in_order`: all passes
    have one order of files.
    """
    own: Any = copy.deepcopy(tokenizer)  # a thread of its own reads each source
    uncounted = [counted]

    def open_source(start: int, one: "Pass") -> Iterator[tuple[int, Any]]:
        first = not one.number and bool(uncounted)
        rejects = uncounted.pop() if first else Rejects("skip" if one.number else counted.policy)
        encoding = rejects if left_out is None else left_out if first else Rejects("skip")
        found = rows(rejects, start=start, order=None if in_order else one.order, shard=one.shard)
        for read, ids in encode_rows(found, own, max_length, encoding):
            if left_out is not None:
                rejects.use(read.row.place)
            kept = keep(read, ids)
            if kept is not None:
                yield read.number, kept

    return open_source


def ranking_opener(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    heldout: Collection[str],
    answers: int,
    clamp: float | None,
    seed: int,
    counted: Rejects,
    in_order: bool,
) -> Callable[[int, "Pass"], Iterator[tuple[int, Any]]]:
    """`opener` of comparisons: without those that begin as the held-out ones do, each ranking in an order of its own.

    Of those with more than so many `answers`, for which no batch has room, the best, the worst and some between are
    used, and that is counted. `clamp` is the highest probability of a soft label.
    """

    def noted(rejects: Rejects, **where: Any) -> Iterator[Read]:
        for read in rows(rejects, **where):
            if len(read.row.ranks) > answers:
                rejects.note(read.row.place, f"only {answers} answers used, as many as the first rows have")
            yield read

    def keep(read: Read, ids: RankedAnswers) -> RankedAnswers | None:
        if opening_of_row(read.row) in heldout:
            return None
        if clamp is not None and read.row.probability is not None:
            ids = clamped(ids, clamp)
        order = np.random.default_rng([seed, 7, read.number]).permutation(len(ids.ranks)).tolist()
        ends = {ids.ranks.index(min(ids.ranks)), ids.ranks.index(max(ids.ranks))}
        between = [place for place in order if place not in ends][: answers - len(ends)]
        return reordered(ids, [place for place in order if place in ends or place in between])

    return opener(noted, tokenizer, max_length, keep, counted=counted, in_order=in_order)


def prompt_opener(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    asked: Asked,
    *,
    heldout: Collection[str],
    counted: Rejects,
    left_out: Rejects,
    in_order: bool,
) -> Callable[[int, "Pass"], Iterator[tuple[int, tuple[PromptRow, list[int]]]]]:
    """`opener` of prompts, with the rows that rewards read; without those that begin as the held-out ones do, and
    without texts, which have no prompt."""

    def prompts(rejects: Rejects, **where: Any) -> Iterator[Read]:
        for read in rows(rejects, **where):
            if not isinstance(read.row, Text) and opening_of_row(read.row) not in heldout:
                yield asked.read(read)

    def keep(read: Read, ids: list[int]) -> tuple[PromptRow, list[int]]:
        return asked.row(read), ids

    return opener(prompts, tokenizer, length, keep, counted=counted, left_out=left_out, in_order=in_order)


class StreamedSource:
    """A source of demonstrations, some of whose first rows are held out, whatever the order of a pass is.

    A row is known by its ids: where it stands depends on the order of the files.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        budget: int,
        counted: Rejects,
        in_order: bool,
    ) -> None:
        """At most `budget` rows, and at most a tenth, are held out; the rest is as in `opener`.

        Raises UserError for a source that cannot be read.
        """
        policy = counted.policy
        begin = encode_rows(rows(Rejects(policy)), tokenizer, max_length, Rejects(policy))
        kept, out = split_head([ids for _, ids in islice(begin, STREAM_HEAD)], budget=budget)
        heldout = set(map(_content, out))
        self.head: list[Document] = [ids for ids in kept if _content(ids) not in heldout]
        self.validation: list[Document] = list(out)
        self.open = opener(
            rows, tokenizer, max_length, lambda _, ids: None if _content(ids) in heldout else ids, counted=counted,
            in_order=in_order,
        )  # fmt: skip


def _content(document: Document) -> tuple[bytes, ...]:
    return tuple(np.asarray(part, np.int32).tobytes() for part in document)
