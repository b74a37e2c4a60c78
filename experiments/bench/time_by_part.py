"""Where the time of a row of `rows.py` goes, by part of the model and direction.

    python experiments/bench/time_by_part.py --row reward_model
Prints core-seconds a step of what JAX's profiler sees in XLA's threads on a CPU: each operation is put where the
compiled program says that it comes from. Weight gradients are products that XLA hands on to Eigen's threads, and
waiting is nobody's: both are in the last line only, the difference to steps × cores.
"""

import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.bench import rows
from rlhf_jax.cli import run_main
from rlhf_jax.errors import at_least

PARTS = {
    "projections": r"/(query|key|value|output)/",
    "attention": r"attention(?!_norm)",
    "feed-forward": r"/(gate|up|down)/",
    "norms": r"norm",
    "layers, other": r"/layers?(_\d+)?/",
    "head, loss, embedding": r"/",
}
"""Looked for in this order; what has no path is the optimiser's."""
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = \S+ ([\w\-]+)\((.*)$", re.MULTILINE)
DIRECTIONS = ("forward", "recomputed", "backward")


@dataclass(frozen=True)
class Config:
    """Profiles a row."""

    row: str
    """One of those of rows.py."""
    shape: rows.Shape = "stories-15m"
    """The model's."""
    steps: int = 3
    """Steps that count, after 3 that do not."""

    def __post_init__(self) -> None:
        at_least(self, steps=1)
        rows.Config(rows=(self.row,))


def origins(programs: Iterable[str]) -> dict[tuple[str, str], str]:
    """Where each instruction of compiled programs (HLO text) comes from, but for what holds others (loops, calls).

    By program and instruction.
    """
    found = {}
    for text in programs:
        program = text.split(maxsplit=2)[1].rstrip(",")  # HloModule NAME, …
        for name, kind, rest in INSTRUCTION.findall(text):
            if kind not in ("while", "call", "conditional"):
                path = re.search(r'op_name="jit\([^)]*\)([^"]*)"', rest)
                found[program, name] = path[1] if path else ""
    return found


def place(path: str) -> tuple[str, str]:
    """(part, direction) of an instruction from its path. What the sampler does has its own line."""
    if "_generate" in path:
        return "rollout", "forward"
    part = next((part for part, pattern in PARTS.items() if re.search(pattern, path)), "optimiser")
    if "rematted_computation" in path:
        return part, "recomputed"
    return part, "backward" if "transpose(" in path else "forward"


def main(cfg: Config) -> dict[str, float]:
    """Prints the table; returns core-seconds a step by part."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_dump_to={folder}/hlo --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
        import jax

        jax.config.update("jax_enable_compilation_cache", False)  # what is read from it is not written out
        work = rows.build(cfg.row, cfg.shape)
        state, work = work.state, work._replace(state=None)
        for i in range(3):
            state = work.step(state, i)
        began = time.perf_counter()
        with jax.profiler.trace(folder):
            for i in range(cfg.steps):
                state = work.step(state, i)
            seconds = (time.perf_counter() - began) / cfg.steps
        texts = sorted(Path(folder).glob("hlo/*after_optimizations.txt"), key=lambda path: path.stat().st_size)
        origin = origins(path.read_text() for path in texts)  # the largest has the last word
        (trace,) = Path(folder).glob("**/*.xplane.pb")
        spent: Counter[tuple[str, str]] = Counter()
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
            for line in plane.lines:
                for event in line.events if line.name != "python" else ():
                    path = origin.get((dict(event.stats).get("hlo_module", ""), event.name))
                    if path is not None:
                        spent[place(path)] += event.duration_ns / 1e9 / cfg.steps
    print(f"{'core-seconds a step':<24}" + "".join(f"{direction:>12}" for direction in DIRECTIONS))
    parts = (*PARTS, "optimiser", "rollout")
    for part in parts:
        print(f"{part:<24}" + "".join(f"{spent[part, direction]:12.3f}" for direction in DIRECTIONS))
    cores = len(os.sched_getaffinity(0))
    unseen = cores * seconds - spent.total()
    print(f"{cfg.row}: {seconds:.2f} s a step on {cores} cores; {unseen:.2f} core-seconds unseen")
    return {part: sum(spent[part, direction] for direction in DIRECTIONS) for part in parts}


if __name__ == "__main__":
    run_main(main, Config)
