"""Kills a run with SIGKILL at random moments, resumes it each time, and compares it with one that was left alone.

    python experiments/bench/kills.py --program pipeline --kills 20
The stages are those of the program, small, in a small world. Prints a JSON line: how often it was killed, which
checkpoint was the last one then, and whether the checkpoints' SHA-256s, the metrics file (but for clocks) and the
summary are the same. It takes about ten times as long as the run alone.
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

from rlhf_jax import checkpoint
from rlhf_jax.cli import run_main
from rlhf_jax.errors import UserError, at_least
from rlhf_jax.metrics import CLOCKS

SMALL = """
from experiments import setting, {program}
setting.DEMONSTRATIONS, setting.COMPARED, setting.RANKED = 512, 64, 4
setting.HELDOUT_PAIRS, setting.HELDOUT = 64, 64
from rlhf_jax.cli import run_main
run_main({program}.main, {program}.Config)
"""
SFT = "--sft.steps 60 --sft.save-every 3 --sft.keep 2"
FLAGS = {
    "pipeline": f"{SFT} --reward-model.epochs 6 --reward-model.prompts-per-step 8 --reward-model.save-every 3"
    " --ppo.steps 24 --ppo.responses 32 --ppo.save-every 2 --ppo.keep 2 --ppo.target-kl 2",
    "dpo": f"{SFT} --steps 80 --batch-size 16 --save-every 3 --keep 2",
}


@dataclass(frozen=True)
class Config:
    """Kills and resumes a run, and compares."""

    program: Literal["pipeline", "dpo"] = "pipeline"
    kills: int = 20
    share: float = 0.5
    """A life ends at a random moment up to this share of the time that the undisturbed run took."""
    seed: int = 0
    run_dir: str | None = None
    """Where both runs are written; by default a temporary folder."""

    def __post_init__(self) -> None:
        at_least(self, kills=1, share=0, seed=0)


def live(cfg: Config, folder: Path, *, resume: bool, seconds: float | None) -> bool:
    """One life of a run, killed after so many seconds; whether it came to its end before."""
    command = [sys.executable, "-c", SMALL.format(program=cfg.program), "--run-dir", str(folder)]
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
        raise UserError(f"the run failed by itself; what it said is in {said}")
    return process.returncode == 0


def what_it_is(folder: Path) -> dict[str, Any]:
    """What must not depend on how often a run was killed."""
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl", encoding="utf-8")]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {
        "checkpoints": {(c.stage, c.step): c._replace(path=Path()) for c in checkpoint.checkpoints(folder)},
        "metrics": [{name: value for name, value in row.items() if name not in CLOCKS} for row in rows],
        "summary": {name: value for name, value in summary.items() if not name.endswith(CLOCKS)},
    }


def main(cfg: Config) -> dict[str, Any]:
    """Runs it undisturbed and killed; returns and prints what was the same."""
    folder = Path(cfg.run_dir or tempfile.mkdtemp(prefix="kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    live(cfg, folder / "straight", resume=False, seconds=None)
    longest = cfg.share * (time.monotonic() - began)
    rng = random.Random(cfg.seed)
    killed, ended, after = folder / "killed", False, []
    while not ended:
        seconds = rng.uniform(0, longest) if len(after) < cfg.kills else None
        ended = live(cfg, killed, resume=killed.exists(), seconds=seconds)
        if not ended:
            saved = [path for path in killed.glob("checkpoints/*/*") if path.name.isdecimal()]
            last = max(saved, key=lambda path: path.stat().st_mtime, default=None)
            after.append(f"{last.parent.name} {last.name}" if last else "nothing")
    straight, other = what_it_is(folder / "straight"), what_it_is(killed)
    result = {"program": cfg.program, "kills": len(after), "after": after, "rows": len(straight["metrics"])}
    result |= {f"same_{name}": straight[name] == other[name] for name in straight}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    run_main(main, Config)
