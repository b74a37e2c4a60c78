"""Variants × seeds of an experiment, in processes; a table with means and intervals over seeds, and a figure.

An ablation names its variants, each a NamedTuple of numbers and words, and hands three functions to `run_grid`:
    prepare(cfg, seed, run)                      what all variants of a seed share: a world, SFT, a reward model
    one(cfg, prepared, seed, variant, run)       {name: a number, or a list of numbers: a curve}
    present(cfg, cells)                          the tables and the panels of the figure
Its CLAIMS, if it has any, are decided on its page. A variant of a seed is a cell. Finished cells are files in the
run's folder; --resume makes the others. A cell that other flags made is refused. A cell that fails leaves the others
to be made: the table names it, the exit code is 1.
"""

import json
import math
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.ablations.claims import decide, verdict_words
from experiments.ablations.grid_results import (
    Cells,
    Page,
    draw,
    missing_line,
    summarize,
    tables_markdown,
    variant_name,
)
from experiments.ablations.records import claims_of, write_files, write_record
from experiments.flags import Flags
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.folder import flat, read_json, write_json
from rlhf_jax.log import Run

Prepare = Callable[[Any, int, Run], Any]
One = Callable[[Any, Any, int, Any, Run], dict[str, Any]]
Present = Callable[[Any, Cells], Page]

SHARED = "shared"
"""The folder of what `prepare` does for a seed."""
QUICK_STEPS = {"sft": 200, "ppo": 6, "preference": 20}
"""Steps of the stages of a quick run. A reward model has as many as its comparisons make."""
SECONDS_TO_END = 10.0
"""How long processes that are told to end may take, to save what they have."""


@dataclass(frozen=True)
class GridFlags(Flags):
    """The seeds, and the processes that they run in."""

    run_dir: str | None = None
    """The folder that everything is written to; by default the next free runs/<ablation>-<n>."""
    seed: int = 0
    """The first seed."""
    seeds: int = 5
    """The number of seeds, counted up from the first."""
    resume: bool = False
    """Make the cells that --run-dir still lacks. There may be more seeds or variants than before."""
    accept_changes: bool = False
    """Resume although flags differ. Cells that were made with other flags are refused all the same."""
    jobs: int = 2
    """Seeds that run at once, each in a process. 0: one after the other in this process; use it on an accelerator."""
    quick: bool = False
    """One seed, a small world, few steps: in minutes it shows that the file runs, and it decides nothing."""
    setting: Literal["words", "errands"] = "words"
    """The world: one question and a short answer, or three errands and an answer in three parts."""
    common: str = "runs/common"
    """The folder that keeps what ablations have in common, such as a seed's SFT; none: make it each time."""
    publish: bool = False
    """Write the page, its figure and its numbers into experiments/results/, too."""

    def __post_init__(self) -> None:
        """Raises UserError for numbers out of range, and for a quick run that is to be published."""
        at_least(self, seed=0, seeds=1, jobs=0)
        if self.quick and self.publish:
            raise UserError("--quick decides nothing, so there is nothing to --publish")
        super().__post_init__()

    def hurried(self) -> Any:
        """The flags of a quick run: one seed, and few steps in each stage."""
        steps = {name: replace(getattr(self, name), steps=few) for name, few in QUICK_STEPS.items()
                 if hasattr(self, name)}  # fmt: skip
        return replace(self, seeds=1, **steps)


@dataclass(frozen=True)
class MadeWith:
    """The flags, seed and variant that a cell was made with; no variant for what a seed's cells share."""

    flags: dict[str, Any]
    seed: int
    variant: dict[str, Any] | None


class Work(NamedTuple):
    """A seed's cells that are still to be made, as its process is given them."""

    name: str
    cfg: Any
    flags: dict[str, Any]
    seed: int
    variants: list[Any]
    folder: Path
    prepare: Prepare | None
    one: One


class Done(NamedTuple):
    """A cell is made, or has failed; without a variant's name all that are left of the seed have.

    The first cell's seconds are those of `prepare`, too.
    """

    seed: int
    variant: str | None
    error: str | None
    seconds: float


def only_words(cfg: GridFlags, quick: bool = True) -> None:
    """Raises UserError for a setting that an ablation cannot have, and for --quick unless it may be `quick`."""
    if cfg.setting != "words":
        raise UserError(f"--setting {cfg.setting} is not used here: this ablation knows the words of the first world")
    if cfg.quick and not quick:
        raise UserError("--quick is not used here")


def unused(stage: Any, name: str, *fields: str) -> None:
    """Raises UserError where a stage's flag is given that an ablation sets by itself."""
    own = type(stage)()
    for field in fields:
        if getattr(stage, field) != getattr(own, field):
            raise UserError(f"--{name}.{field.replace('_', '-')} is not used here: this ablation sets it")


def run_grid(
    cfg: Any,
    name: str,
    variants: Sequence[Any],
    one: One,
    present: Present,
    *,
    prepare: Prepare | None = None,
    axes: tuple[str, ...] = (),
) -> dict[str, float]:
    """Makes the cells that are missing, then page.md, table.json and <name>.svg; returns each variant's means.

    `cfg` has the `GridFlags`; `axes` are the flags that only say which variants there are, so that a resumed run may
    have others. `prepare` and `one` are functions of a module, for other processes have to find them. Raises UserError
    for variants of the same name and for cells that other flags made; at the end SystemExit if cells are missing.
    """
    cfg, name = cfg.hurried() if cfg.quick else cfg, name if cfg.setting == "words" else f"{name}_{cfg.setting}"
    names = [variant_name(variant) for variant in variants]
    if len(set(names)) < len(names) or not names:
        raise UserError(f"{name}: each variant is to be named once, and these are {', '.join(names) or 'none'}")
    with Run(cfg.run_dir, cfg, name=name, resume=cfg.resume) as run:
        run.keep_folder()
        write_files(run.dir)
        works = [
            Work(name, cfg, learned_flags(cfg, axes), seed, list(variants), run.dir / f"seed-{seed}", prepare, one)
            for seed in range(cfg.seed, cfg.seed + cfg.seeds)
        ]
        failed = make_missing(works, cfg.jobs, run)
        cells = collect(works, failed)
        if cells.values:
            metrics = write_results(run, name, cells, present(cfg, cells), sys.modules[one.__module__], cfg.publish)
        if cells.missing:
            raise SystemExit(f"error: {missing_line(cells)} --run-dir {run.dir} --resume tries again.")
    return metrics


def learned_flags(cfg: Any, axes: tuple[str, ...]) -> dict[str, Any]:
    """The flags that a cell's numbers depend on, beside its seed and variant, as JSON has them."""
    told = {
        name for name in ("quick", "setting") if getattr(cfg, name) != GridFlags.__dataclass_fields__[name].default
    }
    own = {*GridFlags.__dataclass_fields__, *axes} - told
    return json.loads(json.dumps({name: x for name, x in asdict(cfg).items() if name not in own}, default=str))


# A seed's cells.


def make_cells(work: Work, tell: Callable[[Done], None]) -> None:
    """Makes a seed's cells one after the other. What fails is told, and leaves the others to be made."""
    prepared, began = None, time.monotonic()
    try:
        if work.prepare is not None:
            prepared = in_run(work, None, partial(work.prepare, work.cfg, work.seed))
    except Exception as error:
        traceback.print_exc()
        return tell(Done(work.seed, None, f"{type(error).__name__}: {error}", time.monotonic() - began))
    for variant in work.variants:
        error_text = None
        try:
            values = in_run(work, variant, partial(work.one, work.cfg, prepared, work.seed, variant))
            write_json(cell_file(work, variant), asdict(made_with(work, variant)) | {"values": plain(values)})
        except Exception as error:
            traceback.print_exc()
            error_text = f"{type(error).__name__}: {error}"
        tell(Done(work.seed, variant_name(variant), error_text, time.monotonic() - began))
        began = time.monotonic()


def in_run(work: Work, variant: Any, make: Callable[[Run], Any]) -> Any:
    """make(run) in the run of a cell, or of what the seed's cells share. Goes on with a run that was begun."""
    folder = work.folder / (SHARED if variant is None else variant_name(variant))
    begun = (folder / "config.json").exists()
    if begun:
        check_made_with(folder / "config.json", made_with(work, variant))
    with Run(folder, made_with(work, variant), name=work.name, resume=begun) as run:
        return make(run)


def made_with(work: Work, variant: Any) -> MadeWith:
    """Everything that a cell depends on."""
    return MadeWith(work.flags, work.seed, None if variant is None else variant._asdict())


def check_made_with(path: Path, expected: MadeWith) -> None:
    """Raises UserError when a file says that it was made with other flags than these."""
    found, wanted = (flat(part) for part in (read_json(path), json.loads(json.dumps(asdict(expected), default=str))))
    for name in wanted:
        if found.get(name) != wanted[name]:
            raise UserError(
                f"{path} was made with {name.removeprefix('flags.')} = {found.get(name)}, and now it is"
                f" {wanted[name]}: take another --run-dir, or remove {path.parent}"
            )


def cell_file(work: Work, variant: Any) -> Path:
    """The file of a finished cell."""
    return work.folder / f"{variant_name(variant)}.json"


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers and curves as JSON has them: what is not finite becomes null."""

    def finite(x: Any) -> float | None:
        return float(x) if math.isfinite(x) else None

    return {name: [finite(x) for x in value] if np.ndim(value) else finite(value) for name, value in values.items()}


def collect(works: Sequence[Work], failed: Sequence[Done]) -> Cells:
    """The finished cells, and why others are missing."""
    values, missing = {}, {}
    reasons = {(done.seed, done.variant): done.error for done in failed}
    for work in works:
        for variant in work.variants:
            name = variant_name(variant)
            if cell_file(work, variant).exists():
                values[work.seed, variant] = read_json(cell_file(work, variant))["values"]
            else:
                missing[work.seed, variant] = reasons.get((work.seed, name)) or reasons.get((work.seed, None)) or ""
    return Cells(tuple(work.seed for work in works), tuple(works[0].variants), values, missing)


# Processes: a seed each.


def make_missing(works: Sequence[Work], jobs: int, run: Run) -> list[Done]:
    """Makes the cells whose files are not there; returns those that failed. Says each one when it is done."""
    todo, failed = [], []
    for work in works:
        for variant in work.variants:
            if cell_file(work, variant).exists():
                check_made_with(cell_file(work, variant), made_with(work, variant))
        left = [variant for variant in work.variants if not cell_file(work, variant).exists()]
        if left:
            work.folder.mkdir(parents=True, exist_ok=True)
            todo.append(work._replace(variants=left))
    total, left_over = (sum(len(work.variants) for work in some) for some in (works, todo))
    run.say(f"{total} cells, {left_over} of them to be made")
    finished = total - left_over

    def hear(done: Done) -> None:
        nonlocal finished
        if done.error is None:
            finished += 1
            run.log("cells", finished, {"seed": done.seed, "seconds": done.seconds})
            return run.say(f"seed {done.seed}, {done.variant}: {done.seconds:.0f} s, {finished} of {total} cells")
        failed.append(done)
        run.warn(f"seed {done.seed}, {done.variant or 'all that is left of it'}: {done.error}")

    if jobs:
        run_processes(todo, jobs, hear)
    else:
        for work in todo:
            make_cells(work, hear)
    return failed


def run_processes(works: Sequence[Work], jobs: int, hear: Callable[[Done], None]) -> None:
    """`make_cells` in new processes, so many at once, each on cores of its own. None is left when this ends."""
    waiting, running = deque(works), dict[Connection, tuple[BaseProcess, Work, list[int]]]()
    shares = core_shares(min(jobs, len(works)))
    context = multiprocessing.get_context("spawn")
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                link, theirs = context.Pipe(duplex=False)
                cores = shares.pop()
                # A daemon ends with this process, also if that is interrupted before the next line.
                process: BaseProcess = context.Process(target=live, args=(waiting[0], theirs, cores), daemon=True)
                process.start()
                running[link] = process, waiting.popleft(), cores
                theirs.close()
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                try:
                    hear(ready.recv())
                except EOFError:
                    process, work, cores = running.pop(ready)
                    process.join()
                    shares.append(cores)
                    if process.exitcode:
                        log = work.folder / "log.txt"
                        hear(Done(work.seed, None, f"its process ended, exit code {process.exitcode}, see {log}", 0.0))
    finally:
        end_processes([process for process, *_ in running.values()])


def core_shares(jobs: int) -> list[list[int]]:
    """The cores of this process, shared out. [] may use all of them: where they are fewer than jobs, or not known."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [cores[number::jobs] if len(cores) >= jobs else [] for number in range(jobs)]


def end_processes(processes: Sequence[BaseProcess]) -> None:
    """Tells processes to end, and kills those that do not."""
    try:
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + SECONDS_TO_END
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.join()


def live(work: Work, link: Connection, cores: Sequence[int]) -> None:
    """A process's life: it writes to its seed's log.txt, and ends when the one that started it does."""
    if cores:
        os.sched_setaffinity(0, cores)
    log = os.open(work.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    make_cells(work, link.send)


# What is written.


def write_results(
    run: Run, name: str, cells: Cells, page: Page, module: ModuleType, publish: bool
) -> dict[str, float]:
    """table.md, table.json, the figure, page.md and summary.json; returns the summary: each variant's means."""
    (run.dir / "table.md").write_text(tables_markdown(page, cells), encoding="utf-8")
    summary = summarize(cells)
    write_json(run.dir / "table.json", summary)
    if page.panels:
        draw(page.panels, run.dir / f"{name}.svg")
        run.say(f"figure: {run.dir / f'{name}.svg'}")
    run.say(tables_markdown(page, cells))
    run.say(f"page: {write_record(run.dir, name, module, cells, page, publish=publish and not cells.missing)}")
    for claim in claims_of(module):
        found, agrees = verdict_words(claim, decide(claim, cells))
        run.say(f"{claim.text} ({claim.source}): {found}; agrees: {agrees or 'not made'}")
    metrics = {
        f"{variant}_{number}": math.nan if found["mean"] is None else found["mean"]
        for variant, numbers in summary["variants"].items()
        for number, found in numbers.items()
    }
    run.summary(metrics)
    return metrics
