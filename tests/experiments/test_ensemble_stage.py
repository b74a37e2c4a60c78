"""Reward models trained together and used as one: their seeds, resuming between them, and what is refused."""

import json
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments import grpo, ppo, reward_model, stages
from rlhf_jax import loop
from rlhf_jax.cli import run_main
from rlhf_jax.compiled import COMPILED
from rlhf_jax.errors import UserError
from rlhf_jax.models import ModelConfig, load_hf_reward_model
from rlhf_jax.pretrained import load_policy
from rlhf_jax.tasks.rewards import Ensemble, ensemble_scorer, load_reward_model
from rlhf_jax.tasks.simulated import World

MEMBERS = dict(members=2, epochs=1, prompts_per_step=8, evaluations=1)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def params_of(folder):
    return jax.tree.map(np.asarray, load_hf_reward_model(folder)[1])


def differ(first, second):
    return not all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(second)))


@pytest.fixture(scope="module")
def members(small_world_for_all, small_policy, tmp_path_factory):
    """The run of two members, and its metrics."""
    folder, compiled = tmp_path_factory.mktemp("members") / "run", []

    def listener(event, duration_secs, **of):
        if event == COMPILED:
            compiled.append(str(of.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        metrics = reward_model.main(reward_model.Config(run_dir=str(folder), model=small_policy, **MEMBERS))
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert sum("train_step" in name for name in compiled) == 1  # and not once for each member
    return folder, metrics


def test_members_have_seeds_of_their_own_and_folders(members):
    folder, metrics = members
    assert sorted(path.name for path in folder.glob("reward_model*")) == ["reward_model_1", "reward_model_2"]
    first, second = (params_of(folder / f"reward_model_{number}") for number in (1, 2))
    # Another head, and another order of the same comparisons.
    assert np.corrcoef(first["head"]["kernel"], second["head"]["kernel"])[0, 1] < 0.9
    by_stage = {
        stage: [row for row in rows_of(folder) if row["stage"] == stage]
        for stage in ("reward_model_1", "reward_model_2")
    }
    assert [row["step"] for row in by_stage["reward_model_1"]] == [row["step"] for row in by_stage["reward_model_2"]]
    assert by_stage["reward_model_1"][0]["loss"] != by_stage["reward_model_2"][0]["loss"]
    for name in ("reward_model_1", "reward_model_2", "reward_model"):
        assert 0 <= metrics[f"{name}_val_accuracy"] <= 1 and metrics[f"{name}_ceiling"] > 0.5
    assert 0 <= metrics["reward_model_disagreement"] <= 1 and metrics["reward_model_spread"] > 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Reward model 2 of 2" in page and "Mean of the reward models" in page
    # The pairs are shown with the mean of both scores.
    assert len((folder / "examples.jsonl").read_text().splitlines()) == 24


def test_the_first_member_is_the_model_that_is_trained_alone(members, small_policy, tmp_path):
    folder, _ = members
    alone = reward_model.Config(run_dir=str(tmp_path / "run"), model=small_policy, **MEMBERS | {"members": 1})
    reward_model.main(alone)
    assert not differ(params_of(tmp_path / "run" / "reward_model"), params_of(folder / "reward_model_1"))


def test_a_run_that_was_killed_in_its_second_member_goes_on_there(members, small_policy, tmp_path, monkeypatch):
    folder, metrics = members
    end_step, ended = loop.Loop.end_step, []

    def kill(self, step, *args, **kwargs):
        end_step(self, step, *args, **kwargs)
        ended.append((self.stage, step))
        if self.stage == "reward_model_2":
            raise KeyboardInterrupt

    cfg = reward_model.Config(run_dir=str(tmp_path / "run"), model=small_policy, save_every=1, **MEMBERS)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "end_step", kill)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            reward_model.main(cfg)
        assert ended == [("reward_model_1", 0), ("reward_model_1", 1), ("reward_model_2", 0)]
    again = reward_model.main(replace(cfg, resume=True))
    for name in ("reward_model_1", "reward_model_2"):
        assert not differ(params_of(tmp_path / "run" / name), params_of(folder / name))
    assert again == metrics


def test_ppo_in_the_world_makes_four_members_first(small_world_for_all, members, small_policy, tmp_path, monkeypatch):
    """Those that are there are taken: four copies of two, made with the flags that are asked for."""
    asked = []

    def made(cfg, run, name, **given):
        asked.append((name, given))
        return tmp_path

    for number in range(1, 5):
        (tmp_path / f"reward_model_{number}").symlink_to(members[0] / f"reward_model_{(number - 1) % 2 + 1}")
    monkeypatch.setattr(stages, "made_first", made)
    cfg = ppo.Config(
        run_dir=str(tmp_path / "run"), model=small_policy, steps=1, responses=8, minibatches=2, epochs=1,
        reward_ensemble="lower", ensemble_lambda=0.5,
    )  # fmt: skip
    metrics = ppo.main(cfg)
    assert asked == [("reward_model", {"model": small_policy, "members": 4})]
    (row,) = rows_of(tmp_path / "run")
    assert row["reward/ensemble/applies"] == 1 and np.isfinite(metrics["ppo_score"])
    assert np.isfinite(row["reward/ensemble/mean"]) and row["reward/ensemble/std"] > 0


def test_grpo_with_an_ensemble_does_not_take_the_worlds_checker(small_world_for_all, members, small_policy, tmp_path):
    """The two members as one, by the flags of the command line."""
    folders = tuple(str(members[0] / f"reward_model_{number}") for number in (1, 2))
    cfg = grpo.Config(
        run_dir=str(tmp_path / "run"), model=small_policy, steps=1, groups=2, group_size=2, pass_samples=0,
        reward_model=folders, reward_ensemble="weights", reward_weights=(2.0,),
    )  # fmt: skip
    grpo.main(cfg)
    (row,) = rows_of(tmp_path / "run")
    assert {name for name in row if name.endswith("/mean")} == {"reward/ensemble/mean"}


def test_members_that_cannot_be_one_are_refused(small_world_for_all, members, stories, tmp_path):
    world = World(0)
    first, second = (str(members[0] / f"reward_model_{number}") for number in (1, 2))
    models = {folder: load_reward_model(folder) for folder in (first, second)}

    def scorer(models):
        return ensemble_scorer(world, models, Ensemble("min", 1.0), weight=1.0)

    reward, (config, critic) = scorer(models)
    assert reward.traceable and config == models[first].config and not differ(critic, models[first].params)
    with pytest.raises(UserError, match="is one reward model, and an ensemble has two or more"):
        scorer({first: models[first]})
    small = ModelConfig(**{**vars(config), "d_ff": 32})
    with pytest.raises(UserError, match=r"other has another shape than .*reward_model_1"):
        scorer(models | {"other": models[second]._replace(config=small)})
    with pytest.raises(UserError, match="other has another tokenizer than the policy"):
        scorer(models | {"other": models[second]._replace(tokenizer=load_policy(stories).tokenizer)})
    # Averaged weights are what the critic starts from.
    reward, (_, critic) = ensemble_scorer(world, models, Ensemble("weights", 1.0), weight=1.0)
    assert not differ(critic, reward.params) and differ(critic, models[first].params)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward-ensemble", "min", "--reward-model", "A"], "of two or more reward models, and there are 1"),
        (["--reward-ensemble", "min", "--reward", "math"], "of two or more reward models, and there are 0"),
        (
            ["--reward-ensemble", "min", "--reward-model", "A", "B", "--reward-weights", "1", "2"],
            "2 reward-weights for 1",
        ),
        (["--ensemble-lambda", "1"], "ensemble-lambda is about --reward-ensemble lower or uwo"),
        (["--reward-ensemble", "mean", "--ensemble-lambda", "1"], "ensemble-lambda is about --reward-ensemble lower"),
        (["--reward-ensemble", "lower", "--ensemble-lambda", "-1"], "ensemble-lambda"),
    ],
)
def test_a_users_mistake_is_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x.py", *flags])
    with pytest.raises(SystemExit) as end:
        run_main(ppo.main, ppo.Config)
    assert end.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*"))
