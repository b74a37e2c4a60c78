"""A row of `rows.py` and another program that does the same work, one after the other, and the ratio.

    python experiments/bench/beside.py --row sft --other "python torch_plain.py sft"
The other program's last line has to hold a JSON object (text may stand before it) with tokens_per_s or
seconds_per_step, and perhaps peak_rss_mib. Each is run `--rounds` times in turn and the best of each counts, since
whatever else the machine does only ever slows one down. Prints the best lines, then one with the ratios: above 1 is
faster, below 1 is leaner.
"""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.bench import rows
from rlhf_jax.cli import run_main
from rlhf_jax.errors import UserError, at_least


@dataclass(frozen=True)
class Config:
    """Runs a row beside another program."""

    row: str
    """One of those of rows.py."""
    other: str
    """The other program and its arguments, as for a shell."""
    shape: rows.Shape = "stories-15m"
    """The model's."""
    rounds: int = 2
    steps: int = 15

    def __post_init__(self) -> None:
        at_least(self, rounds=1, steps=1)
        rows.Config(rows=(self.row,))


def last_line(command: list[str]) -> dict[str, Any]:
    """The JSON object in the last line that a program prints. Raises UserError without one."""
    try:
        ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{' '.join(command)}: {error}") from None
    line = (ended.stdout.strip().splitlines() or [""])[-1]
    try:
        found = json.loads(line[line.index("{") :])
    except ValueError:
        raise UserError(f"{' '.join(command)}: its last line is no JSON object: {line[:100]!r}") from None
    if not {"tokens_per_s", "seconds_per_step"} & found.keys():
        raise UserError(f"{' '.join(command)}: neither tokens_per_s nor seconds_per_step in its last line")
    return found


def speed(line: dict[str, Any]) -> float:
    """Tokens a second, or steps a second where there are none."""
    return line.get("tokens_per_s") or 1 / line["seconds_per_step"]


def main(cfg: Config) -> dict[str, float]:
    """Returns and prints the ratios."""
    flags = ["--rows", cfg.row, "--shape", cfg.shape, "--steps", str(cfg.steps)]
    ours = [sys.executable, str(Path(rows.__file__)), *flags]
    pairs = [(last_line(ours), last_line(shlex.split(cfg.other))) for _ in range(cfg.rounds)]
    mine, theirs = (max(lines, key=speed) for lines in zip(*pairs, strict=True))
    if "tokens_per_s" not in theirs:
        mine = {key: value for key, value in mine.items() if key != "tokens_per_s"}
    ratios = {"speed": speed(mine) / speed(theirs)}
    for name in ("peak_rss_mib", "cold_start_s"):
        if theirs.get(name):
            ratios[name] = mine[name] / theirs[name]
    for line in (mine, theirs, {"ratio": {name: round(value, 3) for name, value in ratios.items()}}):
        print(json.dumps(line), flush=True)
    return ratios


if __name__ == "__main__":
    run_main(main, Config)
