"""The controlled world as a task: comparisons of a sampler's answers, true utility, batches in shares."""

import numpy as np
import pytest

from rlhf_jax.batches import Completions
from rlhf_jax.data import epochs
from rlhf_jax.data.epochs import EpochBatches
from rlhf_jax.data.tokens import take
from rlhf_jax.errors import UserError
from rlhf_jax.pretrained import load_policy
from rlhf_jax.sampling.sampler import numpy_completions
from rlhf_jax.simulation import ERRANDS, WORDS, Demonstrators
from rlhf_jax.tasks.simulated import Sizes, World
from rlhf_jax.tasks.task import Task

SMALL = Sizes(
    demonstrations=32, validation=8, compared=6, ranked=4, heldout_pairs=8, prompts=16, heldout=8, layers=1
)  # fmt: skip


@pytest.fixture(scope="module")
def world():
    return World(0, sizes=SMALL)


def first_words(prompts, number):
    """A sampler that answers with the prompt's last words, more of them for each following answer."""
    tokens = np.zeros((len(prompts.row), WORDS.answer_length), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row in range(len(tokens)):
        said = [*prompts.tokens[row][prompts.mask[row]][-2 - row % 4 : -1], 2]
        tokens[row, : len(said)], mask[row, : len(said)] = said, True
    return Completions(tokens, mask, np.zeros(tokens.shape, np.float32))


def test_it_is_a_task_and_the_same_seed_draws_the_same(world):
    assert isinstance(world, Task)
    again, other = World(0, sizes=SMALL), World(1, sizes=SMALL)
    for name in ("train", "validation"):
        ours, same, another = (getattr(w.demonstrations(), name) for w in (world, again, other))
        np.testing.assert_array_equal(ours.inputs, same.inputs)
        assert not np.array_equal(ours.inputs, another.inputs)
    assert world.facts == again.facts


def test_comparisons_are_ids_whose_batches_are_what_was_sampled():
    world = World(0, sizes=SMALL)
    comparisons = world.comparisons(first_words)
    assert len(comparisons.train) == 6 and all(sorted(r.ranks) == [0, 1, 2, 3] for r in comparisons.train)
    assert comparisons.heldout.ranks.shape == (8, 2)
    assert {"annotator_agreement", "ceiling"} <= set(comparisons.facts)
    for ranking in comparisons.train:
        assert all(response[-1] in world.base.eos_id for response in ranking.responses)
    batch = comparisons.lay(comparisons.train[2:4])
    for p, ranking in enumerate(comparisons.train[2:4]):
        for k, response in enumerate(ranking.responses):
            row = p * 4 + k
            assert batch.responses.targets[row][batch.responses.mask[row]].tolist() == response
            # Prompts are left-padded, so that all answers begin in one column.
            assert np.flatnonzero(batch.responses.mask[row])[0] == WORDS.prompt_length - 1


def test_true_utility_is_of_the_problem_that_the_row_names(world):
    prompts = world.prompts()
    for some in (prompts.heldout, prompts.shifted):
        rows = [world.prompts().rows[number].prompt for number in some.row]
        for said, read in zip(rows, world.base.read_prompts(some), strict=True):
            assert said in read
    utility = world.judge(prompts.heldout, first_words(prompts.heldout, 0))
    assert utility.shape == (8,) and np.ptp(utility) > 0


def test_a_model_with_other_words_is_refused(shared_data):
    base = load_policy(str(shared_data / "model" / "stories260K-hf"))
    with pytest.raises(UserError, match="does not have the vocabulary of the controlled world"):
        World(0, base=base, sizes=SMALL)


def test_batches_in_shares_are_the_batch_and_go_on_where_they_stood(world, monkeypatch):
    tokens = world.demonstrations().train
    tokens = take(tokens, np.arange(8))
    whole = EpochBatches(tokens, 4, 0)
    expected = [next(whole).inputs for _ in range(5)]
    shares = []
    for number in (0, 1):
        monkeypatch.setattr(epochs, "host_share", lambda number=number: (number, 2))
        batches = EpochBatches(tokens, 4, 0)
        shares.append([next(batches).inputs for _ in range(5)])
    for batch, one, two in zip(expected, *shares, strict=True):
        np.testing.assert_array_equal(np.concatenate([one, two]), batch)
    monkeypatch.setattr(epochs, "host_share", lambda: (0, 1))
    resumed = EpochBatches(tokens, 4, 0)
    resumed.set_state(3)
    np.testing.assert_array_equal(next(resumed).inputs, expected[3])
    assert resumed.get_state() == 4


def test_the_second_setting_is_a_world_like_the_first():
    """Demonstrations, comparisons, prompts and the judge are of its own words."""
    sizes = Sizes(demonstrations=64, validation=8, compared=8, ranked=3, heldout_pairs=16, prompts=16, heldout=8)
    world = World(0, sizes=sizes, setting=ERRANDS)
    assert world.base.config.vocab_size == len(ERRANDS.vocabulary) and world.max_new_tokens == ERRANDS.answer_length
    rows = world.demonstrations()
    assert rows.train.mask.shape[1] == ERRANDS.packed_length and "then" in world.base.tokenizer.decode(
        rows.train.inputs[0]
    )
    people = Demonstrators()
    problems = {problem.prompt: problem for problem in world._problems}

    def sampler(prompts, number):
        """Answers as people give them."""
        rng = np.random.default_rng(number)
        texts = [people.write(rng, problems[world.prompts().rows[row].prompt], ERRANDS) for row in prompts.row]
        ids = [[*world.base.tokenizer(text)["input_ids"], world.base.tokenizer.eos_token_id] for text in texts]
        tokens = np.zeros((len(ids), ERRANDS.answer_length), np.int32)
        for row, some in enumerate(ids):
            tokens[row, : len(some)] = some
        mask = np.arange(ERRANDS.answer_length) < np.array([[len(some)] for some in ids])
        return numpy_completions(tokens, mask, np.zeros(tokens.shape, np.float32))

    compared = world.comparisons(sampler)
    assert len(compared.train) == 8 and compared.facts["annotator_agreement_expected"] == pytest.approx(0.73, abs=0.05)
    heldout = world.prompts().heldout
    answers = sampler(heldout, 5)
    expected = ERRANDS.utilities(
        [problems[world.prompts().rows[row].prompt] for row in heldout.row],
        world.base.read_answers(answers),
        [True] * 8,
    )
    np.testing.assert_array_equal(world.judge(heldout, answers), expected)
    with pytest.raises(UserError, match="does not have the vocabulary of the controlled world"):
        World(0, sizes=sizes, base=world.base)
