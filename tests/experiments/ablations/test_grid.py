"""Grids of variants and seeds: made in processes, resumed, never mixed; what fails is named; intervals by hand."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from experiments.ablations.grid import GridFlags, core_shares, run_grid
from experiments.ablations.grid_results import (
    Cells,
    Column,
    Line,
    Page,
    Panel,
    curve_line,
    differences_table,
    gao_line,
    mean_interval,
    points_line,
    seeds_table,
    variant_name,
    variants_table,
)
from rlhf_jax.errors import UserError

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Config(GridFlags):
    seeds: int = 3
    jobs: int = 0
    powers: tuple[float, ...] = (1.0, 2.0)
    scale: float = 1.0
    trouble: str = ""


class Variant(NamedTuple):
    power: float


def prepare(cfg, seed, run):
    run.log("shared", 1, {"seed": seed})
    if cfg.trouble == "prepare" and seed == 1:
        raise UserError("no such file")
    return cfg.scale * (seed + 1)


def one(cfg, prepared, seed, variant, run):
    if seed == 1 and variant.power == 2:
        if cfg.trouble == "cell":
            raise ValueError("not today")
        if cfg.trouble == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    run.log("one", 1, {"pid": os.getpid()})
    y = prepared**variant.power
    curves = {"steps": np.arange(3), "curve": y * np.arange(3.0)}
    return {"y": y, "pid": os.getpid(), "cores": len(os.sched_getaffinity(0)), "none": np.nan, **curves}


def present(cfg, cells):
    lines = [curve_line(cells, variant, "steps", "curve", variant_name(variant)) for variant in cells.finished()]
    table = variants_table(cells, ["power"], [Column("result", "y", 1, extremes=True)])
    return Page([table], [Panel("Curves", "step", "y", lines)])


def grid(cfg):
    variants = [Variant(power) for power in cfg.powers]
    return run_grid(cfg, "trivial", variants, one, present, prepare=prepare, axes=("powers",))


def rows_of(folder):
    lines = (folder / "table.md").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("|")][2:]


# t with 2 degrees of freedom is 4.302653: 1, 2, 3 have s = 1; 1, 4, 9 have s² = 49/3.
ROWS = ["| 1 | 2.0 ± 2.5 (1.0, 3.0) |", "| 2 | 4.7 ± 10.0 (1.0, 9.0) |"]


def test_in_processes(tmp_path):
    """One of them dies; the others go on, and it is made when the grid is resumed."""
    folder = tmp_path / "run"
    with pytest.raises(SystemExit, match=r"1 of 6 cells .* seed 1 power-2 \(its process ended, exit code -9"):
        grid(Config(run_dir=str(folder), jobs=2, trouble="killed"))
    assert rows_of(folder) == [ROWS[0], "| 2 | 5.0 ± 50.8 (1.0, 9.0) |"]
    forget(folder, "killed")
    metrics = grid(Config(run_dir=str(folder), jobs=2, resume=True, accept_changes=True))
    assert rows_of(folder) == ROWS
    assert metrics["power-1_y"] == 2 and metrics["power-2_y"] == pytest.approx(14 / 3)
    summary = json.loads((folder / "table.json").read_text())
    found = summary["variants"]["power-1"]
    np.testing.assert_allclose([found["y"]["low"], found["y"]["high"]], [2 - 2.484138, 2 + 2.484138], rtol=1e-6)
    assert summary["missing"] == [] and found["none"]["mean"] is None and "curve" not in found
    # A process a seed, none of them this one, and what a seed's variants share is made once.
    pids = [json.loads(path.read_text())["values"]["pid"] for path in sorted(folder.glob("seed-[02]/power-*.json"))]
    assert len(set(pids)) == 2 and os.getpid() not in pids and pids[0] == pids[1]
    cores = [json.loads(path.read_text())["values"]["cores"] for path in folder.glob("seed-[02]/power-*.json")]
    assert set(cores) <= {len(share) or len(os.sched_getaffinity(0)) for share in core_shares(2)}
    assert [len(path.read_text().splitlines()) for path in folder.glob("seed-*/shared/metrics.jsonl")] == [1, 1, 1]
    assert (folder / "trivial.svg").read_text().startswith("<?xml")


def test_processes_share_out_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 1, 2, 7, 9})
    assert core_shares(2) == [[1, 4, 9], [2, 7]] and core_shares(1) == [[1, 2, 4, 7, 9]]
    assert core_shares(6) == [[]] * 6
    monkeypatch.delattr(os, "sched_getaffinity")
    assert core_shares(2) == [[], []]


def forget(folder, trouble):
    """As if the trouble were no flag."""
    for path in folder.glob("seed-*/**/*.json"):
        path.write_text(path.read_text().replace(f'"{trouble}"', '""'))


def test_resuming_makes_what_is_missing(tmp_path):
    folder = tmp_path / "run"
    cfg = Config(run_dir=str(folder), seeds=2, powers=(1.0,))
    grid(cfg)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("seed-*/power-*.json")}
    more = replace(cfg, resume=True, accept_changes=True, seeds=3, powers=(1.0, 2.0))
    grid(more)
    assert rows_of(folder) == ROWS
    assert kept == {path: path.stat().st_mtime_ns for path in kept} and len(kept) == 2
    # A seed with nothing to be made is not even prepared.
    assert len(list(folder.glob("seed-*/*.json"))) == 6
    for path in folder.glob("seed-1/power-2.json"):
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("seed-*/shared/status.json")}
    grid(more)
    changed = {path.parts[-3] for path in before if path.stat().st_mtime_ns != before[path]}
    assert rows_of(folder) == ROWS and changed == {"seed-1"}


def test_cells_of_other_flags_are_refused(tmp_path):
    cfg = Config(run_dir=str(tmp_path / "run"), seeds=1)
    grid(cfg)
    other = replace(cfg, resume=True, accept_changes=True, scale=2.0)
    with pytest.raises(UserError, match=r"seed-0/power-1.json was made with scale = 1.0, and now it is 2.0"):
        grid(other)
    # Nor is a cell made of what other flags have prepared.
    for path in (tmp_path / "run").glob("seed-0/power-*.json"):
        path.unlink()
    with pytest.raises(SystemExit, match=r"shared/config.json was made with scale = 1.0, and now it is 2.0"):
        grid(other)


@pytest.mark.parametrize(
    "trouble, missing, rows",
    [
        ("cell", r"1 of 6 .* seed 1 power-2 \(ValueError: not today\)", [ROWS[0], "| 2 | 5.0 ± 50.8 (1.0, 9.0) |"]),
        ("prepare", r"2 of 6 .* seed 1 power-1 \(UserError: no such file\); seed 1 power-2 \(UserError: no such",
         ["| 1 | 2.0 ± 12.7 (1.0, 3.0) |", "| 2 | 5.0 ± 50.8 (1.0, 9.0) |"]),
    ],
)  # fmt: skip
def test_what_fails_is_named_and_tried_again(tmp_path, trouble, missing, rows):
    folder = tmp_path / "run"
    cfg = Config(run_dir=str(folder), trouble=trouble)
    with pytest.raises(SystemExit, match=missing) as raised:
        grid(cfg)
    assert isinstance(raised.value.code, str)  # which Python prints, and exits with 1
    assert rows_of(folder) == rows and "cells are missing" in (folder / "table.md").read_text()
    forget(folder, trouble)
    grid(replace(cfg, resume=True, accept_changes=True, trouble=""))
    assert rows_of(folder) == ROWS and "missing" not in (folder / "table.md").read_text()


def test_one_seed_has_no_interval(tmp_path):
    grid(Config(run_dir=str(tmp_path / "run"), seeds=1))
    assert rows_of(tmp_path / "run") == ["| 1 | 1.0 |", "| 2 | 1.0 |"]
    assert "there are no intervals" in (tmp_path / "run" / "table.md").read_text()


@pytest.mark.parametrize("powers", [(), (1.0, 1.0)])
def test_variants_have_names_of_their_own(tmp_path, powers):
    with pytest.raises(UserError, match="each variant is to be named once"):
        grid(Config(run_dir=str(tmp_path / "run"), powers=powers))


@pytest.mark.parametrize(
    "values, mean, half", [([1, 2], 1.5, 6.353102), ([1, 2, 3, 4], 2.5, 2.054260), ([3], 3, None)]
)
def test_intervals(values, mean, half):
    """t is 12.7062 with 1 degree of freedom and s/√n = ½; 3.182446 with 3, and s/√n = √(5/3)/2."""
    found = mean_interval(values)
    assert found.mean == mean
    np.testing.assert_allclose(found.half, np.nan if half is None else half, rtol=1e-6)


A, B = Variant(0.5), Variant(1.0)
CELLS = Cells(
    (0, 1), (A, B),
    {
        (0, A): {"y": 1.0, "x": 1.0}, (1, A): {"y": 3.0, "x": 3.0},
        (0, B): {"y": 2.0, "x": 5.0}, (1, B): {"y": 5.0, "x": 7.0},
    },
    {},
)  # fmt: skip


def test_tables():
    columns = [Column("result", "y", 1), Column("not there", "z")]
    assert variants_table(CELLS, ["power"], columns).rows == [["0.5", "2.0 ± 12.7", ""], ["1", "3.5 ± 19.1", ""]]
    assert seeds_table(CELLS, B, columns).rows == [["0", "2.0", ""], ["1", "5.0", ""]]
    # Differences are taken seed by seed: 1 and 2, not 1.5 beside what seeds differ by.
    table = differences_table(CELLS, A, columns)
    assert table.rows == [["result", "1, 3", "1.4", "2, 5", "+1.5 ± 6.4 (0.71)"]]
    line = points_line(CELLS, [A, B], "x", "y", "both")
    np.testing.assert_allclose([line.x, line.y], [[2, 6], [2, 3.5]])
    np.testing.assert_allclose(line.half, [12.706205, 1.5 * 12.706205], rtol=1e-6)


def test_the_fit_says_how_well_it_fits_what_is_drawn():
    d = np.linspace(0.1, 5, 30)
    gained = d * (1.2 - 0.5 * np.log(d))
    line = gao_line(Line("", d, 0.7 + gained), 0.7)
    np.testing.assert_allclose(line.y, 0.7 + line.x * (1.2 - 0.5 * np.log(line.x)), rtol=1e-6)
    assert "R² 1.00" in line.label
    worse = 0.7 + gained + np.where(np.arange(30) % 2, 0.4, -0.4)
    noisy = gao_line(Line("", d, worse), 0.7)
    residual = np.sum((worse - np.interp(d, noisy.x, noisy.y)) ** 2) / np.sum((worse - worse.mean()) ** 2)
    assert f"R² {1 - residual:.2f}" in noisy.label and residual > 0.02
    assert "R² nan" in gao_line(Line("", d[:2], worse[:2]), 0.7).label


PROGRAM = """
import os, sys, time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
if __name__ == "__main__":
    sys.path.insert(0, {root!r})
from experiments.ablations.grid import GridFlags, run_grid
from experiments.ablations.grid_results import Page
from rlhf_jax.cli import run_main

@dataclass(frozen=True)
class Config(GridFlags):
    sleep: float = 0.0

class Variant(NamedTuple):
    name: str

def one(cfg, prepared, seed, variant, run):
    (run.dir / "pid").write_text(str(os.getpid()))
    time.sleep(cfg.sleep)
    return {{"y": seed}}

def main(cfg):
    run_grid(cfg, "program", [Variant("only")], one, lambda cfg, cells: Page([]))

if __name__ == "__main__":
    run_main(main, Config)
"""


def start(folder, *command):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen([sys.executable, *command], cwd=folder, env=environment | {"PYTHONSAFEPATH": ""})


def gone(pid):
    """Whether a process has ended; one that nobody waits for counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    "command, seeds, number, code",
    [(["program.py"], 2, signal.SIGINT, 130), (["-m", "program"], 1, signal.SIGKILL, -9)],
    ids=["script", "module"],
)
def test_no_process_outlives_the_one_that_started_it(tmp_path, command, seeds, number, code):
    (tmp_path / "program.py").write_text(PROGRAM.format(root=str(ROOT)))
    process = start(tmp_path, *command, "--run-dir", "run", "--seeds", str(seeds), "--sleep", "600")
    try:
        until(lambda: process.poll() is not None or len(list(tmp_path.glob("run/seed-*/only/pid"))) == seeds)
        pids = [int(path.read_text()) for path in tmp_path.glob("run/seed-*/only/pid")]
        assert len(pids) == seeds and not any(map(gone, pids))
        process.send_signal(number)
        assert process.wait(60) == code
        until(lambda: all(map(gone, pids)), 20)
    finally:
        process.kill()
