"""A run writes what it did, where it came from and how it ended."""

import json
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlhf_jax
from rlhf_jax import checkpoint, clock, provenance
from rlhf_jax.compiled import count_compilations
from rlhf_jax.data.templates import run_template
from rlhf_jax.errors import UserError
from rlhf_jax.log import Run


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5


@dataclass(frozen=True)
class Config:
    resume: bool = False
    steps: int = 30
    inner: Inner = field(default_factory=Inner)
    accept_changes: bool = False


def strict(line):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_a_run_leaves_config_metrics_events_and_status(tmp_path):
    with Run(tmp_path / "run", Config(), name="x") as run:
        run.log("sft", 1, {"loss": jnp.float32(0.25), "count": np.int64(3), "odd": float("nan"), "up": jnp.inf})
        # Flushed at once: a run that is killed here can be read.
        line = strict((run.dir / "metrics.jsonl").read_text())
        run.summary({"final": np.float32(1.5), "odd": float("-inf")})
        assert strict((run.dir / "status.json").read_text()) == {"status": "running"}
    assert line.pop("time") > 1e9
    assert line == {"stage": "sft", "step": 1, "loss": 0.25, "count": 3, "odd": None, "up": None}
    assert strict((run.dir / "summary.json").read_text()) == {"final": 1.5, "odd": None}
    assert strict((run.dir / "status.json").read_text()) == {"status": "finished"}
    config = strict((run.dir / "config.json").read_text())
    assert list(config.items())[:2] == [("experiment", "x"), ("version", rlhf_jax.__version__)]
    assert config["steps"] == 30 and config["inner"] == {"rate": 0.5}


def test_a_vector_is_not_a_metric(tmp_path):
    with (
        Run(tmp_path / "run", Config(), name="test") as run,
        pytest.raises(ValueError, match=r"'loss' has shape \(2,\)"),
    ):
        run.log("sft", 1, {"loss": jnp.zeros(2)})


def test_a_fault_is_not_hidden(tmp_path):
    with pytest.raises(ZeroDivisionError), Run(tmp_path, Config(), name="test"):
        raise ZeroDivisionError
    assert strict((tmp_path / "status.json").read_text()) == {"status": "failed"}


def test_compilations_are_counted():
    f = jax.jit(lambda x: x * 2.5)
    with count_compilations() as compilations:
        for length in (3, 4, 3, 4):
            f(np.ones(length))
        inside = compilations()
    f(np.ones(5))
    assert inside == 2 and compilations() == 2


def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_one_line(tmp_path, monkeypatch):
    """Also the last one, which is written while the run ends."""

    def full(folder):
        raise OSError(28, "No space left on device")

    with Run(tmp_path, Config(), name="test") as run:
        run.save("sft", 1, {"w": np.ones(2)})
    monkeypatch.setattr(checkpoint, "files_in", full)
    for steps in ((2, 3), (2,)):
        with pytest.raises(UserError, match=r"sft/2 was not written: No space left on device; those before it"):
            with Run(tmp_path, Config(resume=True), resume=True, name="test") as run:
                for step in steps:
                    run.save("sft", step, {"w": np.ones(2)})
        assert strict((tmp_path / "status.json").read_text()) == {"status": "failed"}
        assert [one.name for one in (tmp_path / "checkpoints" / "sft").iterdir()] == ["1"]
    assert checkpoint.latest(tmp_path, "sft") == 1


def test_a_damaged_checkpoint_is_named_set_aside_and_never_written_over(tmp_path, capsys):
    with Run(tmp_path, Config(), name="test") as run:
        for step in (1, 2, 3):
            run.log("sft", step, {"w": step})
            run.save("sft", step, {"w": jnp.full(2, step)})
    damaged = tmp_path / "checkpoints" / "sft" / "3" / "arrays" / "manifest.ocdbt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    mine = jnp.zeros(2, int)
    with Run(tmp_path, Config(), resume=True, name="test") as run:
        state, first = run.restore("sft", {"w": mine})
        assert first == 2 and state["w"][0] == 2
        assert mine.is_deleted()  # never both in memory
        run.log("sft", 3, {"w": 3})
        run.save("sft", 3, state, keep=1)
    assert "sft/3 is damaged, arrays/manifest.ocdbt is not what was written; it is now 3.damaged" in (
        capsys.readouterr().out
    )
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "sft").iterdir()) == ["3", "3.damaged"]
    assert [json.loads(line)["step"] for line in open(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def run_json(folder):
    return strict((folder / "run.json").read_text())


def test_run_json_says_where_a_run_came_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["experiments/x.py", "--note", "two words"])
    with Run(tmp_path, Config(), name="x") as run:
        (during,) = run_json(tmp_path)["sessions"]
        assert during["status"] == "running" and during["end"] is None
        run.record(data={"read": 5, "left out": {"too long": 1}})
        run.record(data={"left out": {"empty": 2}}, seconds=1.5)
    found = run_json(tmp_path)
    (session,) = found["sessions"]
    assert found["experiment"] == "x" and found["seconds"] == 1.5
    assert found["data"] == {"read": 5, "left out": {"too long": 1, "empty": 2}}
    assert session["command"] == "experiments/x.py --note 'two words'"
    assert session["status"] == "finished" and session["start"] <= session["end"]
    assert session["devices"] == "8 x cpu" and session["processes"] == 1
    assert session["packages"]["jax"] == jax.__version__ and session["packages"]["rlhf_jax"] == rlhf_jax.__version__
    assert {"flax", "optax", "numpy", "jaxlib", "transformers"} <= session["packages"].keys()
    assert session.keys() >= {"python", "platform", "commit", "clean"}
    with pytest.raises(ValueError, match="has sessions for itself"):
        run.record(sessions=[])

    # A later session stands beside it; one that was killed has no end.
    found["sessions"][0] |= {"end": None, "status": "running"}
    (tmp_path / "run.json").write_text(json.dumps(found))
    monkeypatch.setattr(provenance.rlhf_jax, "__version__", "9.9")
    with pytest.raises(KeyboardInterrupt), Run(tmp_path, Config(), name="x", resume=True):
        raise KeyboardInterrupt
    assert [one["status"] for one in run_json(tmp_path)["sessions"]] == ["killed", "interrupted"]
    assert run_json(tmp_path)["data"] == found["data"]
    assert "goes on with other versions: rlhf_jax 9.9 (was " in capsys.readouterr().out


def test_what_a_run_learned_from_may_not_change_unless_that_is_accepted(tmp_path, capsys):
    data, model = tmp_path / "data.jsonl", tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    data.write_text("one")
    given = {"model": str(model), "demonstrations": (str(data), "owner/set:train"), "prompts": None}
    with Run(tmp_path / "run", Config(), name="x") as run:
        run.inputs(**given)
    inputs = run_json(tmp_path / "run")["inputs"]
    assert inputs["demonstrations"][1] == {"name": "owner/set:train"} and inputs["prompts"] is None
    assert inputs["demonstrations"][0] == {"name": str(data)} | provenance.fingerprint(data)
    with Run(tmp_path / "run", Config(), name="x", resume=True) as run:
        run.inputs(**given, comparisons=str(data))  # of which nothing was known
    (data.rename(tmp_path / "moved.jsonl")).rename(data)
    (tmp_path / "copy.jsonl").write_text("one")
    changes = [
        (given | {"demonstrations": (str(tmp_path / "copy.jsonl"), "owner/set:train")}, None),
        (
            given | {"demonstrations": (str(data), "owner/set:test")},
            "demonstrations is not what the run was begun with",
        ),
        (given | {"prompts": str(data)}, "prompts is not"),
        (given | {"model": None}, "model is not"),
    ]
    for changed, words in changes:
        with Run(tmp_path / "run", Config(), name="x", resume=True) as run:
            if words is None:
                run.inputs(**changed)
            else:
                with pytest.raises(UserError, match=words):
                    run.inputs(**changed)
    (model / "config.json").write_text("{ }")
    with Run(tmp_path / "run", Config(), name="x", resume=True) as run, pytest.raises(UserError, match="model is not"):
        run.inputs(**given)
    capsys.readouterr()
    with Run(tmp_path / "run", replace(Config(), accept_changes=True), name="x", resume=True) as run:
        run.inputs(**given)
    assert "resumed although model is not what the run was begun with" in capsys.readouterr().out
    with Run(tmp_path / "run", Config(), name="x", resume=True) as run:
        run.inputs(**given)


@pytest.mark.parametrize("made", [True, False])
def test_a_run_that_did_nothing_leaves_its_folder_free(tmp_path, capsys, made):
    folder = tmp_path / "run" / "below" if made else tmp_path / "run"
    if not made:
        folder.mkdir()
    for _ in range(2):  # the same command line again
        with pytest.raises(UserError, match="wrong"), Run(folder, Config(), name="x") as run:
            run.record(data={"read": 0})
            (folder / "rejected.jsonl").write_text("{}")
            raise UserError("wrong")
        assert list(tmp_path.rglob("*")) == ([] if made else [folder])
    assert "nothing is left in" in capsys.readouterr().out


def test_what_other_runs_have_beside_it_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError), Run(None, Config(), name="x"):
        raise UserError("wrong")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError), Run(None, Config(), name="x"):
        with Run(None, Config(), name="x"):
            pass
        raise UserError("wrong")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["x-2"]


@pytest.mark.parametrize("done", ["log", "save", "summary", "bug"])
def test_a_run_that_did_something_keeps_its_folder(tmp_path, done):
    with pytest.raises((UserError, ZeroDivisionError)), Run(tmp_path / "run", Config(), name="x") as run:
        assert run.empty
        if done == "bug":
            raise ZeroDivisionError
        if done == "log":
            run.log("sft", 1, {"loss": 1.0})
        if done == "save":
            run.save("sft", 1, {"w": np.zeros(1)})
        if done == "summary":
            run.summary({"x": 1.0})
        assert not run.empty
        raise UserError("wrong")
    assert strict((tmp_path / "run" / "status.json").read_text()) == {"status": "failed"}


def test_a_resume_that_is_refused_leaves_a_finished_run_finished(tmp_path):
    (tmp_path / "data.jsonl").write_text("a")
    for text, error in (("a", None), ("b", UserError)):
        (tmp_path / "data.jsonl").write_text(text)
        with pytest.raises(error) if error else nullcontext():
            with Run(tmp_path / "run", Config(), name="x", resume=bool(error)) as run:
                run.inputs(demonstrations=str(tmp_path / "data.jsonl"))
                run.log("sft", 1, {"loss": 1.0})
    assert strict((tmp_path / "run" / "status.json").read_text()) == {"status": "finished"}
    assert [one["status"] for one in run_json(tmp_path / "run")["sessions"]] == ["finished", "failed"]


def test_a_run_keeps_the_day_that_its_templates_are_told(tmp_path, monkeypatch):
    days = iter([datetime(2024, 7, 26, 23, 59), datetime(2025, 1, 2, 3, 4)])

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return next(days)

    monkeypatch.setattr(clock, "datetime", Clock)
    told = []
    for resume in (False, True):
        with Run(tmp_path / "run", Config(), name="x", resume=resume):
            told.append(run_template("{{ strftime_now('%d %b %Y %H:%M') }}", [], {}))
            with Run(tmp_path / f"inner{resume}", Config(), name="x"):
                told.append(run_template("{{ strftime_now('%Y') }}", [], {}))
        assert strict((tmp_path / "run" / "config.json").read_text())["date"] == "2024-07-26T23:59:00"
    assert told == ["26 Jul 2024 23:59", "2024", "26 Jul 2024 23:59", "2024"]
    assert run_template("{{ strftime_now('%Y') }}", [], {}) == "2025"  # outside of any run


def test_a_resumed_run_that_did_nothing_keeps_its_folder(tmp_path):
    with Run(tmp_path, Config(), name="x"):
        pass
    with pytest.raises(UserError), Run(tmp_path, Config(), name="x", resume=True):
        raise UserError("wrong")
    assert (tmp_path / "config.json").exists()
