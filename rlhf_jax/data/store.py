"""Encoded rows on the disk: a source is encoded once, and every later run, stage or resume begins at once.

A store is a folder with the rows, the ids and the openings of their conversations, each behind the other in a file
that is mapped into memory, and what was said of the rows. Memory holds only where each of them ends. The folder's name
is a hash of all that the ids depend on: the content of the files, their form, the tokenizer with its chat template,
the length, and the code. Rows are pickles, as safe as the programs that are kept beside them.
"""

import hashlib
import json
import mmap
import os
import pickle
import re
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax import clock
from rlhf_jax.data.heldout import opening_of_row
from rlhf_jax.data.lazy import Lazy, joined, picked
from rlhf_jax.data.rejects import Rejects
from rlhf_jax.data.rows import Read
from rlhf_jax.data.sources import local_files
from rlhf_jax.data.tokenizer import PreTrainedTokenizerBase
from rlhf_jax.errors import UserError
from rlhf_jax.hosts import gather

WORTH_KEEPING = 2.0
"""Seconds: what is encoded faster is not kept for the next run."""
UNUSED = 30
"""Days after which a store that nobody has read goes."""
MOST = 50 * 10**9
"""Bytes of all stores of a cache."""
FILES = ("reads", "ids", "openings")
BEGUN, NAME = ".rows-", re.compile(r"[0-9a-f]{32}|\.rows-\w+")
"""How a store is called while it is made, and how stores are called."""


class Stored(NamedTuple):
    """A source's usable rows."""

    reads: Sequence[Read]
    ids: Sequence[Any]
    """The ids that `encode_rows` gives."""
    openings: Sequence[str]
    """`opening_of_row` of each."""


def _mapped(path: Path) -> Lazy[Any]:
    """Pickles behind each other in a file that is mapped into memory."""
    ends = np.fromfile(f"{path}.ends", np.int64)
    with open(path, "rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if len(data) != ends[-1]:
        raise ValueError(f"{path} is not whole")

    def load(at: int) -> Any:
        return pickle.loads(data[int(ends[at - 1]) if at else 0 : int(ends[at])])

    return Lazy(len(ends), load)


def stored(
    source: str,
    form: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    encode: Callable[[Rejects], Iterable[tuple[Read, Any]]],
    rejects: Rejects,
    cache: Path | None,
    *,
    keep: bool = True,
) -> Stored:
    """The usable rows of a source, found in the cache or made by `encode(rejects)`; `rejects` hears of the others.

    `form` is all that the ids depend on beside the source, the tokenizer and the code, as JSON. Where they are not
    kept, without a cache, and for a source on the Hub, the rows are in files all the same, which go with the process.
    Raises UserError under the policy "stop" for a bad row, and where there is no room on the disk.
    """
    files = local_files(source) if cache is not None and keep else None
    before = None if files is None else _stamps(files)
    folder = None if cache is None or files is None else _folder(cache, source, files, form, tokenizer)
    kept = None if folder is None else _kept(folder)
    if all(gather(kept is not None)):  # where one host has to encode, all do
        assert kept is not None
        found, said = kept
        rejects.hear(said)
        return found
    began = time.monotonic()
    with _temporary(cache) as temporary:
        own = Rejects(rejects.policy)
        own.write_to(temporary / "rejected.jsonl")
        try:
            _write(temporary, encode(own))
            (temporary / "said.json").write_text(json.dumps(own.changes()), encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{source}: its rows cannot be written to {temporary}: {error.strerror or error}; --rows-cache names a"
                " folder elsewhere"
            ) from None
        found, said = _opened(temporary)
        rejects.hear(said)
        lasted = time.monotonic() - began
        if folder is not None and files is not None and lasted >= WORTH_KEEPING and _stamps(files) == before:
            with suppress(OSError):  # another process has made it by now
                os.replace(temporary, folder)
        return found


def together(sources: Sequence[Stored]) -> Stored:
    """The rows of all sources."""
    return Stored(*(joined(parts) for parts in zip(*sources, strict=True)))


def of_numbers(rows: Stored, numbers: Sequence[int]) -> Stored:
    """Some of the rows, in the order of their numbers."""
    return Stored(*(picked(part, numbers) for part in rows))


def default_cache() -> Path:
    """A folder in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlhf_jax" / "rows"


def open_cache(folder: str | None) -> Path | None:
    """The cache in a folder, by default in the user's cache folder; None for "none", and where a home is read-only.

    Stores that nobody has read for a month go, and the oldest beyond 50 GB. Raises UserError for a folder that cannot
    be written.
    """
    if folder == "none":
        return None
    path = default_cache() if folder is None else Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        writable = os.access(path, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        if folder is None:
            return None
        raise UserError(f"--rows-cache: {path} is no folder that can be written")
    _prune(path)
    return path


def _prune(cache: Path) -> None:
    """Removes stores that nobody has read for a month, and the oldest ones where all take more than `MOST`."""
    room = MOST
    ages = []
    for folder in cache.iterdir():
        if not NAME.fullmatch(folder.name):  # somebody else's
            continue
        with suppress(OSError):  # another process has removed it
            ages.append((folder.stat().st_mtime, folder))
    for used, folder in sorted(ages, reverse=True):
        with suppress(OSError):
            room -= sum(file.stat().st_size for file in folder.iterdir())
        begun = folder.name.startswith(BEGUN)  # perhaps by a process that goes on with it
        if (room < 0 and not begun) or time.time() - used > UNUSED * 24 * 3600:
            shutil.rmtree(folder, ignore_errors=True)


class _temporary:
    """A new folder, in the cache if there is one. It goes at the end, unless it was moved."""

    def __init__(self, cache: Path | None):
        self._cache = cache

    def __enter__(self) -> Path:
        self._path = Path(tempfile.mkdtemp(prefix=BEGUN, dir=self._cache))
        return self._path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._path, ignore_errors=True)  # files that are mapped stay until they are not


def _write(folder: Path, rows: Iterable[tuple[Read, Any]]) -> None:
    ends = [array("q") for _ in FILES]
    files = [open(folder / name, "wb") for name in FILES]
    try:
        for read, ids in rows:
            for file, end, element in zip(files, ends, (read, ids, opening_of_row(read.row)), strict=True):
                file.write(pickle.dumps(element, protocol=5))
                end.append(file.tell())
    finally:
        for file in files:
            file.close()
    for name, end in zip(FILES, ends, strict=True):
        (folder / f"{name}.ends").write_bytes(end.tobytes())


def _kept(folder: Path) -> tuple[Stored, dict[str, Any]] | None:
    """A store that was kept, and what is to be told of its rows; None where it is not there, or not whole."""
    try:
        found = _opened(folder)
        os.utime(folder)
    except (OSError, ValueError):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return found


def _opened(folder: Path) -> tuple[Stored, dict[str, Any]]:
    """Maps a store. Raises OSError or ValueError for one that is not there, or not whole."""
    changes = json.loads((folder / "said.json").read_text(encoding="utf-8"))
    rejected = folder / "rejected.jsonl"
    lines = rejected.read_text(encoding="utf-8").split("\n") if rejected.exists() else []
    said = {**changes, "rejected": [json.loads(line) for line in lines if line]}
    if not (folder / f"{FILES[0]}.ends").stat().st_size:
        return Stored((), (), ()), said
    return Stored(*(_mapped(folder / name) for name in FILES)), said


def _folder(
    cache: Path, source: str, files: Sequence[Path], form: Sequence[Any], tokenizer: PreTrainedTokenizerBase
) -> Path | None:
    """The place of a store; None for a tokenizer or a template of which it cannot be told what they will do."""
    fast, template = getattr(tokenizer, "backend_tokenizer", None), str(tokenizer.chat_template)
    dates = re.findall(r"strftime_now\(\s*(?:'([^']*)'|\"([^\"]*)\")\s*\)", template)
    if fast is None or len(dates) != template.count("strftime_now"):
        return None
    algorithm = json.loads(fast.to_str()) | {"truncation": None, "padding": None}  # which are set for each call
    moment = [clock.now().strftime(a or b) for a, b in dates]
    parts = [
        source, json.dumps(form), type(tokenizer).__name__, template, str(tokenizer.special_tokens_map),
        str(tokenizer.split_special_tokens), json.dumps(algorithm), str(moment), *_code(),
    ]  # fmt: skip
    digest = hashlib.sha256()
    for part in [*(part.encode("utf-8", "surrogatepass") for part in parts), *map(_content, files)]:
        digest.update(hashlib.sha256(part).digest())
    return cache / digest.hexdigest()[:32]


def _content(file: Path) -> bytes:
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None


def _stamps(files: Sequence[Path]) -> list[tuple[int, int] | None]:
    """Size and time of each file: one that has changed meanwhile has others."""
    found: list[tuple[int, int] | None] = []
    for file in files:
        try:
            found.append(((stat := file.stat()).st_size, stat.st_mtime_ns))
        except OSError:
            found.append(None)
    return found


def _code() -> list[str]:
    """The code that makes ids of rows and the forms that they have, and the versions of what it stands on."""
    folder = Path(__file__).parent
    own = [path.read_text(encoding="utf-8") for path in (*sorted(folder.glob("*.py")), folder.parent / "batches.py")]
    return [*own, *map(version, ("tokenizers", "transformers", "jinja2"))]
