"""How fast rows become ids, what memory that takes, and how fast it is the second time; with --stream, a soak.

    python experiments/bench/encoding.py --model FOLDER --kind demonstrations --file FILE
    python experiments/bench/encoding.py --model FOLDER --kind demonstrations --file FILE --rows 1000000 --stream

With --rows the rows of the file are repeated, each with its number in front. Rows a core-second count the time of all
processes. The stream is read to its end; in its middle its state is kept, and another stream that begins at that state
has to give the same batches.
"""

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from experiments.ablations.memory import process_memory
from rlhf_jax.batches import RankedAnswers
from rlhf_jax.cli import run_main
from rlhf_jax.data.encode import encode_rows
from rlhf_jax.data.encoders import default_processes, encode_many
from rlhf_jax.data.loader import streamed_batches, streamed_parts
from rlhf_jax.data.rejects import Rejects
from rlhf_jax.data.rows import find_format, read_rows
from rlhf_jax.data.sources import read_source
from rlhf_jax.data.store import stored
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.models.tokenizer import read_tokenizer
from rlhf_jax.tasks.asked import Asked
from rlhf_jax.tasks.streams import prompt_opener

TEXTS = ("prompt", "instruction", "question", "chosen")


@dataclass(frozen=True)
class Config:
    """Encodes rows, and says how fast."""

    model: str
    """A folder with a tokenizer."""
    file: str
    kind: Literal["demonstrations", "comparisons", "prompts"] = "demonstrations"
    rows: int | None = None
    """Repeat the rows of the file until there are so many."""
    num_proc: int | None = None
    max_length: int = 1024
    stream: bool = False
    batch_size: int = 8
    """Packed rows, comparisons or prompts a batch of the stream."""
    step_seconds: float = 0.0
    """Seconds between two batches of the stream, as a training step takes them."""

    def __post_init__(self) -> None:
        at_least(self, max_length=16, batch_size=1, step_seconds=0)
        for name in ("rows", "num_proc"):
            if getattr(self, name) is not None:
                at_least(self, **{name: 1})


def repeated(file: str, rows: int, folder: Path) -> str:
    """A file of so many rows, those of another one over and over, each with its number in front of its first text.

    Raises UserError for a row without a text.
    """
    given = [row for _, row in read_source(file) if isinstance(row, dict)]
    path = folder / "rows.jsonl"
    with open(path, "w", encoding="utf-8") as out:
        for number, row in enumerate(islice(cycle(given), rows)):
            name = next((name for name in TEXTS if isinstance(row.get(name), str)), None)
            if name is None:
                raise UserError(f"{file}: a row without any of {', '.join(TEXTS)}")
            changed = {name: f"{number}. {row[name]}"} if name != "chosen" else {}
            out.write(json.dumps({**row, **changed}) + "\n")
    return str(path)


def core_seconds() -> float:
    """Processor time of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def encode(cfg: Config, file: str, cache: Path) -> None:
    """Encodes the rows twice: the second time they are found."""
    tokenizer, form = read_tokenizer(Path(cfg.model)), find_format(file, cfg.kind)
    processes = cfg.num_proc or default_processes()
    for again in (False, True):
        gc.collect()
        held, began, used = process_memory("RssAnon"), time.perf_counter(), core_seconds()

        def rows(rejects: Rejects) -> Any:
            return encode_many(read_rows(file, form, rejects), tokenizer, cfg.max_length, rejects, processes=processes)

        found = stored(file, (form, cfg.max_length), tokenizer, rows, Rejects("skip"), cache)
        seconds, cores = time.perf_counter() - began, core_seconds() - used
        count, tokens = len(found.ids), sum(map(tokens_of, islice(found.ids, 0, None, 100))) * 100
        said = "found" if again else f"{count / cores:,.0f} rows a core-second"
        print(
            f"{count:,} rows, about {tokens / 1e6:.1f} million tokens: {seconds:.2f} s with {processes} processes,"
            f" {said}; {(process_memory('RssAnon') - held) / 1e6:.0f} MB more memory",
            flush=True,
        )


def tokens_of(ids: Any) -> int:
    """Tokens of a row: of a document, of a prompt and its answers, or of a prompt alone."""
    if isinstance(ids, RankedAnswers):
        return len(ids.prompt) + sum(map(len, ids.responses))
    return sum(map(len, ids)) if isinstance(ids, tuple) else len(ids)


def soak(cfg: Config, file: str) -> None:
    """Streams the rows once; says the memory ten times, and compares what follows the state of the middle.

    Raises UserError without a number of rows.
    """
    tokenizer, form = read_tokenizer(Path(cfg.model)), find_format(file, cfg.kind)
    if not cfg.rows:
        raise UserError("--stream needs --rows")
    packed = cfg.kind == "demonstrations"

    def ids_of(start: int, one: Any) -> Iterator[tuple[int, Any]]:
        rejects = Rejects("skip")
        rows = read_rows(file, form, rejects, start=start, order=one.order, shard=one.shard)
        yield from ((read.number, ids) for read, ids in encode_rows(rows, tokenizer, cfg.max_length, rejects))

    opened: Any = ids_of
    if cfg.kind == "prompts":  # with their rows, as training has them
        opened = prompt_opener(
            partial(read_rows, file, form), tokenizer, cfg.max_length, Asked(), heldout=(), counted=Rejects("skip"),
            left_out=Rejects("skip"), in_order=False,
        )  # fmt: skip

    def stream() -> Any:
        if not packed:
            return streamed_parts([opened], list, batch_size=cfg.batch_size, seed=0)
        return streamed_batches([opened], batch_size=cfg.batch_size, length=cfg.max_length, pad_id=0, seed=0)

    batches, seen, said, middle = stream(), 0, 0, None
    following: list[Any] = []
    began, longest = time.perf_counter(), 0.0
    while seen < cfg.rows:
        if middle is None and seen >= cfg.rows // 2:
            middle = json.loads(json.dumps(batches.get_state()))
        asked = time.perf_counter()
        batch = next(batches)
        longest = max(longest, time.perf_counter() - asked) if seen else 0.0
        time.sleep(cfg.step_seconds)
        seen += len(batch) if not packed else int(batch.segment_ids.max(axis=1).sum())
        if middle is not None and len(following) < 3:
            following.append(batch)
        if seen >= said * cfg.rows // 10:
            speed = seen / (time.perf_counter() - began)
            print(f"{seen:,} rows, {process_memory('RssAnon') / 1e6:.0f} MB, {speed:,.0f} rows a second", flush=True)
            said += 1
    again = stream()
    again.set_state(middle)
    same = all(
        np.array_equal(x, y) if packed else x == y
        for batch in following
        for x, y in zip(batch, next(again), strict=True)
    )
    print(f"{seen:,} rows; the longest wait for a batch {longest:.2f} s; resumed in the middle: "
          + ("the same batches" if same else "OTHER BATCHES"))  # fmt: skip


def main(cfg: Config) -> None:
    """Encodes, or streams."""
    with tempfile.TemporaryDirectory() as folder:
        file = repeated(cfg.file, cfg.rows, Path(folder)) if cfg.rows else cfg.file
        if cfg.stream:
            soak(cfg, file)
        else:
            encode(cfg, file, Path(folder))


if __name__ == "__main__":
    run_main(main, Config)
