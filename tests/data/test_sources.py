"""Where rows come from: files, folders, saved sets, the Hub; and files that are broken."""

import gzip
import json
from itertools import islice

import datasets
import pytest

from rlhf_jax.data.rejects import Place, Rejects
from rlhf_jax.data.rows import find_format, read_rows
from rlhf_jax.data.sources import Broken, read_source
from rlhf_jax.errors import UserError

ROWS = [{"prompt": f"p{i}", "completion": "é" * (i + 1)} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
GOOD = b'{"prompt": "a", "completion": "b"}\n'


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def fields(source, **options):
    return [row for _, row in read_source(str(source), **options)]


@pytest.fixture
def local(tmp_path):
    """The same five rows in every form of a local source."""
    write(tmp_path / "a.jsonl", LINES)
    write(tmp_path / "zipped.jsonl", gzip.compress(b"\xef\xbb\xbf" + LINES))
    write(tmp_path / "a.json", json.dumps(ROWS, indent=1).encode())
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(tmp_path / "splits")
    write(tmp_path / "folder" / "train-0.jsonl", LINES[: LINES.index(b"\n") + 1])
    write(tmp_path / "folder" / "train-1.jsonl.gz", gzip.compress(LINES[LINES.index(b"\n") + 1 :]))
    write(tmp_path / "folder" / ".hidden.jsonl", b"{")
    write(tmp_path / "folder" / "readme.txt", b"{")
    return tmp_path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "zipped.jsonl", "a.json", "a.parquet", "saved", "splits", "splits:train", "folder"]
)
def test_every_kind_of_source_gives_the_same_rows_from_any_number_on(local, name):
    source = f"{local}/{name}"
    assert find_format(source, "demonstrations") == "prompt_completion"
    for start in range(len(ROWS) + 1):
        assert fields(source, start=start) == ROWS[start:]
        reads = list(read_rows(source, "prompt_completion", Rejects(), start=start))
        assert [read.number for read in reads] == list(range(start, len(ROWS)))
    places = [place.line for place, _ in read_source(source)]
    assert places == ([1, 1, 2, 3, 4] if name == "folder" else [1, 2, 3, 4, 5])


def test_a_blank_line_is_no_row_but_counts_as_a_line(tmp_path):
    path = write(tmp_path / "x", GOOD + b"\n  \n" + GOOD)
    assert [place for place, _ in read_source(str(path))] == [Place(str(path), 1), Place(str(path), 4)]


def test_splits_of_a_folder_are_chosen_by_name(tmp_path):
    for name, text in [("train", b"1"), ("test", b"2"), ("data/validation-0", b"3")]:
        write(tmp_path / f"{name}.jsonl", GOOD.replace(b"b", text))
    with pytest.raises(
        UserError, match=r"holds several splits \(test, train, validation\): say which, as in .*:train"
    ):
        fields(tmp_path)
    for split, text in [("train", "1"), ("test", "2"), ("validation", "3")]:
        assert fields(f"{tmp_path}:{split}") == [{"prompt": "a", "completion": text}]
    for source, reason in [
        (f"{tmp_path}:dev", "no file of split 'dev' among"),
        (f"{tmp_path}:", "the split after the colon is missing"),
        (f"{tmp_path}/train.jsonl:train", "a file has no splits"),
    ]:
        with pytest.raises(UserError, match=reason):
            fields(source)


def test_splits_of_a_saved_set(tmp_path):
    one, two = (datasets.Dataset.from_list([row]) for row in ROWS[:2])
    datasets.DatasetDict(train=one, test=two).save_to_disk(tmp_path / "saved")
    assert fields(f"{tmp_path}/saved:test") == [ROWS[1]]
    with pytest.raises(UserError, match=r"several splits \(train, test\)"):
        fields(tmp_path / "saved")
    with pytest.raises(UserError, match="no split 'dev', only train, test"):
        fields(f"{tmp_path}/saved:dev")
    one.save_to_disk(tmp_path / "single")
    with pytest.raises(UserError, match="was saved without splits, so there is no 'train'"):
        fields(f"{tmp_path}/single:train")
    next((tmp_path / "single").glob("*.arrow")).write_bytes(b"torn")
    with pytest.raises(UserError, match="single: cannot be read as a saved dataset"):
        fields(tmp_path / "single")


def test_a_name_on_the_hub(monkeypatch):
    asked = []

    def load(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        rows = datasets.Dataset.from_list(ROWS)
        rows = rows.to_iterable_dataset() if streaming else rows
        return rows if split else {"train": rows, "test": rows}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert fields("owner/set:train[:50%]", start=2) == ROWS[2:]
    [first, *_] = read_source("owner/set/config:test", streaming=True)
    assert first == (Place("owner/set/config:test", 1), ROWS[0])
    assert asked == [("owner/set", None, "train[:50%]", False), ("owner/set", "config", "test", True)]
    with pytest.raises(UserError, match=r"owner/set: holds several splits \(train, test\): say which"):
        fields("owner/set")

    def broken(*_, **__):
        def rows():
            yield ROWS[0]
            raise ConnectionError("gone\naway")

        return rows()

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(UserError, match=r"^owner/set:train: cannot be read after row 1: gone$"):
        fields("owner/set:train", streaming=True)

    def absent(*_, **__):
        raise FileNotFoundError("no such set\nat all")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(
        UserError, match=r"^owner/set: there is no such file or folder here, and from the Hub: no such"
    ):
        fields("owner/set")


def test_files_of_a_streamed_set_come_in_the_order_of_a_seed(tmp_path, monkeypatch):
    files = [tmp_path / f"{n}.jsonl" for n in range(6)]
    for n, file in enumerate(files):
        file.write_text("".join(json.dumps({"file": n, "row": row}) + "\n" for row in range(3)))
    opened = datasets.load_dataset(
        "json", data_files=list(map(str, files)), split="train", streaming=True, cache_dir=str(tmp_path / "cache")
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: opened)
    by_name, first, again, second = (fields("owner/set:train", streaming=True, order=n) for n in (None, 0, 0, 1))
    assert by_name == [{"file": n, "row": row} for n in range(6) for row in range(3)]
    assert first == again != second and first != by_name
    assert fields("owner/set:train", streaming=True, order=0, start=7) == first[7:]
    for some in (first, second):  # the rows of each file in their order
        assert sorted(some, key=lambda row: row["file"]) == by_name


def test_a_path_never_becomes_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    for source in (f"{tmp_path}/no", "./no", "no.jsonl", "no.parquet", "a/b/c/d", "two words"):
        with pytest.raises(UserError, match="No such file or directory"):
            fields(source)
    with pytest.raises(UserError, match="Is a directory without data files"):
        fields(tmp_path)
    for source in ("", " ", "a\0b"):
        with pytest.raises(UserError, match="name"):
            fields(source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x: the file has no rows"),
        (b"\n \n", "x: the file has no rows"),
        (gzip.compress(GOOD * 5000)[:-20], "x: damaged gzip file after line"),
        (b"\x1f\x8bnot gzip", "x: damaged gzip file after line 0"),
        (b"PAR1 and nothing more", "x: damaged parquet file after row 0"),
        (b'{"question": "a"}\n', "x:1: fields question; known demonstrations are: messages"),
        (b"{bad\n", "x:1: not JSON: "),
    ],
)
def test_a_broken_file_is_named_in_one_line_under_any_policy(tmp_path, content, message):
    path = str(write(tmp_path / "x", content))
    with pytest.raises(UserError, match=message) as caught:
        list(read_rows(path, find_format(path, "demonstrations"), Rejects("skip")))
    assert "\n" not in str(caught.value)


def test_a_broken_array_is_named(tmp_path):
    for content, message in [(b"[{", "not a JSON array"), (b"[\xff]", "not UTF-8 text"), (b"[]", "has no rows")]:
        with pytest.raises(UserError, match=message):
            fields(write(tmp_path / "x.json", content))
    rows = fields(write(tmp_path / "y.json", b'[1, {"a": 2}]'))
    assert rows == [Broken("a JSON int, not an object with fields", "1"), {"a": 2}]


BROKEN_LINES = [
    (b"{bad", "not JSON: "),
    (b'{"prompt": "a"}', "field 'completion' is missing"),
    (b'{"prompt": "a", "completion": 3}', "field 'completion' is int, not text"),
    (b"[1]", "a JSON list, not an object"),
    (b'{"prompt": "\xff", "completion": "b"}', "not UTF-8"),
    (b'{"prompt": "\\ud800", "completion": "b"}', "prompt: a lone surrogate"),
    (b'{"prompt": ' + b"[" * 100_000, "JSON nested too deeply"),
    (b'{"prompt": "a", "completion": "b", "n": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
]


@pytest.mark.parametrize(("line", "reason"), BROKEN_LINES, ids=lambda value: str(value)[:30])
def test_a_broken_line_stops_the_run_or_is_counted(tmp_path, line, reason):
    path = str(write(tmp_path / "x", GOOD + b"\n" + line + b"\n" + GOOD))
    with pytest.raises(UserError) as caught:
        list(read_rows(path, "prompt_completion", Rejects()))
    text = str(caught.value)
    assert text.startswith(f"{path}:3: {reason}") and "--on-bad-row=skip" in text and "\n" not in text
    rejects = Rejects("skip")
    assert [read.number for read in read_rows(path, "prompt_completion", rejects)] == [0, 2]
    [(found, count)] = rejects.counts().items()
    assert found.startswith(reason) and count == 1
    rejects.write_to(tmp_path / "rejected.jsonl")
    entry = json.loads((tmp_path / "rejected.jsonl").read_text())
    assert entry["source"] == path and entry["line"] == 3 and entry["reason"] == found and entry["row"]


def test_a_source_is_read_row_by_row(tmp_path):
    # The second half is broken: whoever reads only the first rows never meets it.
    path = write(tmp_path / "x", gzip.compress(GOOD * 100_000)[:-20])
    assert len(list(islice(read_source(str(path)), 10))) == 10
