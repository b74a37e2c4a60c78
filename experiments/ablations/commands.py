"""Runs of experiments as command lines, each in a process of its own, in one folder; what is finished is left alone.

A study of a real model is made of runs that anybody can make by hand. Its file names them; a second call with the
same folder goes on where the first one stopped.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments.ablations import records
from experiments.ablations.grid_results import rows_markdown
from experiments.flags import Flags
from rlhf_jax.errors import UserError
from rlhf_jax.folder import read_json

EXPERIMENTS = Path(__file__).parents[1]


class Command(NamedTuple):
    """A run: its name, which is its folder's, the experiment's file and its flags."""

    name: str
    experiment: str
    flags: tuple[str, ...]

    def line(self, folder: Path) -> str:
        """The command as one would type it."""
        words = ("python", f"experiments/{self.experiment}", *self.flags, "--run-dir", str(folder / self.name))
        return shlex.join(words)


def finished(folder: Path, name: str) -> dict[str, Any] | None:
    """The summary of a run that has ended, else None."""
    status = folder / name / "status.json"
    if not status.exists() or read_json(status).get("status") != "finished":
        return None
    return read_json(folder / name / "summary.json")


def run_missing(folder: Path, commands: Sequence[Command]) -> list[str]:
    """Runs what is not finished, in this order, each with its output in <name>.log. Returns the names that failed.

    A run that was begun goes on. One that fails leaves the others to be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for place, command in enumerate(commands, 1):
        if finished(folder, command.name) is not None:
            continue
        begun = (folder / command.name / "config.json").exists()
        words = [sys.executable, str(EXPERIMENTS / command.experiment), *command.flags]
        words += ["--run-dir", str(folder / command.name), *(["--resume"] if begun else [])]
        print(f"{place} of {len(commands)}: {command.line(folder)}", flush=True)
        began = time.monotonic()
        with open(folder / f"{command.name}.log", "a", encoding="utf-8") as log:
            code = subprocess.run(words, stdout=log, stderr=log, check=False).returncode
        print(f"  exit code {code}, {(time.monotonic() - began) / 60:.1f} min", flush=True)
        if code:
            failed.append(command.name)
    return failed


@dataclass(frozen=True)
class StudyFlags(Flags):
    """The model that is studied, and where."""

    model: str = ""
    """A Hugging Face folder."""
    run_dir: str = ""
    """The folder of all runs."""

    def __post_init__(self) -> None:
        """Raises UserError for what is missing."""
        for name in ("model", "run_dir"):
            if not getattr(self, name):
                raise UserError(f"--{name.replace('_', '-')} is missing")
        super().__post_init__()


def make_study(
    cfg: Any,
    write: Callable[[Any, Path], None],
    commands: Callable[[Any, Path], list[Command]],
    parts: Callable[[Any, Path], list[str]],
) -> None:
    """Writes the files of the runs, makes the runs that are missing, then page.md, also where it was interrupted.

    `parts(cfg, folder)` are the page's; the commands, their minutes and what was not run come after them. Raises
    SystemExit where a run failed.
    """
    folder = Path(cfg.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write(cfg, folder)
    made = commands(cfg, folder)
    try:
        failed = run_missing(folder, made)
    finally:
        (folder / "page.md").write_text(page(folder, made, parts(cfg, folder)), encoding="utf-8")
        print(f"{folder / 'page.md'} is written")
    if failed:
        raise SystemExit(f"error: {', '.join(failed)} failed: see {folder}/NAME.log; the same call tries again")


def page(folder: Path, made: Sequence[Command], parts: Sequence[str]) -> str:
    """Parts, and how they were made."""
    done = [one.name for one in made if finished(folder, one.name) is not None]
    left = [one.name for one in made if one.name not in done]
    how = ["## Commands", "\n".join(f"    {one.line(folder)}" for one in made)]
    how += [rows_markdown(["run", "minutes"], [[name, f"{minutes(folder, name):.1f}"] for name in done])]
    how += [made_with(folder, done) if done else "", f"Not run: {', '.join(left)}." if left else ""]
    return "\n\n".join(part for part in [*parts, *how] if part) + "\n"


def minutes(folder: Path, name: str) -> float:
    """Minutes of the sessions of a run that has ended."""
    return records.minutes(read_json(folder / name / "run.json")["sessions"])


def lines_of(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a run's own jsonl file. Raises UserError where it is not there."""
    if not file.exists():
        raise UserError(f"{file} is not there; was the run stopped?")
    with open(file, encoding="utf-8") as rows:
        yield from map(json.loads, rows)


def one_line(text: str, most: int = 160) -> str:
    """A text as a cell of a table."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most] + " …"


def rate(found: dict[str, Any], name: str, digits: int = 0) -> str:
    """A share with its interval, in per cent; "not run" where it is not there."""
    if name not in found:
        return "not run"
    ends = (100 * found[f"{name}_low"], 100 * found[f"{name}_high"])
    return f"{100 * found[name]:.{digits}f}% ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})"


def curve(folder: Path, name: str, columns: Sequence[str]) -> list[list[str]]:
    """Steps and numbers of a run's metrics.jsonl, at most eight rows, evenly spread."""
    rows = [row for row in lines_of(folder / name / "metrics.jsonl") if all(key in row for key in columns)]
    places = sorted({round(i * (len(rows) - 1) / 7) for i in range(8)}) if rows else []
    return [[str(rows[i]["step"]), *(f"{rows[i][key]:.2f}" for key in columns)] for i in places]


def made_with(folder: Path, names: Sequence[str]) -> str:
    """Commits, versions and devices of the runs, as a page ends with them."""
    sessions = [session for name in names for session in read_json(folder / name / "run.json")["sessions"]]
    commits = sorted({str(one.get("commit"))[:7] for one in sessions})
    first = sessions[0]
    packages = ", ".join(f"{name} {first['packages'][name]}" for name in ("jax", "transformers"))
    return f"Commit {', '.join(commits)}; {packages}; {first['devices']}; {first['end'] or first['start']}."
