"""Kills a run with SIGKILL at random moments, resumes it each time, and compares it with an undisturbed run.

    python experiments/bench/kills.py --program pipeline --kills 20
The program runs its own stages with small sizes in a small world. The result is a JSON line: the number of kills, the
last checkpoint at each kill, and whether the checkpoints' SHA-256s, the metrics file (except clocks) and the summary
are the same. It takes about ten times as long as the run alone.
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

from rlhf_jax import checkpoint
from rlhf_jax.cli import run_main
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.metrics import CLOCKS

SMALL = """
import sys
from functools import partial
sys.path.insert(0, {root!r})
from experiments import sft, {program}
from rlhf_jax.cli import run_main
from rlhf_jax.tasks import simulated
simulated.SIZES = simulated.SIZES._replace(demonstrations=512, compared=64, ranked=4, heldout_pairs=64, heldout=64)
sft.Config = partial(sft.Config, steps=60, save_every=3, keep=2)  # the SFT that DPO runs first
run_main({program}.main, {program}.Config)
"""
FLAGS = {
    "pipeline": "--sft.steps 60 --sft.save-every 3 --sft.keep 2"
    " --reward-model.epochs 6 --reward-model.prompts-per-step 8 --reward-model.save-every 3"
    " --ppo.steps 24 --ppo.responses 32 --ppo.save-every 2 --ppo.keep 2 --ppo.target-kl 2",
    "dpo": "--steps 80 --batch-size 16 --save-every 3 --keep 2",
}


@dataclass(frozen=True)
class Config:
    """Kills and resumes a run, and compares."""

    program: Literal["pipeline", "dpo"] = "pipeline"
    kills: int = 20
    share: float = 0.5
    """A run is killed at a random moment, at most this share of the undisturbed run's time after its start."""
    seed: int = 0
    run_dir: str | None = None
    """The folder of both runs; by default a temporary folder."""

    def __post_init__(self) -> None:
        at_least(self, kills=1, share=0, seed=0)


def live(cfg: Config, folder: Path, *, resume: bool, seconds: float | None) -> bool:
    """Starts or resumes a run and kills it after `seconds`. Returns whether it had ended by itself before.

    Raises UserError when the run fails.
    """
    small = SMALL.format(root=str(Path(__file__).parents[2]), program=cfg.program)
    command = [sys.executable, "-c", small, "--run-dir", str(folder)]
    said = folder.with_suffix(".log")
    with open(said, "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command, *(["--resume"] if resume else FLAGS[cfg.program].split())], stdout=log, stderr=log
        )
    began: float | None = None
    while process.poll() is None:
        time.sleep(0.01)
        if began is None and "run: " in said.read_text(encoding="utf-8"):
            began = time.monotonic()
        if seconds is not None and began is not None and time.monotonic() - began > seconds:
            process.send_signal(signal.SIGKILL)
    if process.returncode not in (0, -signal.SIGKILL):
        raise UserError(f"the run failed by itself; its output is in {said}")
    return process.returncode == 0


def results(folder: Path) -> dict[str, list[Any]]:
    """Results that must not depend on kills: those of the run, and of the runs in its folder that came first."""
    runs = sorted(path.parent for path in folder.rglob("summary.json"))
    rows = [json.loads(line) for run in runs for line in open(run / "metrics.jsonl", encoding="utf-8")]
    summaries = [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in runs]
    saved = [sorted(checkpoint.checkpoints(run), key=lambda found: (found.stage, found.step)) for run in runs]
    return {
        "checkpoints": [found._replace(path=Path()) for some in saved for found in some],
        "metrics": [{name: value for name, value in row.items() if name not in CLOCKS} for row in rows],
        "summary": [{name: x for name, x in summary.items() if not name.endswith(CLOCKS)} for summary in summaries],
    }


def main(cfg: Config) -> dict[str, Any]:
    """Runs it undisturbed and killed; returns and prints what was the same."""
    folder = Path(cfg.run_dir or tempfile.mkdtemp(prefix="kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    live(cfg, folder / "straight", resume=False, seconds=None)
    longest = cfg.share * (time.monotonic() - began)
    rng = random.Random(cfg.seed)
    after: list[str] = []
    killed, ended = folder / "killed", False
    while not ended:
        seconds = rng.uniform(0, longest) if len(after) < cfg.kills else None
        ended = live(cfg, killed, resume=killed.exists(), seconds=seconds)
        if not ended:
            saved = [path for path in killed.glob("**/checkpoints/*/*") if path.name.isdecimal()]
            last = max(saved, key=lambda path: path.stat().st_mtime, default=None)
            after.append(f"{last.parent.name} {last.name}" if last else "nothing")
    straight, other = results(folder / "straight"), results(killed)
    result = {"program": cfg.program, "kills": len(after), "after": after, "rows": len(straight["metrics"])}
    result |= {f"same_{name}": straight[name] == other[name] for name in straight}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    run_main(main, Config)
