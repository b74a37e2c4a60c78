"""Real text as a task: demonstrations, comparisons, prompts and labelled answers from files or the Hub."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.batches import PackedRankings, Prompts, RankedAnswers, Tokens
from rlhf_jax.data.conversations import Conversation, messages
from rlhf_jax.data.encode import encode_rows
from rlhf_jax.data.formats import Prompt, Text
from rlhf_jax.data.heldout import opening_of, split_by_hash, split_by_opening, split_head, split_rows
from rlhf_jax.data.loader import document_batches, mix_once, streamed_batches
from rlhf_jax.data.pairs import Examples, labelled
from rlhf_jax.data.preferences import pack_rankings, pad_rankings
from rlhf_jax.data.rejects import OnBadRow, Rejects
from rlhf_jax.data.rows import Read, find_format, parse_columns, read_rows, reported
from rlhf_jax.data.sample import sample
from rlhf_jax.data.tokens import Document, bucket, pack_sequences, pad_prompts, pad_sequences, size
from rlhf_jax.errors import UserError
from rlhf_jax.log import Run
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.scoring import rows_at_once
from rlhf_jax.sharding import host_share
from rlhf_jax.tasks.task import Comparisons, Demonstrations, PromptRow, PromptSets, Sampler

if TYPE_CHECKING:
    import grain

STREAM_HEAD = 2560
"""Documents at the beginning of a streamed source of which some are held out."""
LONGEST, NEW_TOKENS = 1024, 128
"""Tokens of prompt and answer together, and of a sampled answer, where nobody says more."""
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
        growing: bool = False,
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
        weights = sum(leaf.size for leaf in jax.tree.leaves(base.params))
        self.eval_batch_size = eval_batch_size or rows_at_once(base.config, max_length, weights)
        self.facts: dict[str, float] = {}
        self.has_demonstrations = "demonstrations" in sources
        self._run, self._sources, self._seed = run, sources, seed
        self._max_length, self._limit, self._budget = max_length, limit, heldout
        self._streaming, self._growing = streaming, growing
        self._rejects = Rejects(on_bad_row)
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
        train, heldout = ([ids for _, ids in part] for part in self._compared())
        ends = [(int(np.argmin(r.ranks)), int(np.argmax(r.ranks))) for r in heldout]
        pairs = [reordered(r, sorted(pair)) for r, pair in zip(heldout, ends, strict=True)]
        answers, pad_id = max(len(r.ranks) for r in train), self.base.pad_id
        longest = max(len(r.prompt) + len(response) for r in [*train, *heldout] for response in r.responses)
        length = self._row_width(longest)

        def lay(rankings: Sequence[RankedAnswers]) -> PackedRankings:
            return pack_rankings(rankings, length=length, pad_id=pad_id, answers=answers)

        padded = pad_rankings(pairs, length=bucket(longest, longest=self._max_length), pad_id=pad_id)
        return Comparisons(train, padded, {}, lay, packed=True)

    def unpaired(self) -> Examples:
        """Answers found good or not, of `--unpaired`."""
        rows = [ids for some in self._read("unpaired") for _, ids in some]
        self._announce()
        return labelled(rows)

    def prompts(self) -> PromptSets:
        """The prompts of `--prompts`, else those of the comparisons, the labelled answers or the demonstrations.

        Raises UserError when there are too few to hold some out, or none fits.
        """
        return self._once("prompts", self._prompts)

    def _prompts(self) -> PromptSets:
        parts: Sequence[list[Any]]
        if "prompts" in self._sources:
            suffix = self._sources["prompts"].suffix
            rows = [(with_suffix(read.row, suffix), read.fields) for some in self._read("prompts") for read, _ in some]
            parts = self._split([(row.prompt, (row, fields)) for row, fields in rows], self._rng(3))
        elif "comparisons" in self._sources:
            parts = [[(as_prompt(read), read.fields) for read, _ in part] for part in self._compared()]
        else:
            kind = next(kind for kind in ("unpaired", "demonstrations") if kind in self._sources)
            read = [read for some in self._read(kind) for read, _ in some if not isinstance(read.row, Text)]
            rows = [(as_prompt(one), one.fields) for one in read]
            parts = self._split([(row.prompt, (row, fields)) for row, fields in rows], self._rng(3))
        if not all(parts):
            raise UserError(f"{self._name('prompts')}: too few prompts to train on some and hold out others")
        (train, train_rows), (heldout, heldout_rows) = (self._lay_prompts(part) for part in parts)
        self._announce()
        self._run.say(f"prompts: {len(train_rows)} to train on, {len(heldout_rows)} held out")
        return PromptSets(train, heldout, None, train_rows, heldout_rows)

    def _demonstrations(self) -> Demonstrations:
        """All of them in memory; grain shuffles, mixes and packs them."""
        train: list[list[Document]] = []
        validation: list[Document] = []
        for rows in self._read("demonstrations"):
            documents = [ids for _, ids in rows]
            if self._growing:
                openings = [opening_of_row(read) for read, _ in rows]
                kept, out = split_by_hash(documents, openings, budget=self._budget)
            else:
                kept, out = split_rows(documents, budget=self._budget, rng=self._rng(1))
            if not kept:
                raise UserError(f"{rows[0][0].row.place.source}: too few rows to train on some and hold out others")
            train.append(kept)
            validation += out
        everything = [document for some in train for document in some]
        self._run.say(f"demonstrations: {len(everything)} to train on, {len(validation)} held out")
        width = self._row_width(max(map(size, everything)))
        packed = pack_sequences(everything, length=width, pad_id=self.base.pad_id)
        found = Demonstrations(packed, self._pad(validation), partial(self._batches, train, width), len(packed.mask))
        self._announce(packed)
        return found

    def _batches(
        self, train: list[list[Document]], width: int, batch_size: int, seed: int
    ) -> "grain.DatasetIterator[Tokens]":
        share, weights = host_share(), self._sources["demonstrations"].weights or None
        return document_batches(
            train, batch_size=batch_size // share[1], length=width, pad_id=self.base.pad_id, seed=seed,
            weights=weights, shard=share,
        )  # fmt: skip

    def _stream_demonstrations(self) -> Demonstrations:
        """Only the first of each source in memory, for validation and PPO-ptx; the rest is read when it is needed."""
        source = self._sources["demonstrations"]
        opened, head, validation = [], [], []
        for name, form in zip(source.names, self._formats(source, streaming=True), strict=True):
            rows = partial(read_rows, name, form, columns=source.columns, streaming=True, limit=self._limit)
            policy = self._rejects.policy
            begin = encode_rows(rows(Rejects(policy)), self.base.tokenizer, self._max_length, Rejects(policy))
            first = [(read.number, ids) for read, ids in islice(begin, STREAM_HEAD)]
            kept, out = split_head(first, budget=self._budget)
            validation += [ids for _, ids in out]
            head += [ids for _, ids in kept]
            opened.append(partial(self._stream, rows, {number for number, _ in out}, {"passes": 0}))
        if not head:
            raise UserError(f"{', '.join(source.names)}: too few rows to train on some and hold out others")
        pad_id, weights = self.base.pad_id, source.weights or None

        def batches(batch_size: int, seed: int) -> "grain.DatasetIterator[Tokens]":
            share = host_share()
            return streamed_batches(
                opened, batch_size=batch_size // share[1], length=self._max_length, pad_id=pad_id, seed=seed,
                weights=weights, shard=share,
            )  # fmt: skip

        packed = pack_sequences(head, length=self._max_length, pad_id=pad_id)
        self._announce(packed)
        return Demonstrations(packed, self._pad(validation), batches, None)

    def _stream(
        self, rows: Any, heldout: set[int], seen: dict[str, int], start: int
    ) -> Iterator[tuple[int, Document]]:
        """(number, ids) of rows from `start` on. What cannot be used is counted in the first pass only."""
        rejects = self._rejects if seen["passes"] == 0 else Rejects("skip")
        for read, ids in encode_rows(rows(rejects, start=start), self.base.tokenizer, self._max_length, rejects):
            if read.number not in heldout:
                yield read.number, ids
        seen["passes"] += 1

    def _compared(self) -> tuple[list[tuple[Read, RankedAnswers]], list[tuple[Read, RankedAnswers]]]:
        """Training and held-out comparisons; no conversation begins alike in both."""
        return self._once("comparisons", self._read_comparisons)

    def _read_comparisons(self) -> Any:
        found, rng = self._read("comparisons"), self._rng(2)
        weights = self._sources["comparisons"].weights
        if weights:
            found = [mix_once(found, weights, seed=self._seed)]
        rows = self._soften([row for some in found for row in some])
        parts = self._split([(row[0].row.prompt, row) for row in rows], rng)
        if not all(parts):
            raise UserError(f"{self._name('comparisons')}: too few comparisons to train on some and hold out others")
        self._announce()
        self._run.say(f"comparisons: {len(parts[0])} to train on, {len(parts[1])} held out")
        # The preferred one is not always first: nothing may learn the place.
        return tuple(
            [(read, reordered(ids, rng.permutation(len(ids.ranks)).tolist())) for read, ids in part] for part in parts
        )

    def _soften(self, rows: list[tuple[Read, RankedAnswers]]) -> list[tuple[Read, RankedAnswers]]:
        """The comparisons with their probabilities clamped. Raises UserError for a clamp where none has one."""
        clamp = self._sources["comparisons"].clamp
        soft = sum(read.row.probability is not None for read, _ in rows)
        if clamp is not None and not soft:
            raise UserError(f"--comparisons-clamp {clamp}: no row of {self._name('comparisons')} has a probability")
        if clamp is not None:
            rows = [
                (read, ids if read.row.probability is None else ids._replace(doubt=max(ids.doubt, 1.0 - clamp)))
                for read, ids in rows
            ]
        if soft:
            mean = sum(ids.doubt for _, ids in rows) / soft
            self._run.say(f"comparisons: {soft} of {len(rows)} have a probability; it is {1 - mean:.2f} on average")
        return rows

    def _split(
        self, rows: Sequence[tuple[Conversation, Any]], rng: np.random.Generator
    ) -> tuple[list[Any], list[Any]]:
        """(training, held out) of (prompt, row); no conversation begins alike in both."""
        openings = [opening_of(prompt) for prompt, _ in rows]
        if self._growing:
            return split_by_hash([row for _, row in rows], openings, budget=self._budget)
        return split_by_opening([row for _, row in rows], openings, budget=self._budget, rng=rng)

    def _lay_prompts(self, rows: Sequence[tuple[Prompt, dict[str, Any]]]) -> tuple[Prompts, list[PromptRow]]:
        """Left-padded prompts in the bucket of the longest, each with its row. What does not fit is said."""
        quiet, length = Rejects("skip"), self.longest_prompt
        source = self._sources.get("prompts")
        column = "prompt" if source is None else parse_columns(source.columns).get("prompt", "prompt")
        reads = [Read(number, row, fields) for number, (row, fields) in enumerate(rows)]
        encoded = list(encode_rows(reads, self.base.tokenizer, length, quiet))
        for reason, count in {**quiet.notes(), **quiet.counts()}.items():
            self._run.say(f"prompts to answer: {reason}: {count} of {len(rows)}")
        if not encoded:
            raise UserError(f"{self._name('prompts')}: no prompt fits into {length} tokens; raise --max-length")
        ids = [ids for _, ids in encoded]
        prompts = pad_prompts(ids, length=bucket(max(map(len, ids)), longest=length), pad_id=self.base.pad_id)
        return prompts, [PromptRow(prompt_text(read, column), read.fields) for read, _ in encoded]

    def _read(self, kind: str) -> list[list[tuple[Read, Any]]]:
        """The usable rows of each source, with their ids."""
        if kind not in self._sources:
            raise UserError(f"there are no {kind} to read: give --{kind} FILE")
        return self._once(f"rows of {kind}", partial(self._read_rows, self._sources[kind]))

    def _read_rows(self, source: Source) -> list[list[tuple[Read, Any]]]:
        found = []
        for number, (name, form) in enumerate(zip(source.names, self._formats(source), strict=True)):
            limit = None if number < source.own else self._limit
            rows = read_rows(name, form, self._rejects, columns=source.columns, limit=limit)
            encoded = encode_rows(rows, self.base.tokenizer, self._max_length, self._rejects)
            found.append(list(reported(encoded, name, self._run.say, every_seconds=SECONDS)))
            if not found[-1]:
                reasons = ", ".join(f"{reason} ({rows})" for reason, rows in self._rejects.counts().items())
                raise UserError(f"{name}: no row can be used: {reasons}")
        return found

    def _formats(self, source: Source, *, streaming: bool = False) -> list[str]:
        """The form of each source's rows."""
        found = [
            find_format(name, source.kind, format=source.format, columns=source.columns, streaming=streaming)
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
        for line in self._rejects.summary():
            if line not in self._said:
                self._run.say(line)
            self._said.add(line)
        self._run.record(data=self._rejects.by_source())
        if demonstrations is not None:
            self._run.say("a demonstration; what is learned is coloured, or in [[brackets]]:")
            self._run.show(lambda colour: sample(demonstrations, self.base.tokenizer, colour=colour))

    def finish(self) -> None:
        """Says what a stream has met since."""
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


def reordered(ids: RankedAnswers, order: Sequence[int]) -> RankedAnswers:
    """The same ranking with its answers in another order."""
    return ids._replace(responses=[ids.responses[i] for i in order], ranks=tuple(ids.ranks[i] for i in order))


def as_prompt(read: Read) -> Prompt:
    """The prompt of a row that has answers, too."""
    return Prompt(read.row.prompt, read.row.place, read.row.tools)


def opening_of_row(read: Read) -> str:
    """The first words of a row's conversation; of a text without one, the whole text."""
    return read.row.text if isinstance(read.row, Text) else opening_of(read.row.prompt)


def with_suffix(prompt: Prompt, suffix: str) -> Prompt:
    """The prompt with a text behind its last message, in a paragraph of its own."""
    if not suffix:
        return prompt
    *before, last = prompt.prompt
    return prompt._replace(prompt=(*before, {**last, "content": f"{last['content']}\n\n{suffix}"}))


def prompt_text(read: Read, column: str) -> str | list[dict[str, Any]]:
    """A prompt as rewards get it: as it stands in that column of its row, where nothing was put before or behind it.

    Otherwise it is the text of its only message, or else messages.
    """
    given, turns = read.fields.get(column), read.row.prompt
    if isinstance(given, str) and tuple(messages({"prompt": given}, "prompt")) == tuple(turns):
        return given
    alone = len(turns) == 1 and turns[0]["role"] == "user" and isinstance(turns[0]["content"], str)
    return turns[0]["content"] if alone and not isinstance(given, list) else [dict(turn) for turn in turns]
