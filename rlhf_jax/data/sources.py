"""Where rows come from: jsonl[.gz], json and parquet files, folders of them, saved `datasets`, names on the Hub.

A source is written "name_or_path[:split]". A file or a folder never touches the network. Rows are read one after the
other, so that a source may be larger than memory.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data.rejects import Place
from rlhf_jax.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "validation": "validation",
    "valid": "validation", "val": "validation", "dev": "validation", "eval": "evaluation", "evaluation": "evaluation",
}  # fmt: skip
"""Words of a file's name that say of which split it is."""
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"


class Broken(NamedTuple):
    """A row that is not an object with fields, and why."""

    reason: str
    text: str


Item = tuple[Place, dict[str, Any] | Broken]


def read_source(source: str, *, start: int = 0, streaming: bool = False, order: int | None = None) -> Iterator[Item]:
    """(place, fields or what is wrong) of every row from number `start` (from 0) on.

    `streaming` reads a set on the Hub row by row instead of downloading it first; files always are. The files of a
    folder, and those of a set that is streamed, come by their names, or in the random order of a seed, `order`. Rows
    of such a set are then counted as they come.
    Raises UserError when the source itself is at fault: missing, empty, damaged, a folder of several splits.
    """
    path, split = _parse(source)
    if path is None:
        name, _, rest = source.partition(":")
        yield from _from_hub(name, rest or None, start, streaming, order)
    elif path.is_dir() and _saved(path):
        yield from _from_datasets(_opened(path), str(path), split, start)
    else:
        files = _files(path, split) if path.is_dir() else [path]
        if order is not None:
            files = [files[n] for n in np.random.default_rng(order).permutation(len(files))]
        rows = _not_empty(path, (item for file in files for item in _from_file(file)))
        yield from islice(rows, start, None)


def local_files(source: str) -> list[Path] | None:
    """The files that a source's rows are read from; None for one on the Hub. Raises UserError for a wrong one."""
    path, split = _parse(source)
    if path is None or not path.is_dir():
        return None if path is None else [path]
    return sorted(file for file in path.rglob("*") if file.is_file()) if _saved(path) else _files(path, split)


def _parse(source: str) -> tuple[Path | None, str | None]:
    """The path of a local source, None for one on the Hub, and the split."""
    if not source.strip() or "\0" in source:
        raise UserError("the name of a data source is empty" if not source.strip() else "a NUL in a source's name")
    if Path(source).expanduser().exists():
        return Path(source).expanduser(), None
    name, colon, split = source.partition(":")
    path = Path(name).expanduser()
    if path.exists():
        if not path.is_dir():
            raise UserError(f"{source}: a file has no splits")
        if colon and not split:
            raise UserError(f"{source}: the split after the colon is missing")
        return path, split
    if (
        name.startswith((".", "/", "~"))
        or name.endswith(SUFFIXES)
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+){0,2}", name)
    ):
        raise UserError(f"{name}: No such file or directory")
    return None, None


def _files(folder: Path, split: str | None) -> list[Path]:
    """The data files of a folder, of one split."""
    names = sorted(
        path
        for path in folder.rglob("*")
        if path.name.endswith(SUFFIXES) and path.is_file() and not any(p.startswith(".") for p in path.parts[-3:])
    )
    if not names:
        raise UserError(f"{folder}: Is a directory without data files ({', '.join(SUFFIXES)})")
    words = {path: re.split(r"[^a-z0-9]+", str(path.relative_to(folder)).lower()) for path in names}
    if split is not None:
        chosen = [path for path in names if split.lower() in words[path]]
        if not chosen:
            raise UserError(f"{folder}: no file of split {split!r} among {_some(path.name for path in names)}")
        return chosen
    found = {SPLITS.get(next((word for word in words[path] if word in SPLITS), ""), "others") for path in names}
    if len(found) > 1:
        raise UserError(
            f"{folder}: holds several splits ({', '.join(sorted(found))}): say which, as in {folder}:train"
        )
    return names


def _from_file(path: Path) -> Iterator[Item]:
    try:
        with open(path, "rb") as file:
            head = file.read(4)
        if head == PARQUET:
            yield from _parquet(path)
        else:
            with gzip.open(path, "rb") if head[:2] == GZIP else open(path, "rb") as file:
                yield from _json(path, file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def _json(path: Path, file: Any) -> Iterator[Item]:
    """Lines of JSON objects; a .json file may also be one array of them."""
    number = 0
    try:
        for number, raw in enumerate(file, 1):
            if (
                number == 1
                and path.name.endswith((".json", ".json.gz"))
                and raw.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["
            ):
                yield from _array(path, raw + file.read())
                return
            if raw.strip():
                yield Place(str(path), number), _object(raw, "utf-8-sig" if number == 1 else "utf-8")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged gzip file after line {number}: {error}") from None


def _object(raw: bytes, encoding: str) -> dict[str, Any] | Broken:
    try:
        row = json.loads(raw.decode(encoding))
    except UnicodeDecodeError:
        return Broken("not UTF-8 text", raw.decode("utf-8", "replace"))
    except RecursionError:
        return Broken("JSON nested too deeply", raw.decode("utf-8", "replace"))
    except ValueError as error:
        return Broken(f"not JSON: {getattr(error, 'msg', error)}", raw.decode("utf-8", "replace"))
    return _fields(row)


def _fields(row: Any) -> dict[str, Any] | Broken:
    if isinstance(row, dict):
        return row
    return Broken(f"a JSON {type(row).__name__}, not an object with fields", json.dumps(row))


def _array(path: Path, content: bytes) -> Iterator[Item]:
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON array: {error}") from None
    yield from ((Place(str(path), number), _fields(row)) for number, row in enumerate(rows, 1))


def _parquet(path: Path) -> Iterator[Item]:
    import pyarrow
    import pyarrow.parquet

    done = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                rows = batch.to_pylist()
                yield from ((Place(str(path), n), without_gaps(row)) for n, row in enumerate(rows, done + 1))
                done += len(rows)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged parquet file after row {done}: {_first_line(error)}") from None


def _saved(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote this folder."""
    return any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))


def _opened(folder: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:
        raise UserError(f"{folder}: cannot be read as a saved dataset: {_first_line(error)}") from None


def _from_hub(name: str, split: str | None, start: int, streaming: bool, order: int | None) -> Iterator[Item]:
    """Rows of "owner/name" or "owner/name/config"; whatever the Hub answers becomes one line."""
    import datasets

    parts = name.split("/")
    config = parts[2] if len(parts) == 3 else None
    try:
        opened = datasets.load_dataset("/".join(parts[:2]), config, split=split, streaming=streaming)
    except Exception as error:
        raise UserError(
            f"{name}: there is no such file or folder here, and from the Hub: {_first_line(error)}"
        ) from None
    if split and not isinstance(opened, dict):
        name, split = f"{name}:{split}", None
    yield from _from_datasets(opened, name, split, start, order)


def _from_datasets(opened: Any, name: str, split: str | None, start: int, order: int | None = None) -> Iterator[Item]:
    import datasets

    if isinstance(opened, dict):
        if split is None and len(opened) > 1:
            raise UserError(f"{name}: holds several splits ({', '.join(opened)}): say which, as in {name}:train")
        split = next(iter(opened)) if split is None else split
        if split not in opened:
            raise UserError(f"{name}: no split {split!r}, only {', '.join(opened)}")
        opened, name = opened[split], f"{name}:{split}"
    elif split is not None:
        raise UserError(f"{name}: was saved without splits, so there is no {split!r}")
    if order is not None and isinstance(opened, datasets.IterableDataset):
        opened = opened.shuffle(seed=order, buffer_size=1)  # its files, and no row among others
    if start and isinstance(opened, datasets.Dataset) and start >= len(opened):
        return  # nothing is left, which `skip` would call an error
    items = _counted(opened.skip(start) if start else opened, name, start)
    yield from items if start else _not_empty(name, items)


def _counted(rows: Iterable[Any], name: str, start: int) -> Iterator[Item]:
    number = start
    try:
        for number, row in enumerate(rows, start + 1):
            yield Place(name, number), _fields(without_gaps(row))
    except Exception as error:  # whatever a reader of some format, or the network, has to say
        raise UserError(f"{name}: cannot be read after row {number}: {_first_line(error)}") from None


def without_gaps(row: Any) -> Any:
    """A row out of Arrow without the keys that it fills in nested objects: another row's, null in this one.

    A column that is null stays.
    """
    return {name: _filled(value) for name, value in row.items()} if isinstance(row, dict) else row


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _filled(item) for name, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


def _not_empty(name: object, items: Iterable[Item]) -> Iterator[Item]:
    empty = True
    for item in items:
        empty = False
        yield item
    if empty:
        raise UserError(f"{name}: the file has no rows")


def _some(names: Iterable[str]) -> str:
    first = list(islice(names, 6))
    return ", ".join(first[:5]) + (", …" if len(first) > 5 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
