"""Encoded rows on the disk are those in memory: made once, and again where anything that they rest on changes."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import AutoTokenizer

from rlhf_jax import hosts
from rlhf_jax.data import encoders, store
from rlhf_jax.data.encode import encode_rows
from rlhf_jax.data.encoders import encode_many
from rlhf_jax.data.lazy import Lazy, joined, picked
from rlhf_jax.data.rejects import Rejects
from rlhf_jax.data.rows import read_rows
from rlhf_jax.errors import UserError

LENGTH = 60


@pytest.fixture(scope="module")
def tokenizer(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "model" / "stories260K-hf")


@pytest.fixture
def file(tmp_path):
    """Forty comparisons; row 3 has an empty answer, row 5 a long one, row 7 a field that nothing reads."""
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"what is {n}?", "chosen": f"it is {n}", "rejected": f"not {n}"} for n in range(40)]
    rows[2]["chosen"], rows[4]["chosen"] = " ", "long " * 200
    rows[6]["other"] = {"deep": [1, None]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Opened:
    """A source as a run opens it; how often its rows were encoded."""

    def __init__(self, tokenizer, cache):
        self.tokenizer, self.cache, self.encoded = tokenizer, cache, 0

    def rows(self, file, rejects):
        return encode_rows(read_rows(str(file), "preference", rejects), self.tokenizer, LENGTH, rejects)

    def open(self, file, rejects, form=("preference", LENGTH)):
        def encode(own):
            self.encoded += 1
            return self.rows(file, own)

        return store.stored(str(file), form, self.tokenizer, encode, rejects, self.cache)


@pytest.fixture
def opened(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "WORTH_KEEPING", 0.0)
    return Opened(tokenizer, store.open_cache(str(tmp_path / "cache")))


def test_what_is_found_is_what_was_made(opened, file, tmp_path):
    """Rows, ids, and everything that is said of them; a second time nothing is encoded."""
    expected_rejects = Rejects("skip")
    expected = list(opened.rows(file, expected_rejects))
    for times in (1, 2):
        rejects = Rejects("skip")
        found = opened.open(file, rejects)
        assert opened.encoded == 1 and len(found.ids) == len(expected) == 38
        assert list(zip(found.reads, found.ids, strict=True)) == expected
        assert rejects.by_source() == expected_rejects.by_source() and rejects.summary() == expected_rejects.summary()
        rejects.write_to(tmp_path / f"rejected-{times}.jsonl")
        lines = [json.loads(line) for line in (tmp_path / f"rejected-{times}.jsonl").read_text().splitlines()]
        assert [line["line"] for line in lines] == [3, 5] and '"it is' not in lines[0]["row"]
    assert found.reads[4].fields["other"] == {"deep": [1, None]}  # rows 2 and 4, counted from 0, are left out
    assert len(set(found.openings)) == 38 and all(len(opening) == 16 for opening in found.openings)


def test_a_bad_row_stops_a_run_also_where_another_run_has_skipped_it(opened, file):
    opened.open(file, Rejects("skip"))
    with pytest.raises(UserError, match=r"rows\.jsonl:3: empty answer"):
        opened.open(file, Rejects("stop"))
    assert opened.encoded == 1


def test_rows_that_stop_a_run_leave_nothing(opened, file):
    with pytest.raises(UserError, match=r"rows\.jsonl:3"):
        opened.open(file, Rejects("stop"))
    assert list(opened.cache.iterdir()) == []


@pytest.mark.parametrize("change", ["content", "form", "template", "special", "split", "code", "day"])
def test_what_the_ids_rest_on_makes_them_anew(opened, file, monkeypatch, change):
    tokenizer = AutoTokenizer.from_pretrained(opened.tokenizer.name_or_path)
    opened.tokenizer = tokenizer
    if change == "day":
        tokenizer.chat_template = (tokenizer.chat_template or "") + "{{ strftime_now('%Y') }}"
    opened.open(file, Rejects("skip"))
    if change == "content":
        file.write_text(file.read_text() + file.read_text().splitlines()[0] + "\n")
    if change == "template":
        tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    if change == "special":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    if change == "split":
        tokenizer.split_special_tokens = True
    if change == "code":
        monkeypatch.setattr(store, "_code", lambda: ["another"])
    if change == "day":
        store.clock.keep("2031-01-01T00:00:00")
    try:
        opened.open(file, Rejects("skip"), ("preference", LENGTH + (change == "form")))
    finally:
        if change == "day":
            store.clock.release()
    assert opened.encoded == 2


@pytest.mark.parametrize("file_name", ["ids", "openings.ends", "said.json", "reads"])
@pytest.mark.parametrize("gone", [False, True])
def test_a_damaged_store_is_made_again(opened, file, file_name, gone):
    expected = list(opened.open(file, Rejects("skip")).ids)
    (folder,) = opened.cache.iterdir()
    path = folder / file_name
    path.unlink() if gone else path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):
        assert list(opened.open(file, Rejects("skip")).ids) == expected
    assert opened.encoded == 2


def test_a_file_that_changes_while_it_is_read_is_not_kept(opened, file):
    rows = opened.rows

    def changing(file, rejects):
        yield from rows(file, rejects)
        file.write_text(file.read_text() + "\n")

    opened.rows = changing
    opened.open(file, Rejects("skip"))
    assert list(opened.cache.iterdir()) == []


def test_of_two_processes_at_once_each_has_its_rows(opened, file):
    rows, other = opened.rows, Opened(opened.tokenizer, opened.cache)

    def slower(file, rejects):
        yield from rows(file, rejects)
        other.open(file, Rejects("skip"))  # is there first

    opened.rows = slower
    found = opened.open(file, Rejects("skip"))
    assert len(found.ids) == 38 and len(list(opened.cache.iterdir())) == 1


def test_an_encoding_tokenizer_has_the_key_of_a_new_one(opened, file):
    """A call sets truncation and padding in the tokenizer's own algorithm."""
    opened.tokenizer = AutoTokenizer.from_pretrained(opened.tokenizer.name_or_path)
    opened.open(file, Rejects("skip"))
    opened.tokenizer("a", truncation=True, max_length=5)
    opened.open(file, Rejects("skip"))
    assert opened.encoded == 1


def test_a_template_that_asks_the_time_otherwise_is_not_kept(opened, file):
    opened.tokenizer = AutoTokenizer.from_pretrained(opened.tokenizer.name_or_path)
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    opened.tokenizer.chat_template = "{% set f = '%H' %}{{ strftime_now(f) }}" + turns
    opened.open(file, Rejects("skip"))
    assert list(opened.cache.iterdir()) == []


def test_the_oldest_go_where_there_are_too_many(opened, file, monkeypatch):
    opened.open(file, Rejects("skip"))
    monkeypatch.setattr(store, "MOST", 100)
    store.open_cache(str(opened.cache))
    assert list(opened.cache.iterdir()) == []


def test_a_full_disk_is_one_line(opened, file, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_write", full)
    with pytest.raises(UserError, match=r"cannot be written to .*: No space left on device; --rows-cache"):
        opened.open(file, Rejects("skip"))
    assert list(opened.cache.iterdir()) == []


def test_what_is_quick_is_not_kept(opened, file, monkeypatch):
    monkeypatch.setattr(store, "WORTH_KEEPING", 1000.0)
    found = opened.open(file, Rejects("skip"))
    assert list(opened.cache.iterdir()) == [] and found.ids[0].ranks == (0, 1)  # mapped, though the files are gone


def test_stores_that_nobody_reads_go(opened, file):
    opened.open(file, Rejects("skip"))
    (folder,) = opened.cache.iterdir()
    long_ago = time.time() - 40 * 24 * 3600
    os.utime(folder, (long_ago, long_ago))
    opened.open(file, Rejects("skip"))  # which is reading it
    assert store.open_cache(str(opened.cache)) and list(opened.cache.iterdir()) == [folder]
    mine = opened.cache / "thesis"  # a folder that is also used for something else
    mine.mkdir()
    for path in (folder, mine):
        os.utime(path, (long_ago, long_ago))
    assert store.open_cache(str(opened.cache)) and list(opened.cache.iterdir()) == [mine]


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--rows-cache: .*file.* is no folder that can be written"):
        store.open_cache(str(tmp_path / "file" / "under"))
    assert store.open_cache("none") is None


def test_processes_give_the_rows_of_one_in_their_order(tokenizer, file, monkeypatch):
    monkeypatch.setattr(encoders, "MANY", 4)
    monkeypatch.setattr(encoders, "CHUNK", 3)
    found = []
    for processes in (1, 2):
        rejects = Rejects("skip")
        rows = read_rows(str(file), "preference", rejects)
        found.append((list(encode_many(rows, tokenizer, LENGTH, rejects, processes=processes)), rejects.summary()))
    assert found[0] == found[1] and len(found[0][0]) == 38


def test_several_processes_stop_at_the_first_bad_row(tokenizer, file, monkeypatch):
    """Which is not the one that is seen first: rows are read ahead of those that are encoded."""
    monkeypatch.setattr(encoders, "MANY", 2)
    monkeypatch.setattr(encoders, "CHUNK", 4)
    lines = file.read_text().splitlines()
    lines[2], lines[4], lines[30] = lines[1], json.dumps({**json.loads(lines[4]), "chosen": "long " * 200}), "{"
    file.write_text("\n".join(lines) + "\n")
    rejects = Rejects("stop")
    rows = read_rows(str(file), "preference", rejects)
    with pytest.raises(UserError, match=r"rows\.jsonl:5: response too long"):
        list(encode_many(rows, tokenizer, LENGTH, rejects, processes=2))


class Hosts:
    """Threads that stand for hosts; each is `place()` of what runs in it, and they meet where they exchange bytes."""

    def __init__(self, count, monkeypatch):
        self.count, self.here, self.met, self.said = count, threading.local(), threading.Barrier(count), [b""] * count
        for name in ("place", "gather_bytes"):
            monkeypatch.setattr(hosts, name, getattr(self, name))
        monkeypatch.setattr(hosts, "many", lambda: True)

    def place(self):
        return self.here.number, self.count

    def gather_bytes(self, said):
        self.said[self.here.number] = said
        self.met.wait(60)
        heard = list(self.said)
        self.met.wait(60)
        return heard

    def run(self, function):
        """function() in each; their values, or the UserError that they raised."""

        def of(number):
            self.here.number = number
            try:
                return function()
            except UserError as error:
                return error

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(of, range(self.count)))


@pytest.mark.parametrize("processes", [1, 2])
def test_hosts_encode_their_shares_and_have_the_rows_of_all(tokenizer, file, monkeypatch, processes):
    """Forty rows in chunks of three over three hosts: the last round has a row for the first one only."""
    monkeypatch.setattr(encoders, "MANY", 3)
    monkeypatch.setattr(encoders, "CHUNK", 3)
    rejects = Rejects("skip")
    expected = list(encode_rows(read_rows(str(file), "preference", rejects), tokenizer, LENGTH, rejects))
    together, encoded, own = Hosts(3, monkeypatch), [], encoders.outcome

    def outcome(row, *args):
        encoded.append((together.here.number, row.place.line))
        return own(row, *args)

    monkeypatch.setattr(encoders, "outcome", outcome)

    def opened():
        rejects = Rejects("skip")
        rows = read_rows(str(file), "preference", rejects)
        return list(encode_many(rows, tokenizer, LENGTH, rejects, processes=processes)), rejects.summary()

    for found, summary in together.run(opened):
        assert found == expected and summary == rejects.summary()
    if processes == 1:  # else others do it
        assert len(encoded) == len(set(encoded)) and len({line for _, line in encoded}) == len(encoded)
        assert {number for number, _ in encoded} == {0, 1, 2}


def test_what_goes_wrong_on_one_host_is_said_by_all(tokenizer, file, monkeypatch):
    monkeypatch.setattr(encoders, "MANY", 3)
    monkeypatch.setattr(encoders, "CHUNK", 3)
    together, own = Hosts(2, monkeypatch), encoders.outcome

    def outcome(row, *args):
        if together.here.number == 1:
            raise UserError("a disk is gone")
        return own(row, *args)

    monkeypatch.setattr(encoders, "outcome", outcome)

    def opened():
        rows = read_rows(str(file), "preference", Rejects("skip"))
        return list(encode_many(rows, tokenizer, LENGTH, Rejects("skip"), processes=1))

    found = together.run(opened)
    assert [str(error) for error in found] == ["a disk is gone"] * 2


def test_where_one_host_lacks_a_store_all_encode(opened, file, monkeypatch):
    """They would wait for each other at different places."""
    opened.open(file, Rejects("skip"))
    for have, times in ((True, 1), (False, 2)):
        monkeypatch.setattr(store, "gather", lambda kept, have=have: [kept, have])
        opened.open(file, Rejects("skip"))
        assert opened.encoded == times


@pytest.mark.parametrize("executable", ["/bin/false", "/nowhere"])
def test_a_process_that_cannot_start_is_told_of(tokenizer, file, monkeypatch, executable):
    monkeypatch.setattr(encoders, "MANY", 4)
    monkeypatch.setattr(encoders.sys, "executable", executable)
    rows = read_rows(str(file), "preference", Rejects("skip"))
    with pytest.raises(UserError, match="a process that encodes rows"):
        list(encode_many(rows, tokenizer, LENGTH, Rejects("skip"), processes=2))


def test_a_process_that_dies_is_told_of(tokenizer, file, monkeypatch):
    monkeypatch.setattr(encoders, "MANY", 4)
    start = encoders._Encoder.__init__

    def started(self, *args):
        start(self, *args)
        self._process.kill()
        self._process.wait()

    monkeypatch.setattr(encoders._Encoder, "__init__", started)
    rows = read_rows(str(file), "preference", Rejects("skip"))
    with pytest.raises(UserError, match="a process that encodes rows has ended"):
        list(encode_many(rows, tokenizer, LENGTH, Rejects("skip"), processes=2))


def test_lazy_sequences():
    rows = Lazy(5, lambda n: n * 10)
    assert list(rows) == [0, 10, 20, 30, 40] and rows[-1] == 40 and list(rows[1:3]) == [10, 20]
    assert list(picked(rows, [3, 1])) == [30, 10]
    assert list(joined([rows, [], rows[:2], ["x"]])) == [0, 10, 20, 30, 40, 0, 10, "x"]
    with pytest.raises(IndexError):
        rows[5]
