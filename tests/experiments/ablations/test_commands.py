"""Studies of real models: their command lines are taken by the experiments, and are run once."""

import importlib
import json
from dataclasses import replace

import pytest
import tyro

from experiments.ablations import commands, real_constitution, real_preferences, real_rewards, real_sums
from experiments.ablations.commands import Command, finished, run_missing
from rlhf_jax.cli import run_main
from rlhf_jax.errors import UserError

PROGRAM = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
folder.mkdir(exist_ok=True)
summary = {"resumed": "--resume" in sys.argv}
for name, value in {"summary": summary, "config": {}, "status": {"status": sys.argv[1]}}.items():
    (folder / f"{name}.json").write_text(json.dumps(value))
sys.exit(sys.argv[1] != "finished")
"""
STUDIES = {
    "preferences": (real_preferences, real_preferences.Config(
        model="M", comparisons="F", preferences=("HH", "B"), ifeval="I", text="T", run_dir="runs/x",
    )),
    "constitution": (real_constitution, real_constitution.Config(
        model="M", comparisons="F", asked="G", constitution="C", run_dir="runs/x",
    )),
    "rewards": (real_rewards, real_rewards.Config(
        model="M", comparisons=("HH", "B"), preferences=("HH", "B", "C"), run_dir="runs/x",
    )),
    "sums": (real_sums, real_sums.Config(model="M", run_dir="runs/x", seeds=2)),
}  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_the_experiments_take_every_command(name, tmp_path):
    study, cfg = STUDIES[name]
    made = study.commands(cfg, tmp_path)
    assert len({one.name for one in made}) == len(made) >= (2 if name == "constitution" else 10)
    for one in made:
        config = importlib.import_module(f"experiments.{one.experiment.removesuffix('.py')}").Config
        tyro.cli(config, args=[*one.flags, "--run-dir", "x"])


def test_parts_have_no_prompt_in_common(tmp_path):
    """Of rows with the same prompt all are where the first one is."""
    rows = [
        {
            "instruction": f"ask {n if n % 10 else 0}",
            "input": "",
            "chosen": f"a {n}",
            "rejected": f"b {n}",
            "output": "no",
        }
        for n in range(100)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = real_preferences.Config(model="M", comparisons=str(file), run_dir=str(tmp_path))
    real_preferences.cut(cfg, tmp_path)
    parts = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in real_preferences.CUTS
    }
    assert sum(map(len, parts.values())) == 100 and all(parts[name] for name in parts)
    asked = [{row["instruction"] for row in part} for part in parts.values()]
    assert sum(map(len, asked)) == len(set.union(*asked)) == 91
    assert set(parts["a"][0]) == {"instruction", "input", "chosen", "rejected"}
    assert set(parts["prompts"][0]) == {"instruction", "input"}
    file.write_text(file.read_text().replace("a 3", "other"))
    with pytest.raises(UserError, match="was cut from other comparisons: take another --run-dir"):
        real_preferences.cut(cfg, tmp_path)


def test_the_prompts_of_a_constitution_are_first_turns(tmp_path):
    file = tmp_path / "hh.jsonl"
    turns = ["how?", "how?", "why " * 50, "", "when?", "who?", "where?"]
    rows = [
        {"chosen": f"\n\nHuman: {text}\n\nAssistant: so.\n\nHuman: no\n\nAssistant: ah", "rejected": "x"}
        for text in turns
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = real_constitution.Config(model="M", comparisons="F", asked=str(file), prompts=4, run_dir=str(tmp_path))
    real_constitution.write_prompts(cfg, tmp_path)
    asked = [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert asked == ["how?", "when?", "who?", "where?"]
    with pytest.raises(UserError, match="4 first turns of at most 120 characters, not 5"):
        real_constitution.write_prompts(replace(cfg, prompts=5), tmp_path)


def test_what_is_finished_is_left_alone_and_what_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    program = PROGRAM
    (tmp_path / "one.py").write_text(program)
    monkeypatch.setattr(commands, "EXPERIMENTS", tmp_path)
    made = [Command("good", "one.py", ("finished",)), Command("bad", "one.py", ("failed",))]
    made += [Command("later", "one.py", ("finished",))]
    assert run_missing(tmp_path / "runs", made) == ["bad"]
    assert finished(tmp_path / "runs", "bad") is None and finished(tmp_path / "runs", "later") == {"resumed": False}
    assert "python experiments/one.py finished --run-dir" in capsys.readouterr().out
    (tmp_path / "one.py").write_text(program.replace("sys.argv[1]}", '"finished"}').replace("sys.exit", "print"))
    assert run_missing(tmp_path / "runs", made) == []
    assert finished(tmp_path / "runs", "bad") == {"resumed": True}  # it was begun
    assert finished(tmp_path / "runs", "good") == {"resumed": False}  # and this one was not run again


@pytest.mark.parametrize("study", [real_constitution, real_preferences, real_sums])
def test_a_study_without_a_model_is_one_line(study, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["study.py"])
    with pytest.raises(SystemExit) as ended:
        run_main(study.main, study.Config)
    assert ended.value.code and "model is missing" in capsys.readouterr().err
