"""A run's folder: who may write it, and who may go on in it."""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax import cli
from rlhf_jax.cli import run_main
from rlhf_jax.errors import UserError
from rlhf_jax.log import Run
from rlhf_jax.metrics import read_metrics


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    keep: int = 3


@dataclass(frozen=True)
class Config:
    run_dir: str | None = None
    resume: bool = False
    steps: int = 30
    inner: Inner = field(default_factory=Inner)
    names: tuple[str, ...] = ()
    save_every: int = 0
    accept_changes: bool = False


def test_runs_get_fresh_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        with Run(None, Config(), name="ppo") as run:
            assert run.dir == Path("runs") / f"ppo-{number}"


def test_a_used_folder_is_refused_unless_resumed(tmp_path):
    with Run(tmp_path, Config(run_dir="a"), name="test") as run:
        run.log("sft", 1, {"loss": 1.0})
        run.save("sft", 1, {"w": np.ones(2)})
        run.log("sft", 2, {"loss": 2.0})
    with pytest.raises(UserError, match=r"already holds something.*--resume"):
        Run(tmp_path, Config(), name="test")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "sft", "st')  # what a kill leaves
    with Run(tmp_path, Config(run_dir="b", resume=True), name="test", resume=True) as run:
        assert run.restore("sft", {"w": np.zeros(2)})[1] == 1
        run.log("sft", 1, {"loss": 10.0})  # is there, and stays
        run.log("sft", 2, {"loss": 20.0})
        run.log("sft", 3, {"loss": 3.0})
    assert [row["loss"] for row in read_metrics(tmp_path)["sft"]] == [1.0, 20.0, 3.0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"experiment": "ppo", "steps": 30}', ["a run of the experiment ppo", "which sft cannot resume"]),
        ('{"steps": 30}', ["config.json names no experiment", "older version"]),
        ("{broken", ["config.json names no experiment", "damaged"]),
    ],
)
def test_another_experiment_does_not_resume_a_run_nor_touch_it(tmp_path, config, words):
    with Run(tmp_path / "run", Config(), name="ppo"):
        pass
    (tmp_path / "run" / "config.json").write_text(config)
    before = content(tmp_path)
    with pytest.raises(UserError) as caught:
        Run(tmp_path / "run", Config(accept_changes=True), name="sft", resume=True)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    assert content(tmp_path) == before


def test_changed_flags_are_refused_each_by_name_unless_they_are_accepted(tmp_path, capsys):
    with Run(tmp_path, Config(names=("a",)), name="test"):
        pass
    changed = Config(steps=31, inner=Inner(rate=0.25), names=("a", "b"))
    before = content(tmp_path)
    with pytest.raises(UserError) as caught:
        Run(tmp_path, changed, name="test", resume=True)
    lines = (
        "--steps was 30 and is 31 now",
        "--inner.rate was 0.5 and is 0.25 now",
        "--names was ['a'] and is ['a', 'b']",
    )
    for line in (*lines, "--accept-changes"):
        assert line in str(caught.value)
    assert content(tmp_path) == before
    with Run(tmp_path, replace(changed, accept_changes=True), name="test", resume=True):
        pass
    said = capsys.readouterr().out
    assert all(f"resumed although {line}" in said for line in lines)
    with Run(tmp_path, changed, name="test", resume=True):  # which is what it is from now on
        pass


def test_flags_that_change_nothing_of_what_is_learned_may_differ_at_any_depth(tmp_path, capsys):
    with Run(tmp_path, Config(), name="test"):
        pass
    other = Config("elsewhere", resume=True, save_every=5, inner=Inner(keep=7))
    with Run(tmp_path, other, name="test", resume=True):
        pass
    assert "warning" not in capsys.readouterr().out


def test_a_resumed_run_has_the_flags_that_it_was_started_with(tmp_path, monkeypatch):
    def flags(*given):
        monkeypatch.setattr(sys, "argv", ["program", "--run-dir", str(tmp_path), *given])
        seen = []
        run_main(seen.append, Config)
        return seen[0]

    begun = flags("--steps", "7", "--inner.rate", "0.25", "--names", "a", "b", "--accept-changes")
    Run(tmp_path, begun, name="test")
    assert flags("--steps", "8") == Config(str(tmp_path), steps=8)
    # To accept changes is told anew each time.
    assert flags("--resume", "--steps", "9") == Config(str(tmp_path), True, 9, Inner(0.25), ("a", "b"))

    # Of another experiment, which is refused later: fields are missing, are gone, or are something else.
    (tmp_path / "config.json").write_text('{"steps": 5, "gone": 1, "inner": null, "names": {"a": 1}}')
    assert flags("--resume") == Config(str(tmp_path), True, 5)
    (tmp_path / "config.json").write_text("{broken")
    assert flags("--resume") == Config(str(tmp_path), True)


def test_which_of_many_processes_it_is_a_program_is_told_each_time(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Spread(Config):
        hosts: str | None = None

    joined = []
    monkeypatch.setattr(cli, "start", joined.append)

    def program(config, *given):
        monkeypatch.setattr(sys, "argv", ["program", "--run-dir", str(tmp_path), *given])
        run_main(lambda cfg: Run(cfg.run_dir, cfg, resume=cfg.resume, name="test"), config)

    program(Spread, "--hosts", "10.0.0.1:8476,4,0")
    program(Spread, "--resume")
    program(Config, "--resume")  # it has no such flag, and works by itself
    assert joined == ["10.0.0.1:8476,4,0", None]


def test_what_cannot_be_resumed_or_made_is_said_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, resume, message in [
        (None, True, "--resume needs --run-dir"),
        (tmp_path / "no", True, "no run to resume"),
        (tmp_path / "file", False, "is a file"),
        (tmp_path / "file" / "below", False, "cannot be made"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            Run(folder, Config(), resume=resume, name="test")
        assert "\n" not in str(caught.value)
