"""Rejection sampling from the command: what it learns from, its control, rounds, and a run that was cut short."""

import json
from functools import partial

import jax
import numpy as np
import pytest

from experiments import rejection_sampling
from experiments.sft import SFT
from rlhf_jax.errors import UserError
from rlhf_jax.log import Run
from rlhf_jax.metrics import read_metrics
from rlhf_jax.models import load_hf
from rlhf_jax.rewards.reward import Reward
from rlhf_jax.row_file import read_rows
from rlhf_jax.sampling.sampler import numpy_completions
from rlhf_jax.tasks.measure import make_reward_scorer
from rlhf_jax.tasks.picked import write_picked
from rlhf_jax.tasks.simulated import World

SHORT = {"n": 4, "eval_batch_size": 64, "steps": 3, "batch_size": 8, "no_end_score": -100.0}


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    file = tmp_path_factory.mktemp("files") / "reward.py"
    file.write_text(
        "def long(prompts, completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    )
    return f"{file}:long"


@pytest.fixture(scope="module")
def done(small_world_for_all, small_policy, reward, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    cfg = rejection_sampling.Config(run_dir=str(folder), model=small_policy, reward=reward, rounds=2, **SHORT)
    return folder, rejection_sampling.main(cfg)


def test_rounds_learn_from_the_best_and_a_control_from_others(done):
    folder, metrics = done
    stages = read_metrics(folder)
    assert list(stages) == ["blind-1", "best-1", "rejection_sampling", "best-2"]
    assert [row["step"] for row in stages["rejection_sampling"]] == [1, 2]
    assert {"start_score", "control_score", "control_kl", "rejection_sampling_score", "win_rate"} <= set(metrics)
    assert metrics["rejection_sampling_score"] == stages["rejection_sampling"][-1]["score"]
    # The first step begins at the same weights: other answers are learned.
    assert stages["blind-1"][0]["loss"] != stages["best-1"][0]["loss"]
    assert (folder / "policy" / "config.json").exists()
    examples = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    assert all({"start", "rejection_sampling"} <= set(row) for row in examples)


def test_a_killed_run_goes_on_to_the_same_policy(done, small_policy, reward, tmp_path, monkeypatch):
    folder, cfg = tmp_path / "run", {"model": small_policy, "reward": reward, "rounds": 2, **SHORT}
    trained = rejection_sampling.sft.train

    def killed(*args, stage, **more):
        if stage == "best-2":
            raise KeyboardInterrupt
        return trained(*args, stage=stage, **more)

    monkeypatch.setattr(rejection_sampling.sft, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        rejection_sampling.main(rejection_sampling.Config(run_dir=str(folder), **cfg))
    monkeypatch.setattr(rejection_sampling.sft, "train", trained)
    picked = folder / "round-2" / "picked.jsonl"
    whole = picked.read_bytes()
    picked.write_bytes(whole[: len(whole) // 2])  # in the middle of a line
    rejection_sampling.main(rejection_sampling.Config(run_dir=str(folder), resume=True, **cfg))
    assert picked.read_bytes() == whole
    ours, theirs = (load_hf(some / "policy")[1] for some in (folder, done[0]))
    assert all(map(np.array_equal, jax.tree.leaves(ours), jax.tree.leaves(theirs)))


def test_the_best_answer_of_each_prompt_is_picked_and_a_blind_one_that_ends(small_world_for_all, tmp_path):
    world = World(0)
    silent = 3
    pad, eos = world.base.pad_id, world.base.tokenizer.eos_token_id
    words = [word for word in range(len(world.base.tokenizer)) if word not in (pad, eos)][10:18]

    def sampler(_, prompts):
        # Of four answers to a prompt the first does not end, the second has one word, the third three, the fourth two.
        # To one prompt none ends.
        tokens = np.full((len(prompts.row), 4), pad)
        for row in range(len(tokens)):
            count = (4, 1, 3, 2)[row % 4] if row // 4 != silent else 4
            tokens[row, :count] = words[:count]
            if count < 4:
                tokens[row, count] = eos
        return numpy_completions(tokens, tokens != pad, np.zeros(tokens.shape, np.float32))

    length = Reward("length", 1.0, on_tokens=lambda _, tokens: tokens.mask.sum(axis=1).astype(float))
    score = make_reward_scorer(world, [length], -1.0, training=True)
    texts = world.base.tokenizer.convert_ids_to_tokens(words)
    with Run(tmp_path, SFT(), name="x") as run:
        file, count = tmp_path / "picked.jsonl", len(world.prompts().train.row)
        given = [run, "answers", file, world, partial(sampler, None), score, 4]
        assert write_picked(*given, blind=True) == count - 1
        whole = file.read_bytes()
        given[4] = lambda *_: pytest.fail("it is whole, so nobody is asked")
        assert write_picked(*given, blind=True) == count - 1 and file.read_bytes() == whole
    numbers = [number for number in range(count) if number != silent]
    for number, row in zip(numbers, read_rows(file), strict=True):
        prompt = world.prompts().rows[int(world.prompts().train.row[number])].prompt
        assert row == {
            "prompt": prompt,
            "completion": " ".join(texts[:3]),
            "score": 4.0,
            "blind": texts[0],
            "row": number,
        }


def test_a_model_whose_answers_do_not_end_is_refused(small_world_for_all, small_policy, reward, tmp_path, monkeypatch):
    monkeypatch.setattr(rejection_sampling, "write_picked", lambda *_, **__: 0)
    with pytest.raises(UserError, match="no answer ends"):
        rejection_sampling.main(
            rejection_sampling.Config(run_dir=str(tmp_path / "run"), model=small_policy, reward=reward, **SHORT)
        )
