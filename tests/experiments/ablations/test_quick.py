"""Every ablation with claims runs by its command with --quick; each day another one is tried here."""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[3]
NAMES = (
    "tails", "imitation", "reward_data", "kl_coefficient", "ppo_details", "constitution", "preference_losses",
    "verifiable", "diversity", "length", "adaptive_kl", "rounds", "sizes", "forgetting", "online", "staleness",
)  # fmt: skip
"""The ensemble is left out: it takes minutes."""


def test_the_ablation_of_the_day(tmp_path):
    name = NAMES[int(time.time() // 86_400) % len(NAMES)]
    command = [sys.executable, f"experiments/ablations/{name}.py", "--quick", "--jobs", "0", "--common", "none"]
    done = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{name}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
    page = (tmp_path / "run" / "page.md").read_text(encoding="utf-8")
    assert page.startswith("# ") and "| not decided |" in page and (tmp_path / "run" / f"{name}.svg").exists()


def test_the_names_are_those_of_the_ablations_with_claims():
    folder = ROOT / "experiments" / "ablations"
    found = {path.stem for path in folder.glob("*.py") if "\nCLAIMS = (" in path.read_text(encoding="utf-8")}
    assert found == {*NAMES, "ensemble"}
