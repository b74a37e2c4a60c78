import contextlib
import json
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from rlhf_jax.errors import UserError
from rlhf_jax.log import Run, count_compilations, read_metrics, run_main


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5


@dataclass(frozen=True)
class Config:
    run_dir: str | None = None
    resume: bool = False
    steps: int = 30
    inner: Inner = field(default_factory=Inner)
    names: tuple[str, ...] = ()


def strict(line):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def scalar_events(folder):
    """(tag, step, value) of every scalar in a TensorBoard event file, read record by record."""
    (path,) = Path(folder).iterdir()
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        at += 16 + size
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return found


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
    assert config["steps"] == 30 and config["inner"] == {"rate": 0.5}
    assert scalar_events(run.dir / "tensorboard") == [("sft/loss", 1, 0.25), ("sft/count", 1, 3.0)]


def test_a_vector_is_not_a_metric(tmp_path):
    with Run(tmp_path / "run", Config()) as run, pytest.raises(ValueError, match=r"'loss' has shape \(2,\)"):
        run.log("sft", 1, {"loss": jnp.zeros(2)})


def test_runs_get_fresh_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        with Run(None, Config(), name="ppo") as run:
            assert run.dir == Path("runs") / f"ppo-{number}"


def test_a_used_folder_is_refused_unless_resumed(tmp_path, capsys):
    with Run(tmp_path, Config(run_dir="a")) as run:
        run.log("sft", 1, {"loss": 1.0})
        run.log("sft", 2, {"loss": 2.0})
    with pytest.raises(UserError, match=r"already holds something.*--resume"):
        Run(tmp_path, Config())
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "sft", "st')  # what a kill leaves
    capsys.readouterr()
    with Run(tmp_path, Config(run_dir="b", steps=31, inner=Inner(0.25)), resume=True) as run:
        run.log("sft", 2, {"loss": 20.0})
        run.log("sft", 3, {"loss": 3.0})
    said = capsys.readouterr().out
    assert "resumed with steps = 31, it was 30" in said and "inner.rate = 0.25, it was 0.5" in said
    assert "run_dir" not in said
    assert [row["loss"] for row in read_metrics(tmp_path)["sft"]] == [1.0, 20.0, 3.0]


def test_a_resumed_run_has_the_flags_that_it_was_started_with(tmp_path, monkeypatch):
    def flags(*given):
        monkeypatch.setattr(sys, "argv", ["program", "--run-dir", str(tmp_path), *given])
        seen = []
        run_main(seen.append, Config)
        return seen[0]

    Run(tmp_path, flags("--steps", "7", "--inner.rate", "0.25", "--names", "a", "b"))
    assert flags("--steps", "8") == Config(str(tmp_path), steps=8)
    assert flags("--resume", "--steps", "9") == Config(str(tmp_path), True, 9, Inner(0.25), ("a", "b"))

    # One of an older version: a field is missing, another is gone.
    (tmp_path / "config.json").write_text('{"steps": 5, "gone": 1, "inner": null}')
    assert flags("--resume") == Config(str(tmp_path), True, 5)
    (tmp_path / "config.json").write_text("{broken")
    assert flags("--resume") == Config(str(tmp_path), True)


def test_what_cannot_be_resumed_or_made_is_said_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, resume, message in [
        (None, True, "--resume needs --run-dir"),
        (tmp_path / "no", True, "no run to resume"),
        (tmp_path / "file", False, "is a file"),
        (tmp_path / "file" / "below", False, "cannot be made"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            Run(folder, Config(), resume=resume)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_without_a_terminal_a_stage_prints_a_few_plain_lines(tmp_path, capsys, count):
    with Run(tmp_path, Config()) as run:
        items = []
        for item in run.progress("sft", range(count), show=("loss", "never")):
            items.append(item)
            run.log("sft", item + 1, {"loss": 0.5 * item})
    assert items == list(range(count))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sft")]
    assert 1 <= len(lines) <= 10
    assert f"{count}/{count}" in lines[-1] and f"loss {0.5 * (count - 1):.4g}" in lines[-1]
    assert "never" not in lines[-1] and "\x1b" not in "".join(lines)


def test_no_items_no_lines(tmp_path):
    with Run(tmp_path, Config()) as run:
        assert list(run.progress("sft", range(0))) == []


def test_a_fault_is_not_hidden(tmp_path):
    with pytest.raises(ZeroDivisionError), Run(tmp_path, Config()):
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


PROGRAM = """
    import time
    from dataclasses import dataclass
    from rlhf_jax.errors import UserError
    from rlhf_jax.log import Run, run_main

    @dataclass(frozen=True)
    class Config:
        run_dir: str | None = None
        wrong: str = ""

    def main(cfg):
        if cfg.wrong == "user":
            raise UserError("that file is not there")
        if cfg.wrong == "disk":
            raise OSError(28, "No space left on device", "runs/x")
        with Run(cfg.run_dir, cfg) as run:
            for step in run.progress("sft", range(1000), show=("loss",)):
                run.log("sft", step + 1, {"loss": 1.0})
                time.sleep(0.01)

    run_main(main, Config)
"""


@pytest.fixture
def program(tmp_path):
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    return [sys.executable, "program.py"]


def test_ctrl_c_leaves_a_run_that_can_be_looked_at(tmp_path, program):
    process = subprocess.Popen(
        [*program, "--run-dir", "run"],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("sft"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted: the run is in run" in out
    assert strict((tmp_path / "run" / "status.json").read_text()) == {"status": "interrupted"}
    assert len(read_metrics(tmp_path / "run")["sft"]) >= 100


def test_a_ctrl_c_that_python_drops_ends_the_run_at_its_next_step(tmp_path):
    """As when it falls into a callback of the garbage collector, whose exceptions are ignored."""
    steps = []
    with pytest.raises(KeyboardInterrupt), Run(tmp_path, Config()) as run:
        for step in run.progress("sft", range(100)):
            steps.append(step)
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    assert steps == [0]
    assert strict((tmp_path / "status.json").read_text()) == {"status": "interrupted"}


def test_a_ctrl_c_while_a_line_is_written_waits_for_its_end(tmp_path):
    """Inside the events' queue it would leave a lock behind, and closing would wait for it for ever."""
    written = []

    def add_scalar(name, value, step):
        signal.raise_signal(signal.SIGINT)
        written.append(name)

    with pytest.raises(KeyboardInterrupt), Run(tmp_path, Config()) as run:
        run._events.add_scalar = add_scalar
        run.log("sft", 1, {"loss": 1.0, "kl": 0.5})
        written.append("after the interrupt")
    assert written == ["sft/loss", "sft/kl"]
    assert strict((tmp_path / "status.json").read_text()) == {"status": "interrupted"}


def test_a_ctrl_c_that_comes_twice_is_one(tmp_path):
    """A launcher passes on the interrupt that the terminal has sent to both."""
    unwound = []
    with pytest.raises(KeyboardInterrupt), Run(tmp_path, Config()):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            unwound.append("to its end")
    assert unwound == ["to its end"]


def test_a_second_ctrl_c_does_not_cut_the_closing_short(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="the first"), Run(tmp_path, Config()) as run:
        run._events.close = lambda: signal.raise_signal(signal.SIGINT)
        raise KeyboardInterrupt("the first")
    assert strict((tmp_path / "status.json").read_text()) == {"status": "interrupted"}
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ("user", "error: that file is not there\n"),
        ("disk", "error: No space left on device: runs/x\n"),
    ],
)
def test_what_a_user_can_put_right_is_one_line(tmp_path, program, wrong, line):
    done = subprocess.run([*program, "--wrong", wrong], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, line)
