"""Fingerprints, commits, and what is shown of them."""

import os
import subprocess

import pytest

from rlhf_jax import provenance
from rlhf_jax.errors import UserError
from rlhf_jax.provenance import card_facts, commit, fingerprint, in_words, shown_name


def write(path, text="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_fingerprint_of_a_file_is_that_of_its_content(tmp_path):
    one, same, other = (write(tmp_path / name, text) for name, text in (("a", "x"), ("b", "x"), ("c", "y")))
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    assert fingerprint(one)["bytes"] == 1 and len(fingerprint(one)["sha256"]) == 64
    with pytest.raises(UserError, match="no cannot be read: No such file"):
        fingerprint(tmp_path / "no")


@pytest.mark.parametrize(
    ("name", "matters"),
    [
        ("config.json", True), ("data/train.jsonl", True), ("new.safetensors", True),
        ("README.md", False), (".git/HEAD", False), ("data/.part", False),
    ],
)  # fmt: skip
def test_a_fingerprint_of_a_folder_is_that_of_what_matters_in_it(tmp_path, name, matters):
    write(tmp_path / "config.json", "{}"), write(tmp_path / "data" / "train.jsonl", "{}")
    before = fingerprint(tmp_path)
    write(tmp_path / name, "other")
    assert (fingerprint(tmp_path) != before) == matters


def test_a_file_that_is_renamed_in_a_folder_is_a_change(tmp_path):
    path = write(tmp_path / "a.jsonl")
    before = fingerprint(tmp_path)
    path.rename(tmp_path / "b.jsonl")
    assert fingerprint(tmp_path) != before


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize(("at", "seen"), [(0, True), (50, False), (99, True)])
def test_of_what_is_large_the_ends_and_the_size_count(tmp_path, monkeypatch, folder, at, seen):
    monkeypatch.setattr(provenance, "LARGE", 64), monkeypatch.setattr(provenance, "END", 10)
    path = write(tmp_path / "model" / "weights", "x" * 100)
    of = path.parent if folder else path
    before = fingerprint(of)
    content = bytearray(path.read_bytes())
    content[at] += 1
    path.write_bytes(content)
    assert (fingerprint(of) != before) == seen
    path.write_text("x" * 101)
    assert fingerprint(of) != before


def test_a_source_may_name_a_split_or_a_function(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "reward.py")
    found = provenance.inputs({"reward": "reward.py:score", "model": "owner/model", "none": None})
    assert found["reward"] == [{"name": "reward.py:score", **fingerprint("reward.py")}]
    assert found["model"] == [{"name": "owner/model"}] and found["none"] is None


def git(folder, *arguments):
    command = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_that_of_the_checkout_the_package_lies_in(tmp_path):
    package = write(tmp_path / "package" / "__init__.py")
    unknown = {"commit": None, "clean": None}
    assert commit(package) == unknown
    write(tmp_path / "mine.py")
    git(tmp_path, "init")
    git(tmp_path, "add", "mine.py")
    git(tmp_path, "commit", "-m", "x")
    assert commit(package) == unknown  # lies in it, but is not of it
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "x")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert commit(package) == {"commit": head, "clean": True}
    write(tmp_path / "runs" / "sft-1" / "config.json")
    assert commit(package) == {"commit": head, "clean": True}
    write(tmp_path / "experiments" / "new.py")
    assert commit(package) == {"commit": head, "clean": False}
    os.remove(tmp_path / "experiments" / "new.py")
    write(package, "changed")
    assert commit(package) == {"commit": head, "clean": False}


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit() == {"commit": None, "clean": None}


def test_others_see_no_folder_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "owner" / "here")
    names = {
        str(tmp_path / "gone" / "a.jsonl"): "a.jsonl", "~/x/b": "b", "../c/d": "d", "owner/here": "here",
        "runs/sft-1/policy": "policy", "owner/model": "owner/model", "owner/set:train": "owner/set:train", "x": "x",
    }  # fmt: skip
    for name, shown in names.items():
        assert shown_name(name) == shown
    run = {
        "experiment": "ppo",
        "inputs": {"model": [{"name": f"{tmp_path}/secret/m", "bytes": 3, "sha256": "ab" * 32}], "prompts": None},
        "data": {f"{tmp_path}/secret/d.jsonl": {"read": 15000, "left out": 3}},
        "sessions": [{"commit": "old"}, {
            "commit": "c0ffee", "clean": False, "devices": "1 x cpu", "command": f"ppo.py --model {tmp_path}/secret/m",
            "packages": {"rlhf_jax": "0.2.0", "jax": "0.10", "optax": None},
        }],
    }  # fmt: skip
    assert card_facts(run) == {
        "Made by": "ppo of rlhf_jax 0.2.0",
        "Commit": "c0ffee, with changes that are not in it",
        "Versions": "jax 0.10",
        "Devices": "1 x cpu",
        "Counts of data": "d.jsonl (read: 15,000, left out: 3)",
        "Learned from": "model: m with SHA-256 abababababab",
    }
    assert card_facts({}) == {"Made by": "rlhf_jax"}
    assert in_words({"a": {"x": 1}, "b": [True, 2.5]}) == "a (x: 1), b: True, 2.5"
