"""What a run shows of its progress, on a terminal and off it."""

from dataclasses import dataclass

import numpy as np
import pytest
from rich.console import Console

from rlhf_jax.log import Run


@dataclass(frozen=True)
class Config:
    steps: int = 30


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_without_a_terminal_a_stage_prints_a_few_plain_lines(tmp_path, capsys, count):
    with Run(tmp_path, Config(), name="test") as run:
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
    with Run(tmp_path, Config(), name="test") as run:
        assert list(run.progress("sft", range(0))) == []


def test_a_line_shows_only_what_was_logged_since_the_line_before(tmp_path, capsys):
    with Run(tmp_path, Config(), name="test") as run:
        for step in run.progress("sft", range(20), show=("loss", "val_loss")):
            metrics = {"val_loss": 0.5} if step == 9 else {}
            if step % 4 == 1:
                run.log("sft", step + 1, {"loss": float(step)} | metrics)
    lines = [line.split(" s")[1].split() for line in capsys.readouterr().out.splitlines() if line.startswith("sft")]
    assert lines == [["loss", "1"], [], ["loss", "5"], [], ["loss", "9", "val_loss", "0.5"], [],
                     ["loss", "13"], [], ["loss", "17"], []]  # fmt: skip


def begin(folder, steps, *, log=True):
    with Run(folder, Config(), name="test") as run:
        run.log("sft", steps, {"loss": 1.0})
        run.save("sft", steps, {"w": np.zeros(2)})


@pytest.mark.parametrize("terminal", [False, True])
def test_a_resumed_stage_says_at_once_from_where(tmp_path, capsys, monkeypatch, terminal):
    monkeypatch.setattr(Console, "is_terminal", property(lambda self: terminal))
    begin(tmp_path, 120)
    capsys.readouterr()
    with Run(tmp_path, Config(), name="test", resume=True) as run:
        _, first = run.restore("sft", {"w": np.zeros(2)})
        said = []
        for _ in run.progress("sft", range(first, 130)):
            said = said or [capsys.readouterr().out]
        assert "sft: goes on from step 120 of 130" in said[0]
        assert "130/130" in capsys.readouterr().out
        _, first = run.restore("sft", {"w": np.zeros(2)})
        assert list(run.progress("sft", range(first, 120))) == []
        assert "sft: all 120 steps are done" in capsys.readouterr().out
        list(run.progress("ppo", range(2)))
        assert "goes on" not in capsys.readouterr().out
