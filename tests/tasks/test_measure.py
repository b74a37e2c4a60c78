"""How policies are compared: which prompts, which keys."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.flags import RunFlags as Flags
from rlhf_jax.batches import Prompts
from rlhf_jax.log import Run
from rlhf_jax.rewards.reward import HostScores, Reward
from rlhf_jax.sampling.sampler import numpy_completions
from rlhf_jax.tasks.measure import compare_policies, pass_metrics
from rlhf_jax.tasks.simulated import Sizes, World
from rlhf_jax.tasks.task import PromptSets, with_choice

SIZES = Sizes(demonstrations=12, validation=6, compared=8, heldout_pairs=6, prompts=10, heldout=6, ranked=2, layers=1)


@pytest.fixture(scope="module")
def world():
    return World(0, sizes=SIZES)


def test_an_epoch_is_chosen_on_prompts_that_nothing_else_sees(world):
    sets = with_choice(world.prompts())
    rows = [set(part.row.tolist()) for part in (sets.train, sets.heldout, sets.shifted, sets.choice)]
    assert all(not a & b for number, a in enumerate(rows) for b in rows[:number])
    assert len(rows[3]) == len(rows[1]) == 6


def test_where_there_are_no_prompts_for_a_choice_held_out_ones_are_shared():
    def some(*rows):
        return Prompts(jnp.zeros((len(rows), 1), int), jnp.ones((len(rows), 1), bool), jnp.asarray(rows))

    sets = with_choice(PromptSets(some(0), some(4, 5, 6)))
    assert (sets.heldout.row.tolist(), sets.choice.row.tolist()) == ([4, 6], [5])
    assert with_choice(PromptSets(some(0), some(4))).choice is None


def test_each_policy_samples_with_keys_of_its_own_on_the_prompts_it_is_given(world, tmp_path):
    asked = []

    def sampler(params, prompts, number):
        asked.append((params, prompts.row.tolist(), number))
        tokens = np.full((len(prompts.row), 4), world.base.eos_id)
        return numpy_completions(tokens, np.arange(4)[None] < np.ones((len(tokens), 1)), np.zeros(tokens.shape))

    sets = world.prompts()._replace(heldout=world.prompts().choice, shifted=None)
    with Run(tmp_path, Flags(), name="x") as run:
        found = compare_policies(
            run, world, ("sft", "A"), ("ppo", "B"), sampler, lambda prompts, answers: np.ones(6), sets
        )
    numbers = [number for _, _, number in asked]
    assert [params for params, _, _ in asked] == ["A", "B"] and len(set(numbers)) == 2
    assert all(rows == sets.heldout.row.tolist() for _, rows, _ in asked)
    assert found["win_rate"] == 0.5 and found["sft_ended"] == 1.0
    assert len((tmp_path / "examples.jsonl").read_text().splitlines()) == 6
    assert json.loads((tmp_path / "examples.jsonl").read_text().splitlines()[0])["sft"] == ""


def test_pass_at_k_of_a_policy_counts_right_answers_over_samples(world):
    rows = world.prompts().heldout.row

    def sampler(params, prompts, number):
        """The n-th sample solves the first n prompts."""
        right = np.arange(len(rows)) < number - 200
        tokens = np.where(right[:, None], 9, 8) * np.ones((1, 3), np.int32)
        return numpy_completions(tokens, np.ones(tokens.shape, bool), np.zeros(tokens.shape))

    def checker(scores):
        return Reward("right", 0.3, on_texts=lambda p, answers, columns, part=None: HostScores(scores(answers)))

    is_one = checker(lambda answers: np.array([float(text == one) for text in answers]))
    one = world.base.read_answers(sampler(None, None, 300))[0]
    half = checker(lambda answers: np.full(len(answers), 0.5))

    # Of 4 samples the six prompts have 3, 2, 1, 0, 0 and 0 right ones.
    found = pass_metrics(world, "grpo", None, sampler, [half, is_one], 4)
    assert found["grpo_pass@1"] == pytest.approx((3 + 2 + 1) / 4 / 6)
    assert found["grpo_pass@2"] == pytest.approx((1 + (1 - 1 / 6) + (1 - 3 / 6)) / 6)
    assert found["grpo_pass@4"] == pytest.approx(3 / 6) and len(found) == 3
    assert pass_metrics(world, "x", None, sampler, [half], 2) == {}
