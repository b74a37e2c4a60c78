"""Real text as a `Setting`: a pretrained model, demonstrations, comparisons and prompts from files or the Hub."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from experiments.pairs import Examples
from experiments.setting import HELDOUT, PRECISIONS, Comparisons, Setting, Source
from rlhf_jax.batches import Prompts, Rankings, Tokens
from rlhf_jax.data.encode import EncodedRanking, encode_rows
from rlhf_jax.data.formats import Prompt
from rlhf_jax.data.loader import document_batches, mix_once, streamed_batches
from rlhf_jax.data.preferences import pack_rankings, pad_rankings
from rlhf_jax.data.rejects import Rejects
from rlhf_jax.data.rows import Read, find_format, read_rows
from rlhf_jax.data.tokens import Document, bucket, pack_sequences, pad_prompts, pad_sequences, size, take
from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig, load_hf
from rlhf_jax.sharding import hf_shardings, host_share

HELDOUT_SHARE = 0.1
STREAM_HEAD = 2560
"""Documents at the beginning of a streamed source of which some are held out."""


class Reader(NamedTuple):
    """What every source is read with."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    rejects: Rejects
    notes: list[str]

    def formats(
        self, sources: Sequence[str], kind: str, format: str | None, columns: Sequence[str], streaming: bool = False
    ) -> list[str]:
        """The form of each source's rows, which the run will name."""
        found = [find_format(s, kind, format=format, columns=columns, streaming=streaming) for s in sources]
        for source, name in zip(sources, found, strict=True):
            self.notes.append(f"{source}: {kind} in the format {name}")
        return found

    def read(
        self, sources: Sequence[str], kind: str, format: str | None, columns: Sequence[str]
    ) -> list[list[tuple[Read, Any]]]:
        """The usable rows of each source, with their ids."""
        found = []
        for source, name in zip(sources, self.formats(sources, kind, format, columns), strict=True):
            rows = read_rows(source, name, self.rejects, columns=columns)
            found.append(list(encode_rows(rows, self.tokenizer, self.max_length, self.rejects)))
            if not found[-1]:
                reasons = ", ".join(f"{reason} ({rows})" for reason, rows in self.rejects.counts().items())
                raise UserError(f"{source}: no row can be used: {reasons}")
        return found


class Demonstrations(NamedTuple):
    """What SFT learns from, and a part that it does not see."""

    train: Tokens
    validation: Tokens
    batches: Any


def text_setting(source: Source) -> Setting:
    """Real text: a pretrained model, demonstrations and comparisons from files.

    A tenth of the demonstrations, and of the comparisons by the first turn of their conversation, is held out.
    """
    assert source.model and source.demonstrations and source.comparisons
    config, params, tokenizer = load_model(source)
    prompt_length = source.max_length - source.max_new_tokens
    if prompt_length < 8:
        raise UserError(f"--max-new-tokens {source.max_new_tokens} leaves no room for prompts in --max-length")
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rng = np.random.default_rng([source.seed, 0])
    reader = Reader(tokenizer, source.max_length, Rejects(source.on_bad_row), [])
    demonstrate = stream_demonstrations if source.streaming else read_demonstrations
    demonstrations = demonstrate(source, reader, pad_id, rng)
    compared = read_comparisons(source, reader, rng)
    comparisons = make_comparisons(*([ids for _, ids in part] for part in compared), source.max_length, pad_id)
    asked = [[Prompt(read.row.prompt, read.row.place, read.row.tools) for read, _ in part] for part in compared]
    if source.prompts:
        asked = read_prompts(source, reader, rng)
    prompts, heldout = (make_prompts(part, reader, prompt_length, pad_id) for part in asked)
    return Setting(
        config,
        params,
        tokenizer,
        demonstrations=demonstrations.train,
        validation=demonstrations.validation,
        prompts=prompts,
        heldout=take(heldout, np.arange(min(HELDOUT, len(heldout.row)))),
        shifted=None,
        max_new_tokens=source.max_new_tokens,
        compare=lambda sample: comparisons,
        judge=None,
        facts={},
        notes=tuple(reader.notes),
        rejects=reader.rejects,
        batches=demonstrations.batches,
        streaming=source.streaming,
    )


def load_model(source: Source) -> tuple[ModelConfig, Any, PreTrainedTokenizerBase]:
    """The pretrained model and its tokenizer."""
    assert source.model
    try:
        config, params = load_hf(
            source.model, shardings=hf_shardings(source.model), precision=PRECISIONS[source.precision]
        )
        tokenizer = AutoTokenizer.from_pretrained(source.model, local_files_only=Path(source.model).is_dir())
    except (ValueError, OSError) as error:
        raise UserError(str(error).splitlines()[0]) from None
    if source.max_length > config.max_length:
        raise UserError(f"--max-length {source.max_length} is more than the model's {config.max_length}")
    return config, params, tokenizer


def names(sources: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """One source, or several."""
    return (sources,) if isinstance(sources, str) else tuple(sources or ())


def read_demonstrations(source: Source, reader: Reader, pad_id: int, rng: np.random.Generator) -> Demonstrations:
    """All of them in memory; grain shuffles, mixes and packs them."""
    found = reader.read(
        names(source.demonstrations), "demonstrations", source.demonstrations_format, source.demonstrations_columns
    )
    train, validation = [], []
    for rows in found:
        documents = [ids for _, ids in rows]
        documents = [documents[i] for i in rng.permutation(len(documents))]
        cut = max(1, int(HELDOUT_SHARE * len(documents)))
        validation += documents[:cut]
        train.append(documents[cut:])
        if not train[-1]:
            raise UserError(f"{rows[0][0].row.place.source}: too few rows to train on some and hold out others")
    length, weights = source.max_length, source.demonstrations_weights or None

    def batches(batch_size: int, seed: int) -> grain.DatasetIterator[Tokens]:
        share = host_share()
        return document_batches(
            train, batch_size=batch_size // share[1], length=length, pad_id=pad_id, seed=seed, weights=weights,
            shard=share,
        )  # fmt: skip

    if weights:
        batches(host_share()[1], 0)  # refuses wrong weights before anything is trained
    everything = [document for documents in train for document in documents]
    return Demonstrations(
        pack_sequences(everything, length=length, pad_id=pad_id), pad(validation, length, pad_id), batches
    )


def stream_demonstrations(source: Source, reader: Reader, pad_id: int, rng: np.random.Generator) -> Demonstrations:
    """Only the first of each source in memory, for validation and PPO-ptx; the rest is read when it is needed."""
    sources, columns = names(source.demonstrations), source.demonstrations_columns
    formats = reader.formats(sources, "demonstrations", source.demonstrations_format, columns, streaming=True)
    opened, head, validation = [], [], []
    for name, format in zip(sources, formats, strict=True):
        rows = partial(read_rows, name, format, columns=columns, streaming=True)
        begin = encode_rows(
            rows(Rejects(source.on_bad_row)), reader.tokenizer, source.max_length, Rejects(source.on_bad_row)
        )
        first = [(read.number, ids) for read, ids in islice(begin, STREAM_HEAD)]
        step = round(1 / HELDOUT_SHARE)
        heldout = {number for number, _ in first[::step]}
        validation += [ids for _, ids in first[::step]]
        head += [ids for number, ids in first if number not in heldout]
        opened.append(partial(stream, rows, heldout, reader, source.max_length, {"passes": 0}))
    if not head:
        raise UserError(f"{', '.join(sources)}: too few rows to train on some and hold out others")
    length, weights = source.max_length, source.demonstrations_weights or None

    def batches(batch_size: int, seed: int) -> grain.DatasetIterator[Tokens]:
        share = host_share()
        return streamed_batches(
            opened, batch_size=batch_size // share[1], length=length, pad_id=pad_id, seed=seed, weights=weights,
            shard=share,
        )  # fmt: skip

    batches(host_share()[1], 0)
    return Demonstrations(pack_sequences(head, length=length, pad_id=pad_id), pad(validation, length, pad_id), batches)


def stream(
    rows: Any, heldout: set[int], reader: Reader, max_length: int, seen: dict[str, int], start: int
) -> Iterator[tuple[int, Document]]:
    """(number, ids) of a source's rows from `start` on. What cannot be used is counted in the first pass only."""
    rejects = reader.rejects if seen["passes"] == 0 else Rejects("skip")
    for read, ids in encode_rows(rows(rejects, start=start), reader.tokenizer, max_length, rejects):
        if read.number not in heldout:
            yield read.number, ids
    seen["passes"] += 1


def read_comparisons(
    source: Source, reader: Reader, rng: np.random.Generator
) -> tuple[list[tuple[Read, EncodedRanking]], list[tuple[Read, EncodedRanking]]]:
    """Training and held-out comparisons; no conversation begins alike in both."""
    found = reader.read(
        names(source.comparisons), "comparisons", source.comparisons_format, source.comparisons_columns
    )
    if source.comparisons_weights:
        found = [mix_once(found, source.comparisons_weights, seed=source.seed)]
    rows = [row for some in found for row in some]
    parts = part_by_opening(rows, [read.row.prompt for read, _ in rows], rng)
    if not all(parts):
        raise UserError(
            f"{', '.join(names(source.comparisons))}: too few comparisons to train on some and hold out others"
        )
    # The preferred one is not always first: nothing may learn the place.
    return tuple([(read, reordered(ids, rng.permutation(len(ids.ranks)))) for read, ids in part] for part in parts)


def part_by_opening(
    rows: Sequence[Any], prompts: Sequence[Any], rng: np.random.Generator
) -> tuple[list[Any], list[Any]]:
    """Rows to train on, and a tenth of the conversations' openings to hold out."""
    first = [next(turn["content"] for turn in prompt if turn["role"] != "system") for prompt in prompts]
    openings = sorted(set(first))
    kept = max(1, int(HELDOUT_SHARE * len(openings)))
    heldout = {openings[i] for i in rng.permutation(len(openings))[:kept]}
    return tuple([row for row, o in zip(rows, first, strict=True) if (o in heldout) == side] for side in (False, True))


def reordered(ids: EncodedRanking, order: Sequence[int]) -> EncodedRanking:
    """The same ranking with its answers in another order."""
    return ids._replace(responses=[ids.responses[i] for i in order], ranks=tuple(ids.ranks[i] for i in order))


def make_comparisons(
    train: list[EncodedRanking], heldout: list[EncodedRanking], length: int, pad_id: int
) -> Comparisons:
    """Rankings of any number of answers to train on; of the held-out ones the best and the worst answer."""
    ends = [(int(np.argmin(r.ranks)), int(np.argmax(r.ranks))) for r in heldout]
    pairs = [reordered(r, sorted(pair)) for r, pair in zip(heldout, ends, strict=True)]
    answers = max(len(r.ranks) for r in train)

    def padded(rankings: list[EncodedRanking]) -> Rankings:
        longest = max(len(r.prompt) + len(response) for r in rankings for response in r.responses)
        return pad_rankings(rankings, length=bucket(longest, longest=length), pad_id=pad_id)

    def pack(prompts: np.ndarray):
        some = [train[i] for i in prompts]
        return pack_rankings(some, length=length, pad_id=pad_id, answers=answers)

    return Comparisons(padded(train), padded(pairs), {}, pack)


def read_prompts(source: Source, reader: Reader, rng: np.random.Generator) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts of their own for PPO: to train on, and held out."""
    found = reader.read(names(source.prompts), "prompts", source.prompts_format, source.prompts_columns)
    rows = [read.row for some in found for read, _ in some]
    parts = part_by_opening(rows, [row.prompt for row in rows], rng)
    if not all(parts):
        raise UserError(f"{', '.join(names(source.prompts))}: too few prompts to train on some and hold out others")
    return parts


def read_unpaired(
    sources: str | tuple[str, ...], columns: Sequence[str], setting: Setting, max_length: int
) -> tuple[Examples, tuple[str, ...]]:
    """Answers found good or not, for KTO, and as what their files were read."""
    assert setting.rejects is not None
    reader = Reader(setting.tokenizer, max_length, setting.rejects, [])
    found = reader.read(names(sources), "unpaired", None, columns)
    rows = [ids for some in found for _, ids in some]
    good = np.array([[row.good] for row in rows])
    answers = [(row.prompt, row.response) for row in rows]
    return Examples(answers, np.arange(len(rows))[:, None], good), tuple(reader.notes)


def make_prompts(rows: Sequence[Prompt], reader: Reader, length: int, pad_id: int) -> Prompts:
    """Left-padded prompts in the bucket of the longest."""
    reads = [Read(number, row, {}) for number, row in enumerate(rows)]
    quiet = Rejects("skip")  # these rows were counted when they were read
    ids = [ids for _, ids in encode_rows(reads, reader.tokenizer, length, quiet)]
    for reason, count in quiet.notes().items():
        reader.notes.append(f"rollouts: {reason}: {count} of {len(ids)}")
    return pad_prompts(ids, length=bucket(max(map(len, ids)), longest=length), pad_id=pad_id)


def pad(documents: Sequence[Document], length: int, pad_id: int) -> Tokens:
    """One document to a row, in the bucket of the longest."""
    return pad_sequences(documents, length=bucket(max(map(size, documents)), longest=length), pad_id=pad_id)
