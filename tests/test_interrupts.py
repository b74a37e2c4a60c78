"""How a run ends when it is told to, and when the user has to put something right."""

import contextlib
import json
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass

import numpy as np
import pytest

from rlhf_jax import checkpoint
from rlhf_jax.log import Run
from rlhf_jax.metrics import read_metrics
from rlhf_jax.signals import Preempted


@dataclass(frozen=True)
class Config:
    run_dir: str | None = None
    resume: bool = False


def status(folder):
    return json.loads((folder / "status.json").read_text())


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
        with Run(cfg.run_dir, cfg, name="test") as run:
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
    assert status(tmp_path / "run") == {"status": "interrupted"}
    assert len(read_metrics(tmp_path / "run")["sft"]) >= 100


def test_a_ctrl_c_that_python_drops_ends_the_run_at_its_next_step(tmp_path):
    """As when it falls into a callback of the garbage collector, whose exceptions are ignored."""
    steps = []
    with pytest.raises(KeyboardInterrupt), Run(tmp_path, Config(), name="test") as run:
        for step in run.progress("sft", range(100)):
            steps.append(step)
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    assert steps == [0]
    assert status(tmp_path) == {"status": "interrupted"}


def test_a_ctrl_c_while_a_line_is_written_waits_for_its_end(tmp_path):
    """Inside the events' queue it would leave a lock behind, and closing would wait for it for ever."""
    written = []

    def add(stage, step, scalars):
        signal.raise_signal(signal.SIGINT)
        written.append((stage, *scalars))

    with pytest.raises(KeyboardInterrupt), Run(tmp_path, Config(), name="test") as run:
        run._events.add = add
        run.log("sft", 1, {"loss": 1.0, "kl": 0.5})
        written.append("after the interrupt")
    assert written == [("sft", "loss", "kl")]
    assert status(tmp_path) == {"status": "interrupted"}


def test_a_ctrl_c_that_comes_twice_is_one(tmp_path):
    """A launcher passes on the interrupt that the terminal has sent to both."""
    unwound = []
    with pytest.raises(KeyboardInterrupt), Run(tmp_path, Config(), name="test"):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            unwound.append("to its end")
    assert unwound == ["to its end"]


def test_a_second_ctrl_c_does_not_cut_the_closing_short(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="the first"), Run(tmp_path, Config(), name="test") as run:
        run._events.close = lambda: signal.raise_signal(signal.SIGINT)
        raise KeyboardInterrupt("the first")
    assert status(tmp_path) == {"status": "interrupted"}
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
        with Run(cfg.run_dir, cfg, resume=cfg.resume, name="test") as run:
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
    assert status(tmp_path / "run") == {"status": "preempted"}
    assert [(row["step"], row["w"]) for row in read_metrics(tmp_path / "run")["ppo"]] == [
        (step, step) for step in range(1, at + 1)
    ]
    with Run(tmp_path / "run", Config(), resume=True, name="test") as run:
        state, first = run.restore("ppo", {"w": np.zeros(3)})
    assert first == at and state["w"][0] == at
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 40 + at


def test_sigterm_between_two_stages_ends_at_once(tmp_path, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as end, Run(tmp_path, Config(), name="test") as run:
        list(run.progress("sft", range(2)))
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it went on")
    assert end.value.code == 143 and signal.getsignal(signal.SIGTERM) is handler
    assert "preempted: nothing new to save" in capsys.readouterr().out


def test_a_second_sigterm_does_not_cut_the_ending_short(tmp_path):
    unwound = []
    with pytest.raises(Preempted), Run(tmp_path, Config(), name="test"):
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
    with pytest.raises(Preempted), Run(tmp_path, Config(), name="test") as run:
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
    with pytest.raises(Preempted), Run(tmp_path, Config(), name="test") as run:
        for step in run.progress("sft", range(10)):
            if step == 9:
                signal.raise_signal(signal.SIGTERM)
            steps.append((step, run.stopping))
    assert steps[-1] == (9, True)


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
