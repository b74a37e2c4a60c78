"""Real text as a task: demonstrations, comparisons, prompts and labelled answers from files or the Hub."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlhf_jax.batches import PackedRankings, Prompts, RankedAnswers, Tokens
from rlhf_jax.data.encoders import default_processes, encode_many
from rlhf_jax.data.formats import Text
from rlhf_jax.data.heldout import split_by_hash, split_by_opening, split_rows
from rlhf_jax.data.lazy import Lazy, joined
from rlhf_jax.data.loader import check_weights, document_batches, mix_once
from rlhf_jax.data.order import PromptStream, RankingStream
from rlhf_jax.data.pairs import Examples, labelled
from rlhf_jax.data.preferences import clamped, pack_rankings, pad_rankings, reordered, shuffled
from rlhf_jax.data.rejects import OnBadRow, Rejects
from rlhf_jax.data.rows import (
    Read,
    find_format,
    parse_columns,
    read_rows,
    reported,
)
from rlhf_jax.data.sample import sample
from rlhf_jax.data.store import Stored, of_numbers, open_cache, stored, together
from rlhf_jax.data.tokens import (
    Document,
    bucket,
    first_fit,
    lay,
    pack_sequences,
    pad_sequences,
    size,
    take,
)
from rlhf_jax.errors import UserError
from rlhf_jax.hosts import gather
from rlhf_jax.log import Run
from rlhf_jax.models import count_weights
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.scoring import rows_at_once
from rlhf_jax.sharding import host_share
from rlhf_jax.tasks.asked import Asked, lay_prompts
from rlhf_jax.tasks.streams import STREAM_HEAD, Rows, Streaming
from rlhf_jax.tasks.task import Comparisons, Demonstrations, PromptRow, PromptSets, Sampler

if TYPE_CHECKING:
    import grain


HEAD_TOKENS = 2**22
"""Tokens of packed demonstrations that are made into arrays, for PPO-ptx: of more, as many rows are drawn."""
WINDOW = 1024
"""Rows among which a stream is shuffled, where nobody says more."""
LONGEST, NEW_TOKENS = 1024, 128
"""Tokens of prompt and answer together, and of a sampled answer, where nobody says more."""
FIRST = " of the first ones, the others as they are needed"
"""Said of a stream's rows."""
SECONDS = 10.0
"""Between lines that say how far reading is."""


class Source(NamedTuple):
    """Files, folders or names on the Hub of one kind of rows, and how they are read."""

    kind: str
    """demonstrations, comparisons, prompts or unpaired."""
    names: tuple[str, ...]
    format: str | None = None
    columns: tuple[str, ...] = ()
    """OURS=THEIRS."""
    weights: tuple[float, ...] = ()
    suffix: str = ""
    """Text put behind each prompt."""
    clamp: float | None = None
    """The highest probability of a soft label."""
    own: int = 0
    """So many of the first names are files of the run's own, which are read whole, whatever the limit."""


class TextTask:
    """A `Task` of files. Each is read when it is first asked for, and the run says what was read and left out."""

    judge = None

    def __init__(
        self,
        base: Pretrained,
        run: Run,
        sources: dict[str, Source],
        *,
        seed: int,
        max_length: int | None,
        max_new_tokens: int | None,
        eval_batch_size: int | None,
        limit: int | None,
        heldout: int,
        on_bad_row: OnBadRow,
        streaming: bool,
        stream_prompts: bool = False,
        shuffle_window: int | None = None,
        growing: bool = False,
        rows_cache: str | None = None,
        num_proc: int | None = None,
    ) -> None:
        """`max_length` is tokens of prompt and answer together, `max_new_tokens` of a sampled answer.

        By default they are 1024, or the model's limit, and 128, or a quarter of that; batches are then only as wide as
        the longest row needs. `eval_batch_size` is by default that of `rows_at_once`. At most `heldout` rows, and at
        most a tenth, are held out of each kind. `growing` says that the files get more rows: what was trained on is
        then not held out later. Raises UserError for lengths that the model does not have.
        """
        if max_length is not None and max_length > base.config.max_length:
            raise UserError(f"--max-length {max_length} is more than the model's {base.config.max_length}")
        self._width = max_length
        max_length = max_length or min(LONGEST, base.config.max_length)
        max_new_tokens = max_new_tokens or min(NEW_TOKENS, max_length // 4)
        if max_length - max_new_tokens < 8:
            raise UserError(
                f"--max-new-tokens {max_new_tokens} leaves no room for prompts in --max-length {max_length}"
            )
        for source in sources.values():
            parse_columns(source.columns)
        self.base, self.max_new_tokens = base, max_new_tokens
        weights = count_weights(base.params)
        self.eval_batch_size = eval_batch_size or rows_at_once(base.config, max_length, weights)
        self.facts: dict[str, float] = {}
        self.has_demonstrations = "demonstrations" in sources
        self._run, self._sources, self._seed = run, sources, seed
        self._max_length, self._limit, self._budget = max_length, limit, heldout
        self._streaming, self._growing = streaming, growing
        self._stream_prompts = streaming and stream_prompts
        self._streams = Streaming(
            base.tokenizer, max_length, base.pad_id, seed, window=shuffle_window or WINDOW, heldout=heldout,
            in_order=limit is not None,  # the first rows of a source are those of one order
        )  # fmt: skip
        self._cache, self._processes = open_cache(rows_cache), num_proc or default_processes()
        self._rejects, self._elsewhere = Rejects(on_bad_row), Rejects(on_bad_row)
        self._only_asked, self._not_asked = Rejects(on_bad_row), Rejects("skip")
        self._said: set[str] = set()
        self._parts: dict[str, Any] = {}

    @property
    def longest_prompt(self) -> int:
        """The most tokens of a prompt that leaves room for an answer."""
        return self._max_length - self.max_new_tokens

    def demonstrations(self) -> Demonstrations:
        """The demonstrations of `--demonstrations`. Raises UserError without any."""
        return self._once("demonstrations", self._stream_demonstrations if self._streaming else self._demonstrations)

    def comparisons(self, sampler: Sampler) -> Comparisons:
        """The comparisons of `--comparisons`; the sampler is not asked. Raises UserError without any."""
        parts = self._compared()
        train, heldout = (part.ids for part in parts)
        ends = [(int(np.argmin(r.ranks)), int(np.argmax(r.ranks))) for r in heldout]
        pairs = [reordered(r, sorted(pair)) for r, pair in zip(heldout, ends, strict=True)]
        pad_id = self.base.pad_id
        shapes = ((len(r.ranks), len(r.prompt) + max(map(len, r.responses))) for r in joined([train, heldout]))
        answers, longest = np.max(np.fromiter(shapes, np.dtype((int, 2))), axis=0).tolist()
        stream = self._stream_comparisons(parts[1].openings, answers) if self._streaming else None
        length = self._max_length if stream else self._row_width(longest)

        def lay(rankings: Sequence[RankedAnswers]) -> PackedRankings:
            return pack_rankings(rankings, length=length, pad_id=pad_id, answers=answers)

        padded = pad_rankings(pairs, length=bucket(longest, longest=self._max_length), pad_id=pad_id)
        return Comparisons(train, padded, {}, lay, packed=True, stream=stream)

    def unpaired(self) -> Examples:
        """Answers found good or not, of `--unpaired`."""
        rows = joined([some.ids for some in self._read("unpaired")])
        self._announce()
        return labelled(rows)

    def prompts(self) -> PromptSets:
        """The prompts of `--prompts`, else those of the comparisons, the labelled answers or the demonstrations.

        Raises UserError when there are too few to hold some out, or none fits.
        """
        return self._once("prompts", self._prompts)

    def _prompts(self) -> PromptSets:
        kinds = ("prompts", "comparisons", "unpaired", "demonstrations")
        kind = next(kind for kind in kinds if kind in self._sources)
        if kind == "comparisons":
            parts = self._compared()
        else:
            found = together(self._read(kind))
            if kind == "demonstrations":  # texts have no prompt
                chats = [number for number, read in enumerate(found.reads) if not isinstance(read.row, Text)]
                found = of_numbers(found, chats)
            parts = self._split(found, self._rng(3))
        if not all(part.ids for part in parts):
            raise UserError(f"{self._name('prompts')}: too few prompts to train on some and hold out others")
        stream, width, first = None, None, ""
        if self._stream_prompts and kind != "unpaired":
            stream, width, first = self._prompt_stream(self._sources[kind], parts), self.longest_prompt, FIRST
        train, train_rows = self._lay_prompts(parts[0], width)
        heldout, heldout_rows = self._lay_prompts(parts[1])
        self._announce()
        self._run.say(f"prompts: {len(train_rows)} to train on{first}, {len(heldout_rows)} held out")
        return PromptSets(train, take(heldout, slice(None)), None, train_rows, heldout_rows, stream=stream)

    def _demonstrations(self) -> Demonstrations:
        """All of them by their place on the disk; grain shuffles, mixes and packs them."""
        train: list[Sequence[Document]] = []
        validation: list[Document] = []
        for rows, name in zip(self._read("demonstrations"), self._sources["demonstrations"].names, strict=True):
            if self._growing:
                kept, out = split_by_hash(rows.ids, rows.openings, budget=self._budget)
            else:
                kept, out = split_rows(rows.ids, budget=self._budget, rng=self._rng(1))
            if not kept:
                raise UserError(f"{name}: too few rows to train on some and hold out others")
            train.append(kept)
            validation += out
        everything = joined(train)
        self._run.say(f"demonstrations: {len(everything)} to train on, {len(validation)} held out")
        sizes = [size(document) for document in everything]
        width = self._row_width(max(sizes))
        rows_of = first_fit(sizes, length=width)
        drawn = np.sort(self._rng(4).permutation(len(rows_of))[: max(1, HEAD_TOKENS // width)])
        packed = lay([[everything[n] for n in rows_of[row]] for row in drawn], width, self.base.pad_id)
        found = Demonstrations(packed, self._pad(validation), partial(self._batches, train, width), len(rows_of))
        self._announce(packed)
        return found

    def _batches(
        self, train: Sequence[Sequence[Document]], width: int, batch_size: int, seed: int
    ) -> "grain.DatasetIterator[Tokens]":
        share, weights = host_share(), self._sources["demonstrations"].weights or None
        return document_batches(
            train, batch_size=batch_size // share[1], length=width, pad_id=self.base.pad_id, seed=seed,
            weights=weights, shard=share,
        )  # fmt: skip

    def _stream_demonstrations(self) -> Demonstrations:
        """Only the first of each source in memory, for validation and PPO-ptx; the rest is read when it is needed."""
        source = self._sources["demonstrations"]
        counted = self._rejects if self._run.first else self._elsewhere
        head, validation, batches = self._streams.demonstrations(
            self._streamed_rows(source), source.weights or None, counted
        )
        if not head:
            raise UserError(f"{', '.join(source.names)}: too few rows to train on some and hold out others")
        packed = pack_sequences(head, length=self._max_length, pad_id=self.base.pad_id)
        self._announce(packed)
        return Demonstrations(packed, self._pad(validation), batches, None)

    def _stream_comparisons(self, heldout: Sequence[str], answers: int) -> RankingStream:
        source = self._sources["comparisons"]
        counted = self._rejects if self._run.first else Rejects(self._rejects.policy)  # all hosts read the same rows
        return self._streams.comparisons(
            self._streamed_rows(source), source.names, source.weights or None, counted, heldout=heldout,
            answers=answers, clamp=source.clamp,
        )  # fmt: skip

    def _prompt_stream(self, source: Source, parts: Sequence[Stored]) -> PromptStream:
        """All prompts of the files but the held-out ones. A file without one to train on at its start is left out.

        Raises UserError for weights that are not as many as the files.
        """
        trained, heldout = (set(part.openings) for part in parts)
        given = source.weights if source.kind == "comparisons" else ()
        weights = check_weights(given or None, source.names)
        sources = zip(self._streamed_rows(source), self._read(source.kind), source.names, weights, strict=True)
        kept = []
        for rows, first, name, weight in sources:
            if trained.isdisjoint(first.openings):
                self._run.say(f"{name}: no prompt to train on among its first rows")
            else:
                kept.append((rows, weight))
        # Rows of another kind are counted when they are read as what they are.
        own = self._run.first and source.kind == "prompts"
        return self._streams.prompts(
            [rows for rows, _ in kept], self._asked(), [weight for _, weight in kept],
            self._rejects if own else self._only_asked, self._not_asked, heldout=heldout, length=self.longest_prompt,
        )  # fmt: skip

    def _streamed_rows(self, source: Source) -> list[Rows]:
        return [
            partial(read_rows, name, form, columns=source.columns, streaming=True, limit=self._limit)
            for name, form in zip(source.names, self._formats(source), strict=True)
        ]

    def _compared(self) -> tuple[Stored, Stored]:
        """Training and held-out comparisons, of a stream its first ones; no conversation begins alike in both."""
        return self._once("comparisons", self._read_comparisons)

    def _read_comparisons(self) -> tuple[Stored, Stored]:
        found, rng = self._read("comparisons"), self._rng(2)
        rows, weights = together(found), self._sources["comparisons"].weights
        if weights and not self._streaming:
            ends = np.cumsum([0, *(len(some.ids) for some in found)])
            numbers = [range(start, end) for start, end in pairwise(ends.tolist())]
            rows = of_numbers(rows, mix_once(numbers, weights, seed=self._seed))
        parts = self._split(self._soften(rows), rng)
        if not all(part.ids for part in parts):
            raise UserError(f"{self._name('comparisons')}: too few comparisons to train on some and hold out others")
        self._announce()
        first = FIRST if self._streaming else ""
        self._run.say(f"comparisons: {len(parts[0].ids)} to train on{first}, {len(parts[1].ids)} held out")
        # The preferred one is not always first: nothing may learn the place.
        train, heldout = (part._replace(ids=shuffled(part.ids, rng)) for part in parts)
        return train, heldout

    def _soften(self, rows: Stored) -> Stored:
        """The comparisons with their probabilities clamped. Raises UserError for a clamp where none has one."""
        clamp = self._sources["comparisons"].clamp
        if clamp is None and not any(ids.doubt for ids in rows.ids):
            return rows
        soft = np.fromiter((read.row.probability is not None for read in rows.reads), bool, len(rows.reads))
        first = " of the first ones" if self._streaming else ""
        if clamp is not None and not soft.any():
            said = f"--comparisons-clamp {clamp}: no row of {self._name('comparisons')} has a probability"
            if not self._streaming:
                raise UserError(said)
            self._run.warn(f"{said},{first}")
            return rows
        ids = rows.ids
        if clamp is not None:
            rows = rows._replace(ids=Lazy(len(ids), lambda row: clamped(ids[row], clamp) if soft[row] else ids[row]))
        mean = sum(some.doubt for some in rows.ids) / soft.sum()
        count = f"{soft.sum()} of {len(soft)}{first}"
        self._run.say(f"comparisons: {count} have a probability; it is {1 - mean:.2f} on average")
        return rows

    def _split(self, rows: Stored, rng: np.random.Generator) -> tuple[Stored, Stored]:
        """(training, held out); no conversation begins alike in both."""
        numbers = range(len(rows.ids))
        if self._growing:
            parts = split_by_hash(numbers, rows.openings, budget=self._budget)
        else:
            parts = split_by_opening(numbers, rows.openings, budget=self._budget, rng=rng)
        train, heldout = (of_numbers(rows, part) for part in parts)
        return train, heldout

    def _lay_prompts(self, rows: Stored, width: int | None = None) -> tuple[Prompts, Sequence[PromptRow]]:
        """Left-padded prompts in the bucket of the longest, each with its row. What does not fit is said."""
        quiet, asked, length = Rejects("skip"), self._asked(), self.longest_prompt
        # Those of a file of prompts are encoded already.
        encoded = "prompts" in self._sources and not asked.suffix
        prompts, laid = lay_prompts(
            rows, asked, partial(self._encode_again, quiet), encoded=encoded, length=length,
            width=width, pad_id=self.base.pad_id,
        )  # fmt: skip
        for reason, count in {**quiet.notes(), **quiet.counts()}.items():
            self._run.say(f"prompts to answer: {reason}: {count} of {len(rows.ids)}")
        if not laid:
            raise UserError(f"{self._name('prompts')}: no prompt fits into {length} tokens; raise --max-length")
        return prompts, laid

    def _streamed_as_prompts(self, kind: str) -> bool:
        return self._stream_prompts and kind in ("prompts", "demonstrations")

    def _asked(self) -> Asked:
        source = self._sources.get("prompts")
        return Asked() if source is None else Asked(source.columns, source.suffix)

    def _encode_again(self, rejects: Rejects, rows: Iterator[Read]) -> Stored:
        """Rows with the ids of their prompts, in files that go with the process."""

        def encode(rejects: Rejects) -> Iterator[tuple[Read, Any]]:
            found = encode_many(rows, self.base.tokenizer, self.longest_prompt, rejects, processes=self._processes)
            return ((read._replace(fields={}), ids) for read, ids in found)

        return stored("prompts", (), self.base.tokenizer, encode, rejects, self._cache, keep=False)

    def _read(self, kind: str) -> list[Stored]:
        """The usable rows of each source, with their ids."""
        if kind not in self._sources:
            raise UserError(f"there are no {kind} to read: give --{kind} FILE")
        return self._once(f"rows of {kind}", partial(self._read_rows, self._sources[kind]))

    def _read_rows(self, source: Source) -> list[Stored]:
        formats = self._formats(source)
        return [
            self._read_one(source, name, form, own=number < source.own)
            for number, (name, form) in enumerate(zip(source.names, formats, strict=True))
        ]

    def _read_one(self, source: Source, name: str, form: str, *, own: bool) -> Stored:
        """The usable rows of one file; of a stream the first ones. Raises UserError where there are none."""
        streamed = self._streaming and (source.kind == "comparisons" or self._streamed_as_prompts(source.kind))
        limit = None if own else self._limit
        limit = min(limit or STREAM_HEAD, STREAM_HEAD) if streamed else limit
        # What a stream begins with, it meets and counts again.
        rejects = Rejects(self._rejects.policy) if streamed else self._rejects

        def encode(rejects: Rejects) -> Any:
            rows = read_rows(name, form, rejects, columns=source.columns, limit=limit, streaming=streamed)
            encoded = encode_many(rows, self.base.tokenizer, self._max_length, rejects, processes=self._processes)
            return reported(encoded, name, self._run.say, every_seconds=SECONDS)

        settings = (form, source.columns, limit, self._max_length)
        keep = not own and not streamed  # to look for what is kept the whole file is read
        found = stored(name, settings, self.base.tokenizer, encode, rejects, self._cache, keep=keep)
        for line in rejects.summary() if streamed else ():
            self._run.say(f"of the first {STREAM_HEAD} rows: {line}")
        if not found.ids:
            reasons = ", ".join(f"{reason} ({rows})" for reason, rows in rejects.counts().items())
            raise UserError(f"{name}: no row can be used: {reasons}")
        return found

    def _formats(self, source: Source) -> list[str]:
        """The form of each source's rows."""
        return self._once(f"formats of {source.kind}", partial(self._find_formats, source))

    def _find_formats(self, source: Source) -> list[str]:
        found = [
            find_format(name, source.kind, format=source.format, columns=source.columns, streaming=self._streaming)
            for name in source.names
        ]
        for name, form in zip(source.names, found, strict=True):
            self._run.say(f"{name}: {source.kind} in the format {form}")
        return found

    def _announce(self, demonstrations: Tokens | None = None) -> None:
        """Says what was used and left out, also in rejected.jsonl, and shows a sample of the tokens."""
        if self._run.first:
            read = {name for source in self._sources.values() for name in source.names}
            self._rejects.write_to(self._run.dir / "rejected.jsonl", sources=read)
            self._only_asked.write_to(self._run.dir / "rejected.jsonl", sources=())
        asked = [f"prompts to answer: {line}" for line in self._only_asked.summary()]
        reasons = {**self._not_asked.notes(), **self._not_asked.counts()}
        asked += [f"prompts to answer: {reason}: {count}" for reason, count in reasons.items()]
        for line in [*self._rejects.summary(), *(asked if self._run.first else [])]:
            if line not in self._said:
                self._run.say(line)
            self._said.add(line)
        self._run.record(data=self._only_asked.by_source() | self._rejects.by_source())
        if demonstrations is not None:
            self._run.say("a demonstration; what is learned is coloured, or in [[brackets]]:")
            self._run.show(lambda colour: sample(demonstrations, self.base.tokenizer, colour=colour))

    def finish(self) -> None:
        """Says what a stream has met since, also the share of a stream that another host has read."""
        for told in gather(self._elsewhere.told())[1:]:
            if self._run.first:
                self._rejects.hear(told)
        self._elsewhere.forget()
        self._announce()

    def _row_width(self, longest: int) -> int:
        return self._width or bucket(longest, longest=self._max_length)

    def _pad(self, documents: Sequence[Document]) -> Tokens:
        longest = max(map(size, documents))
        return pad_sequences(documents, length=bucket(longest, longest=self._max_length), pad_id=self.base.pad_id)

    def _once(self, name: str, make: Any) -> Any:
        if name not in self._parts:
            self._parts[name] = make()
        return self._parts[name]

    def _rng(self, number: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, 0, number])

    def _name(self, kind: str) -> str:
        source = self._sources.get(kind)
        return kind if source is None else ", ".join(source.names)
