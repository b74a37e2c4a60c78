"""The loop from the command: rounds in the world, people as labellers, and a run that was cut short."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import iterate
from experiments.ppo import PPO
from experiments.reward_model import RewardModel
from rlhf_jax.data.tokens import take
from rlhf_jax.ensemble import label_value
from rlhf_jax.errors import UserError
from rlhf_jax.log import Run
from rlhf_jax.metrics import read_metrics
from rlhf_jax.models import load_hf, load_hf_reward_model
from rlhf_jax.sampling.sampler import numpy_completions
from rlhf_jax.simulation import Annotators
from rlhf_jax.tasks.simulated import World

FLAGS = {
    "rounds": 2, "labels": 12, "answers": 4, "choose": "uncertain", "eval_batch_size": 64,
    "reward_model": RewardModel(epochs=1, prompts_per_step=4),
    "ppo": PPO(steps=2, responses=8, epochs=1, minibatches=1),
}  # fmt: skip


def rows(folder, name="comparisons"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def done(small_world_for_all, small_policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, iterate.main(iterate.Config(run_dir=str(folder), model=small_policy, **FLAGS))


def test_each_round_has_fresh_prompts_and_all_labels_so_far(done):
    folder, metrics = done
    stages = read_metrics(folder)
    assert list(stages) == ["reward_model-1", "ppo-1", "rounds", "reward_model-2", "ppo-2"]
    first, second = (rows(folder / f"round-{k}") for k in (1, 2))
    assert not {row["row"] for row in first} & {row["row"] for row in second}
    assert [row["labels"] for row in stages["rounds"]] == [len(first), len(first) + len(second)]
    for row in first + second:
        assert sorted(row["ranks"]) == list(range(len(row["responses"]))) and len(set(row["responses"])) > 1
    weights = [load_hf_reward_model(str(folder / f"round-{k}" / "reward_model"))[1] for k in (1, 2)]
    assert not np.array_equal(*(some["head"]["kernel"] for some in weights))
    assert np.isfinite(load_hf(str(folder / "round-2" / "policy"))[1]["final_norm"]["scale"]).all()
    assert metrics["policy_utility"] == stages["rounds"][-1]["utility"] and metrics["labels"] == len(first + second)


def test_a_killed_run_goes_on_to_the_same_policy(done, small_policy, tmp_path, monkeypatch):
    folder, cfg = tmp_path / "run", {"model": small_policy, **FLAGS}
    trained = iterate.ppo.train

    def killed(*args, stage, **more):
        if stage == "ppo-2":
            raise KeyboardInterrupt
        return trained(*args, stage=stage, **more)

    monkeypatch.setattr(iterate.ppo, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        iterate.main(iterate.Config(run_dir=str(folder), **cfg))
    monkeypatch.undo()
    iterate.main(iterate.Config(run_dir=str(folder), resume=True, **cfg))
    for name in ("round-1/comparisons.jsonl", "round-2/comparisons.jsonl", "round-2/policy/model.safetensors",
                 "round-2/reward_model/model.safetensors"):  # fmt: skip
        assert (folder / name).read_bytes() == (done[0] / name).read_bytes(), name


def test_people_label_between_two_sessions(stories, tmp_path, monkeypatch):
    said = iterate.read  # stories go on for long: here each answer counts as ended
    monkeypatch.setattr(iterate, "read", lambda *some: [one._replace(ended=True) for one in said(*some)])
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Tell story {n}."}) + "\n" for n in range(40)))
    cfg = {
        "run_dir": str(tmp_path / "run"), "model": stories, "prompts": str(file), "rounds": 1, "labels": 30,
        "max_new_tokens": 8, "max_length": 64, "eval_batch_size": 8, "heldout": 2, "people": True,
        "reward_model": RewardModel(epochs=1, prompts_per_step=4, lora_rank=0),
        "ppo": PPO(steps=1, responses=8, epochs=1, minibatches=1, lora_rank=0),
    }  # fmt: skip
    folder = tmp_path / "run" / "round-1"
    with pytest.raises(UserError, match=r"round 1: the rows of .*to_label.jsonl wait for people"):
        iterate.main(iterate.Config(**cfg))
    asked = rows(folder, "to_label")
    labels = [
        {"prompt": row["prompt"], "chosen": row["responses"][1], "rejected": row["responses"][0]} for row in asked
    ]
    (folder / "comparisons.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    assert iterate.main(iterate.Config(resume=True, **cfg))["labels"] == len(labels)


def test_the_model_itself_is_the_judge_beside_comparisons(stories, tmp_path, monkeypatch):
    """Its verdicts are given here: a policy that nothing has taught English has none."""
    said, trained = iterate.read, []
    monkeypatch.setattr(iterate, "read", lambda *some: [one._replace(ended=True) for one in said(*some)])

    def ask(questions):
        pairs = [question.partition("Response A:\n")[2].split("\n\nResponse B:\n") for question in questions]
        return [0.7 if first > second else 0.3 for first, second in pairs]

    def train(cfg, base, *some, **more):
        trained.append(more)
        return base.params, {}

    judge = SimpleNamespace(ask=ask, metrics=lambda: {"cost": 2.0})
    monkeypatch.setattr(iterate, "open_judge", lambda *some, **more: nullcontext(judge))
    monkeypatch.setattr(
        iterate.ppo, "train", lambda cfg, base, *some, **more: (trained.append(more) or base.params, {})
    )
    prompts, comparisons = tmp_path / "prompts.jsonl", tmp_path / "comparisons.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Tell story {n}."}) + "\n" for n in range(20)))
    rows_of = [{"prompt": f"Say {n}.", "chosen": "Yes.", "rejected": "No."} for n in range(20)]
    comparisons.write_text("".join(json.dumps(row) + "\n" for row in rows_of))
    cfg = iterate.Config(
        run_dir=str(tmp_path / "run"), model=stories, prompts=str(prompts), comparisons=str(comparisons), rounds=1,
        labels=8, max_new_tokens=8, max_length=256, eval_batch_size=8, heldout=2,
        reward_model=RewardModel(epochs=1, prompts_per_step=4, lora_rank=0),
    )  # fmt: skip
    metrics = iterate.main(cfg)
    labels = rows(tmp_path / "run" / "round-1")
    assert all(row["probability"] == pytest.approx(0.7) and row["chosen"] > row["rejected"] for row in labels)
    assert metrics["labels"] == len(labels) > 0
    data = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert sum(found["used"] for found in data.values()) >= 20 + len(labels)
    assert trained[0]["stage"] == "ppo-1" and metrics["cost"] == 2.0


def test_prompts_are_chosen_where_the_reward_model_is_least_certain(small_world_for_all, monkeypatch, tmp_path):
    """Answers of known words and scores: equal ones and those without an end are left out before the choice."""
    world = World(0)
    words = np.array([[5, 6], [5, 5], [7, 8], [9, 10]])  # the tokens of two answers to each of four prompts
    scores = {5: 0.0, 6: 3.0, 7: 1.0, 8: 1.1, 9: 0.0, 10: 0.5}

    def sampler(params, prompts, number):
        places = order[np.asarray(prompts.row)]
        which = np.arange(len(places)) % 2
        tokens = np.stack([words[places, which], np.full(len(places), world.base.tokenizer.eos_token_id)], axis=1)
        tokens[(places == 3) & (which == 1), 1] = 11  # this one does not end
        return numpy_completions(tokens, np.ones(tokens.shape, bool), np.zeros(tokens.shape, np.float32))

    train = take(world.prompts().train, np.arange(4))
    order = np.zeros(train.row.max() + 1, int)
    order[train.row] = np.arange(4)
    monkeypatch.setattr(world, "_prompts", world.prompts()._replace(train=train))
    monkeypatch.setattr(iterate, "score_in_batches", lambda *args: lambda params, tokens: [
        scores[int(row[real][0])] for row, real in zip(tokens.targets, tokens.mask, strict=True)
    ])  # fmt: skip
    with Run(tmp_path / "run", iterate.Config(), name="iterate") as run:
        run.keep_folder()

        def chosen(members, labels=1):
            cfg = SimpleNamespace(labels=labels, answers=2, choose="uncertain")
            return [row["row"] for row in iterate.answer_prompts(cfg, world, run, sampler, None, members, 1, 0)]

        assert chosen(["one member"]) == [2]  # not 1, whose answers are equal, nor 3, which has one answer
        assert chosen(["one member"], labels=4) == [2, 0]
        assert sorted(chosen([], labels=4)) == [0, 2]


def test_labels_say_most_where_members_disagree():
    one = np.array([[[0.0, 3.0], [1.0, 1.5], [5.0, 1.0]]])
    assert np.argmax(label_value(one)) == 1 and label_value(one)[2] == -4
    two = np.stack([one[0], one[0] + np.array([[5.0, 5.0], [0.0, 0.0], [0.0, 2.0]])])
    np.testing.assert_allclose(label_value(two), [0.0, 0.0, 1.0])  # the first two differ by a constant: no other order
    np.testing.assert_allclose(label_value(np.array([[[0.0, 1.0, 3.0]]])), [-(1 + 3 + 2) / 3])


def test_the_worlds_annotators_see_what_they_are_said_to_see(small_world_for_all):
    world = World(0)
    prompts = [row.prompt for row in world.prompts().rows[:400]]
    answers = [["", "brilliant"] for _ in prompts]
    sure = world.rank_texts(Annotators(noise=1e-6, length_bias=0.0, flattery_bias=0.0), prompts, answers, 1)
    assert sure == [[0, 1]] * 400  # flattery is worth less than nothing
    biased = world.rank_texts(Annotators(noise=1e-6, length_bias=0.0, flattery_bias=9.0), prompts, answers, 1)
    assert biased == [[1, 0]] * 400
    noisy = [world.rank_texts(Annotators(noise=1.0), prompts, answers, number) for number in (1, 1, 2)]
    assert noisy[0] == noisy[1] != noisy[2]


def test_a_judge_is_refused_in_the_world(small_world_for_all, small_policy, tmp_path):
    with pytest.raises(UserError, match="--judge is not used without files"):
        iterate.main(iterate.Config(run_dir=str(tmp_path / "run"), model=small_policy, judge="x"))
