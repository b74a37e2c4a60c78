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
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax import clock
from rlhf_jax.data.heldout import opening_of_row
from rlhf_jax.data.lazy import Lazy
from rlhf_jax.data.rejects import Place, Rejects
from rlhf_jax.data.rows import Read
from rlhf_jax.data.sources import local_files
from rlhf_jax.data.tokenizer import PreTrainedTokenizerBase
from rlhf_jax.errors import UserError

WORTH_KEEPING = 2.0
"""Seconds: what is encoded faster is not kept for the next run."""
UNUSED = 30
"""Days after which a store that nobody has read goes."""
FILES = ("reads", "ids", "openings")


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
    Raises UserError for a source without a row that can be used, and under the policy "stop" for a bad row.
    """
    folder = _folder(cache, source, form, tokenizer) if cache is not None and keep else None
    if folder is not None and (folder / "said.json").exists():
        os.utime(folder)
        _replay(folder, rejects)
        return _opened(folder)
    began = time.monotonic()
    with _temporary(cache) as temporary:
        own = Rejects(rejects.policy)
        own.write_to(temporary / "rejected.jsonl")
        _write(temporary, encode(own))
        (temporary / "said.json").write_text(json.dumps(own.changes()), encoding="utf-8")
        _replay(temporary, rejects)
        found = _opened(temporary)
        if folder is not None and time.monotonic() - began >= WORTH_KEEPING and not folder.exists():
            os.replace(temporary, folder)
        return found


def default_cache() -> Path:
    """A folder in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rlhf_jax" / "rows"


def open_cache(folder: str | None) -> Path | None:
    """The cache in a folder, by default in the user's cache folder; None for "none", and where a home is read-only.

    Stores that nobody has read for a month go. Raises UserError for a folder that cannot be written.
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
    for old in path.iterdir():
        try:
            if time.time() - old.stat().st_mtime > UNUSED * 24 * 3600 and old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
        except OSError:  # another process has removed it
            continue
    return path


class _temporary:
    """A new folder, in the cache if there is one. It goes at the end, unless it was moved."""

    def __init__(self, cache: Path | None):
        self._cache = cache

    def __enter__(self) -> Path:
        self._path = Path(tempfile.mkdtemp(prefix=".rows-", dir=self._cache))
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


def _opened(folder: Path) -> Stored:
    if not (folder / FILES[0]).stat().st_size:
        return Stored((), (), ())
    return Stored(*(_mapped(folder / name) for name in FILES))


def _replay(folder: Path, rejects: Rejects) -> None:
    """Tells of the rows that are not used as they stand, as when they were encoded."""
    for entry in _entries(folder / "rejected.jsonl"):
        place = Place(entry["source"], entry["line"])
        rejects.reject(place, entry["reason"], entry["row"], detail=entry.get("detail", ""))
    rejects.add(json.loads((folder / "said.json").read_text(encoding="utf-8")))


def _entries(file: Path) -> Iterator[dict[str, Any]]:
    if file.exists():
        with open(file, encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def _folder(cache: Path, source: str, form: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> Path | None:
    """The place of a store; None for a source whose content cannot be told beforehand."""
    files = local_files(source)
    if files is None:
        return None
    template = str(tokenizer.chat_template)
    fast = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = fast.to_str() if fast is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    parts = [
        source, json.dumps(form), type(tokenizer).__name__, template, str(tokenizer.special_tokens_map), vocabulary,
        clock.now().date().isoformat() if "strftime_now" in template else "", *_code(),
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


def _code() -> list[str]:
    """The code that makes ids of rows, and the versions of what it stands on."""
    import tokenizers
    import transformers

    own = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    return [*own, tokenizers.__version__, transformers.__version__]
