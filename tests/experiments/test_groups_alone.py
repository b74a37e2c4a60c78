"""Algorithms without a critic as stages: from a model, prompts and a reward to a folder."""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import dapo, grpo
from rlhf_jax.cli import run_main
from rlhf_jax.errors import UserError
from rlhf_jax.pretrained import load_policy

pytestmark = pytest.mark.usefixtures("undrawn")

REWARD = """
def vowels(prompts, completions, **columns):
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]

def nothing(prompts, completions, **columns):
    return [0.0] * len(completions)
"""
SHORT = dict(max_length=64, max_new_tokens=8, groups=4, group_size=4, steps=2, reward_jobs=1)


@pytest.fixture(scope="module")
def given(tmp_path_factory, stories):
    """Flags of a model, prompts, and a file of rewards."""
    folder = tmp_path_factory.mktemp("given")
    rows = [json.dumps({"prompt": f"why {n}?"}) for n in range(40)]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    (folder / "rewards.py").write_text(REWARD)
    return {"model": stories, "prompts": str(folder / "prompts.jsonl")}, folder


def metrics_of(folder):
    return [json.loads(line) for line in open(folder / "metrics.jsonl", encoding="utf-8")]


def test_grpo_alone_and_resumed_is_grpo(given, tmp_path):
    flags, folder = given
    flags = (
        flags
        | SHORT
        | {"reward": f"{folder / 'rewards.py'}:vowels", "learning_rate": 1e-3, "save_every": 1, "keep": 3}
        | {"reference": flags["model"]}
    )
    metrics = grpo.main(grpo.Config(run_dir=str(tmp_path / "run"), **flags))
    rows = metrics_of(tmp_path / "run")
    assert [row["stage"] for row in rows] == ["grpo"] * 2 and rows[0]["groups"] == 4
    assert {"score", "silent", "kl_k1", "entropy", "length", "reward/vowels/mean", "sampler_gap"} <= set(rows[0])
    assert abs(rows[0]["kl_k1"]) < 1e-5 < abs(rows[1]["kl_k1"]) and rows[0]["clip_fraction"] == 0
    assert {"start_score", "grpo_score", "score_win_rate", "grpo_heldout_kl"} <= set(metrics)
    example = json.loads((tmp_path / "run" / "examples.jsonl").read_text().splitlines()[0])
    assert {"prompt", "start", "grpo"} <= set(example)
    assert "GRPO" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    # Killed after its first iteration, it goes on to the very same numbers.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "grpo" / "2")
    (tmp_path / "run" / "summary.json").unlink()
    grpo.main(grpo.Config(run_dir=str(tmp_path / "run"), resume=True, **flags))
    again = metrics_of(tmp_path / "run")
    clocks = {"time", "seconds", "tokens_per_second", "compilations"}
    assert len(again) == 2 and again[0] == rows[0]
    for name in rows[1].keys() - clocks:
        assert again[1][name] == rows[1][name], name
    trained = load_policy(str(tmp_path / "run" / "policy"))
    start = load_policy(flags["model"])
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), trained.params, start.params)
    assert max(jax.tree.leaves(moved)) > 1e-4


def test_dapo_draws_again_where_no_group_has_a_signal_and_counts_it(given, tmp_path):
    flags, folder = given
    flags = flags | SHORT | {"reward": f"{folder / 'rewards.py'}:nothing", "rounds": 3}
    flags |= {"slots": 8, "pass_samples": 2}
    metrics = dapo.main(dapo.Config(run_dir=str(tmp_path / "run"), **flags))
    rows = metrics_of(tmp_path / "run")
    assert [row["groups"] for row in rows] == [12, 12] and rows[0]["silent"] == 1.0
    assert [row["learned_groups"] for row in rows] == [0, 0]
    assert rows[0]["grad_norm"] == 0.0 and [row["skipped"] for row in rows] == [0, 0]
    passed = {f"{who}_pass@{k}" for who in ("start", "dapo") for k in (1, 2)}
    assert passed <= set(metrics) and all(metrics[name] == 0 for name in passed)


def test_on_a_mesh_slots_that_are_too_few_are_told(given, tmp_path, capsys):
    flags, folder = given
    flags = flags | SHORT | {"reward": f"{folder / 'rewards.py'}:nothing", "groups": 8, "group_size": 2, "steps": 1}
    grpo.main(grpo.Config(run_dir=str(tmp_path / "run"), mesh="fsdp=8", slots=4, **flags))
    said = "--slots 4 are not enough for 8 groups of 2 on 8 copies of the weights: 16 answers are sampled at once"
    assert said in " ".join(capsys.readouterr().out.split())
    (row,) = metrics_of(tmp_path / "run")
    assert row["groups"] == 8 and np.isfinite(row["entropy"])


def test_a_reference_that_is_not_used_and_a_buffer_that_does_not_fit_are_refused(given, tmp_path):
    flags, folder = given
    flags = flags | SHORT | {"reward": f"{folder / 'rewards.py'}:nothing"}
    with pytest.raises(UserError, match="--reference is not used: DAPO has no KL to a reference"):
        dapo.main(dapo.Config(run_dir=str(tmp_path / "a"), reference=flags["model"], **flags))
    with pytest.raises(UserError, match="--reference is not used: GRPO has no KL to a reference here"):
        grpo.main(grpo.Config(run_dir=str(tmp_path / "b"), reference=flags["model"], beta=0, **flags))
    with pytest.raises(UserError, match="--overlong-buffer 9 is more than --max-new-tokens 8"):
        dapo.main(dapo.Config(run_dir=str(tmp_path / "c"), overlong_buffer=9, **flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--groups", "3", "--group-size", "3", "--minibatches", "2"], "9 answers do not divide into 2 minibatches"),
        (["--slots", "12"], "12 slots are not whole groups of 8 answers"),
        (["--group-size", "1"], "group-size is 1; it must be at least 2"),
        (["--model", "nowhere", "--prompts", "F"], "there is no reward"),
        (["--model", "nowhere", "--prompts", "F", "--reward", "guess"], "nowhere"),
    ],
)
def test_a_users_mistake_is_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["grpo.py", *flags])
    with pytest.raises(SystemExit) as end:
        run_main(grpo.main, grpo.Config)
    shown = capsys.readouterr().err.strip()
    assert end.value.code == 2 and len(shown.splitlines()) == 1 and message in shown
    assert not list(Path("runs").glob("*"))
