"""Rows of a source: how many are read, how far reading is, and what of a row is kept beside its form."""

import gzip
import json
import os

import datasets
import pytest

from rlhf_jax.data import rows as reading
from rlhf_jax.data.formats import recognise
from rlhf_jax.data.rejects import Rejects
from rlhf_jax.data.rows import find_format, read_rows, reported
from rlhf_jax.errors import UserError

COLUMNS = ("prompt=question",)
GOOD, BAD = {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("limit", "start", "numbers", "left_out"),
    [
        (None, 0, [0, 2, 4, 5], 2),
        (1, 0, [0], 0),
        (2, 0, [0, 2], 1),
        (9, 0, [0, 2, 4, 5], 2),
        (2, 1, [2], 1),  # the first two usable rows of the source, not of what is left
        (3, 3, [4], 1),
        (2, 3, [], 0),
        (None, 3, [4, 5], 1),
    ],
)
def test_a_limit_is_of_a_sources_first_usable_rows(tmp_path, limit, start, numbers, left_out):
    path = write(tmp_path / "x.jsonl", [GOOD, BAD, GOOD, BAD, GOOD, GOOD])
    rejects = Rejects("skip")
    found = read_rows(path, "prompt_completion", rejects, limit=limit, start=start)
    assert [read.number for read in found] == numbers
    assert sum(rejects.counts().values()) == left_out


def test_reading_stops_at_the_limit(tmp_path, monkeypatch):
    # The end of the file is damaged: whoever stops before never meets it.
    lines = (json.dumps(GOOD | {"noise": os.urandom(400).hex()}) + "\n" for _ in range(1000))
    (tmp_path / "x").write_bytes(gzip.compress("".join(lines).encode())[:-20])
    path = str(tmp_path / "x")
    assert len(list(read_rows(path, "prompt_completion", Rejects(), limit=50))) == 50
    with pytest.raises(UserError, match="damaged"):
        list(read_rows(path, "prompt_completion", Rejects()))
    # A stream of the Hub: not one row more is asked for.
    taken = []

    def rows():
        for number in range(10):
            taken.append(number)
            yield GOOD

    opened = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: opened)
    found = list(read_rows("owner/set:train", "prompt_completion", Rejects(), limit=3, streaming=True))
    assert [read.number for read in found] == taken == [0, 1, 2]


def test_how_far_reading_is_is_said_now_and_then(monkeypatch):
    clock = iter([0.0, *(0.4 * n for n in range(1, 2501))])
    monkeypatch.setattr(reading.time, "monotonic", lambda: next(clock))
    said = []
    assert list(reported(range(2500), "demonstrations", said.append, every_seconds=500.0)) == list(range(2500))
    assert said == ["demonstrations: 1,250 rows read", "demonstrations: 2,500 rows read"]
    monkeypatch.undo()
    assert list(reported([1, 2], "x", said.append, every_seconds=60.0)) == [1, 2] and len(said) == 2


def test_what_a_reward_needs_is_beside_the_prompt(tmp_path, shared_data):
    """GSM8K's question is a prompt; its answer stays with the row, as do tests and whatever else there is."""
    path = str(shared_data / "math" / "gsm8k.test.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        source = [json.loads(line) for line in file]
    assert find_format(path, "prompts", columns=COLUMNS) == "prompts"
    found = list(read_rows(path, "prompts", Rejects(), columns=COLUMNS))
    assert [read.fields for read in found] == source
    assert [read.row.prompt[0]["content"] for read in found] == [row["question"].strip() for row in source]
    tested = {"prompt": "add", "tests": ["assert add(1, 2) == 3"], "completion": "x", "chosen": "y", "n": None}
    path = write(tmp_path / "x.jsonl", [tested])
    [read] = read_rows(path, find_format(path, "prompts"), Rejects())
    assert read.fields == tested and read.row.prompt[0]["content"] == "add"
    assert recognise({"question", "answer"}, "prompts") == "questions"
    assert recognise({"query", "answer"}, "prompts") is None
    # A checker's column may have another name in the file.
    path = write(tmp_path / "y.jsonl", [{"prompt": "add", "Right": "3"}])
    [read] = read_rows(path, "prompts", Rejects(), columns=("answer=Right",))
    assert read.fields == {"prompt": "add", "Right": "3", "answer": "3"}
