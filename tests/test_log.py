import contextlib
import json
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from rlhf_jax import checkpoint, log
from rlhf_jax.cli import run_main
from rlhf_jax.errors import UserError
from rlhf_jax.log import Run, count_compilations
from rlhf_jax.metrics import read_metrics
from rlhf_jax.signals import Preempted


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
        run.save("sft", 1, {"w": np.ones(2)})
        run.log("sft", 2, {"loss": 2.0})
    with pytest.raises(UserError, match=r"already holds something.*--resume"):
        Run(tmp_path, Config())
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "sft", "st')  # what a kill leaves
    capsys.readouterr()
    with Run(tmp_path, Config(run_dir="b", steps=31, inner=Inner(0.25)), resume=True) as run:
        assert run.restore("sft", {"w": np.zeros(2)})[1] == 1
        run.log("sft", 1, {"loss": 10.0})  # is there, and stays
        run.log("sft", 2, {"loss": 20.0})
        run.log("sft", 3, {"loss": 3.0})
    said = capsys.readouterr().out
    assert "resumed with steps = 31, it was 30" in said and "inner.rate = 0.25, it was 0.5" in said
    assert "run_dir" not in said
    assert [row["loss"] for row in read_metrics(tmp_path)["sft"]] == [1.0, 20.0, 3.0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


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


def test_which_of_many_processes_it_is_a_program_is_told_each_time(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Spread(Config):
        hosts: str | None = None

    joined = []
    monkeypatch.setattr(log, "start", joined.append)

    def program(config, *given):
        monkeypatch.setattr(sys, "argv", ["program", "--run-dir", str(tmp_path), *given])
        run_main(lambda cfg: Run(cfg.run_dir, cfg, resume=cfg.resume), config)

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
    from rlhf_jax.log import Run
    from rlhf_jax.cli import run_main

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


STAGES = """
    import time
    from dataclasses import dataclass
    import numpy as np
    from rlhf_jax.log import Run
    from rlhf_jax.cli import run_main

    @dataclass(frozen=True)
    class Config:
        run_dir: str | None = None
        resume: bool = False

    def main(cfg):
        with Run(cfg.run_dir, cfg, resume=cfg.resume) as run:
            for stage in ("sft", "ppo"):
                state, first = run.restore(stage, {"w": np.zeros(3)})
                for step in run.progress(stage, range(first, 40 if stage == "sft" else 1000)):
                    state["w"] += 1
                    time.sleep(0.02)
                    run.log(stage, step + 1, {"w": state["w"][0]})
                    if run.stopping or step == 39:
                        run.save(stage, step + 1, state)

    run_main(main, Config)
"""


def test_sigterm_saves_and_ends_within_seconds(tmp_path):
    (tmp_path / "program.py").write_text(textwrap.dedent(STAGES))
    process = subprocess.Popen(
        [sys.executable, "program.py", "--run-dir", "run"],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ppo"):
            break
    began = time.monotonic()
    for _ in range(2):  # the second one changes nothing
        process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and err == "" and time.monotonic() - began < 10
    (line,) = [line for line in out.splitlines() if line.startswith("preempted")]
    at = int(line.partition("saved at step ")[2].partition(" ")[0])
    assert line == f"preempted: saved at step {at} of ppo, go on with --run-dir run --resume"
    assert strict((tmp_path / "run" / "status.json").read_text()) == {"status": "preempted"}
    assert [(row["step"], row["w"]) for row in read_metrics(tmp_path / "run")["ppo"]] == [
        (step, step) for step in range(1, at + 1)
    ]
    with Run(tmp_path / "run", Config(), resume=True) as run:
        state, first = run.restore("ppo", {"w": np.zeros(3)})
    assert first == at and state["w"][0] == at
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 40 + at


def test_sigterm_between_two_stages_ends_at_once(tmp_path, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as end, Run(tmp_path, Config()) as run:
        list(run.progress("sft", range(2)))
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it went on")
    assert end.value.code == 143 and signal.getsignal(signal.SIGTERM) is handler
    assert "preempted: nothing new to save" in capsys.readouterr().out


def test_a_second_sigterm_does_not_cut_the_ending_short(tmp_path):
    unwound = []
    with pytest.raises(Preempted), Run(tmp_path, Config()):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            unwound.append("to its end")
    assert unwound == ["to its end"]


@pytest.mark.parametrize("asks", [True, False])
def test_sigterm_in_a_step_waits_for_what_is_saved(tmp_path, asks):
    """After the step has asked, which is too late to be saved, it waits for the next step to ask."""
    steps = []
    with pytest.raises(Preempted), Run(tmp_path, Config()) as run:
        for step in run.progress("sft", range(10)):
            if asks and run.stopping:
                run.save("sft", step + 1, {"w": np.zeros(1)})
            if step == 3:
                signal.raise_signal(signal.SIGTERM)
            steps.append(step)
    assert steps == list(range(5 if asks else 4))
    assert checkpoint.latest(tmp_path, "sft") == (5 if asks else None)


def test_a_step_that_asks_while_the_signal_is_there_is_the_last(tmp_path):
    steps = []
    with pytest.raises(Preempted), Run(tmp_path, Config()) as run:
        for step in run.progress("sft", range(10)):
            if step == 9:
                signal.raise_signal(signal.SIGTERM)
            steps.append((step, run.stopping))
    assert steps[-1] == (9, True)


def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_one_line(tmp_path, monkeypatch):
    """Also the last one, which is written while the run ends."""

    def full(folder):
        raise OSError(28, "No space left on device")

    with Run(tmp_path, Config()) as run:
        run.save("sft", 1, {"w": np.ones(2)})
    monkeypatch.setattr(checkpoint, "files_in", full)
    for steps in ((2, 3), (2,)):
        with pytest.raises(UserError, match=r"sft/2 was not written: No space left on device; those before it"):
            with Run(tmp_path, Config(resume=True), resume=True) as run:
                for step in steps:
                    run.save("sft", step, {"w": np.ones(2)})
        assert strict((tmp_path / "status.json").read_text()) == {"status": "failed"}
        assert [one.name for one in (tmp_path / "checkpoints" / "sft").iterdir()] == ["1"]
    assert checkpoint.latest(tmp_path, "sft") == 1


def test_a_damaged_checkpoint_is_named_set_aside_and_never_written_over(tmp_path, capsys):
    with Run(tmp_path, Config()) as run:
        for step in (1, 2, 3):
            run.log("sft", step, {"w": step})
            run.save("sft", step, {"w": jnp.full(2, step)})
    damaged = tmp_path / "checkpoints" / "sft" / "3" / "arrays" / "manifest.ocdbt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    mine = jnp.zeros(2, int)
    with Run(tmp_path, Config(), resume=True) as run:
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
