"""Rows that cannot be used: they stop the run, or are counted by reason and written down."""

import json

import pytest

from rlhf_jax.data import rejects
from rlhf_jax.data.rejects import Place, Rejects
from rlhf_jax.errors import UserError


def test_by_default_the_run_stops_with_place_reason_and_what_to_do():
    with pytest.raises(UserError, match=r"^f:7: too odd \(--on-bad-row=skip leaves such rows out and counts them\)$"):
        Rejects().reject(Place("f", 7), "too\nodd", {})


def test_skipped_rows_are_counted_by_reason_and_written_down(tmp_path):
    rejects, path = Rejects("skip"), tmp_path / "rejected.jsonl"
    rejects.write_to(path)
    assert not path.exists()
    for line in range(1, 8):
        rejects.reject(Place("f", line), "odd", {"line": line, "half": "\ud800"})
    rejects.reject(Place("f", 1), "odd", {})  # met again in a second pass
    rejects.reject(Place("g", 1), "odd", "x" * 10_000)
    rejects.reject(Place("g", 2), "even", b"raw")
    rejects.note(Place("f", 9), "made shorter")
    rejects.use(Place("f", 9))
    assert rejects.counts() == {"odd": 8, "even": 1} and rejects.notes() == {"made shorter": 1}
    assert rejects.summary() == [
        "f: 1 rows used",
        "f: odd: 7 rows left out (lines 1, 2, 3, 4, 5, …)",
        "f: made shorter: 1 rows (lines 9)",
        "g: 0 rows used",
        "g: odd: 1 rows left out (lines 1)",
        "g: even: 1 rows left out (lines 2)",
    ]
    assert json.loads(json.dumps(rejects.by_source())) == {
        "f": {"read": 8, "used": 1, "left_out": {"odd": 7}, "changed": {"made shorter": 1}},
        "g": {"read": 2, "used": 0, "left_out": {"odd": 1, "even": 1}, "changed": {}},
    }
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(e["source"], e["line"]) for e in entries] == [*(("f", n) for n in range(1, 8)), ("g", 1), ("g", 2)]
    assert json.loads(entries[0]["row"]) == {"line": 1, "half": "\ud800"} and len(entries[7]["row"]) == 4000


def test_what_only_one_row_has_is_said_of_it_and_not_counted_apart(tmp_path):
    rejects = Rejects("skip")
    for line in (1, 2):
        rejects.reject(Place("f", line), "too long", {}, detail=f"it has\n{line}")
    rejects.write_to(tmp_path / "rejected.jsonl")
    entries = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert rejects.counts() == {"too long": 2} and [entry["detail"] for entry in entries] == ["it has 1", "it has 2"]
    with pytest.raises(UserError, match=r"^f:1: too long: it has 1 \("):
        Rejects().reject(Place("f", 1), "too long", {}, detail="it has 1")


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path):
    path = tmp_path / "rejected.jsonl"
    first = Rejects("skip")
    first.write_to(path)
    for line in (1, 2):
        first.reject(Place("f", line), "odd", {})
    with open(path, "a") as file:
        file.write('{"torn')
    second = Rejects("skip")
    second.reject(Place("f", 2), "odd", {})  # read again before the run's folder is known
    second.write_to(path)
    second.reject(Place("f", 1), "odd", {})
    second.reject(Place("f", 3), "odd", {})
    assert second.counts() == {"odd": 3}
    whole = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    assert [entry["line"] for entry in whole] == [1, 2, 3]


def test_what_other_sources_had_in_the_file_stays_and_is_not_counted(tmp_path):
    path = tmp_path / "rejected.jsonl"
    first = Rejects("skip")
    first.write_to(path)
    first.reject(Place("f", 1), "odd", {})
    second = Rejects("skip")
    second.write_to(path, sources={"g"})
    second.reject(Place("g", 1), "even", {})
    assert second.counts() == {"even": 1} and list(second.by_source()) == ["g"]
    assert [json.loads(line)["source"] for line in path.read_text().splitlines()] == ["f", "g"]


def test_a_row_that_is_nested_too_deeply_to_be_written_is_counted_all_the_same(tmp_path):
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    rejects = Rejects("skip")
    rejects.reject(Place("f", 1), "deep", {"a": nested})
    rejects.write_to(tmp_path / "rejected.jsonl")
    assert json.loads((tmp_path / "rejected.jsonl").read_text())["line"] == 1


def test_what_another_host_has_left_out_is_counted_beyond_the_rows_that_it_keeps(monkeypatch):
    monkeypatch.setattr(rejects, "PENDING", 2)
    other, own = Rejects("skip"), Rejects("skip")
    for line in range(1, 6):
        other.reject(Place("a", line), "odd" if line % 2 else "even", {})
    other.note(Place("a", 7), "shorter")
    other.use(Place("a", 7))
    own.reject(Place("a", 8), "odd", {})
    told = json.loads(json.dumps(other.told()))
    assert len(told["rejected"]) == 2
    own.hear(told)
    assert own.counts() == {"odd": 4, "even": 2} and own.notes() == {"shorter": 1} and own.used == {"a": 1}
