"""Examples of preference losses: which answers form pairs, in which order, and what KTO sets beside them."""

import numpy as np
import pytest

from rlhf_jax.batches import LabelledAnswer, RankedAnswers
from rlhf_jax.data.pairs import all_pairs, best_and_worst, labelled, lay_out, mismatch, paired, singly, width
from rlhf_jax.errors import UserError

RANKS = np.array([[2, 0, 1], [0, 1, 1], [1, 1, 0], [0, 0, 7]], np.int32)
MASK = np.array([[True] * 3, [True] * 3, [True] * 3, [True, True, False]])


def test_pairs_of_ranked_answers():
    assert best_and_worst(RANKS, MASK).tolist() == [[1, 0], [3, 4], [8, 6]]
    expected = {(1, 2), (1, 0), (2, 0), (3, 4), (3, 5), (8, 6), (8, 7)}
    found = all_pairs(RANKS, MASK).tolist()
    assert set(map(tuple, found)) == expected and len(found) == len(expected)


@pytest.mark.parametrize(
    ("pairs", "answers", "groups"),
    [
        ("best_worst", [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 2)], [(1, 0), (2, 3), (5, 4)]),
        (
            "all",
            [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)],
            [(1, 0), (1, 2), (2, 0), (3, 4), (3, 5), (8, 6), (8, 7)],
        ),
    ],
)
def test_each_answer_is_there_once_in_the_rankings_order(pairs, answers, groups):
    """Answer k of prompt p is the response [p, k]; prompts without a pair, and answers of no pair, are not there."""
    rankings = [
        RankedAnswers([p], [[p, k] for k in range(mask.sum())], tuple(ranks[mask].tolist()), doubt=p / 8)
        for p, (ranks, mask) in enumerate(zip(RANKS, MASK, strict=True))
    ]
    examples = paired(rankings, pairs)
    assert list(examples.answers) == [([p], [p, k]) for p, k in answers]
    assert sorted(map(tuple, examples.groups.tolist())) == sorted(groups)
    assert examples.good.tolist() == [[True, False]] * len(groups)
    assert examples.doubt.tolist() == [p[0] / 8 for p, _ in (examples.answers[best] for best, _ in examples.groups)]
    single = singly(examples)
    assert single.doubt.tolist() == np.repeat(examples.doubt, 2).tolist()
    assert single.groups.ravel().tolist() == examples.groups.ravel().tolist()
    assert single.good.tolist() == [[True], [False]] * len(groups)


def test_single_answers_keep_their_labels():
    found = labelled([LabelledAnswer([3], [4, 2], True), LabelledAnswer([3, 5], [2], False)])
    assert list(found.answers) == [([3], [4, 2]), ([3, 5], [2])]
    assert found.groups.tolist() == [[0], [1]] and found.good.tolist() == [[True], [False]]
    assert found.doubt.tolist() == [0.0, 0.0]


def test_a_mismatched_answer_follows_the_prompt_of_another():
    answers = [([n, n], [10, 2]) for n in (3, 4, 5)] + [([3, 3], [11, 2]), ([6] * 7, [2])]
    found = mismatch(answers, longest=8, seed=0)
    assert [response for _, response in found] == [response for _, response in answers]
    given = {}
    for (prompt, response), (other, _) in zip(answers, found, strict=True):
        assert other[0] != prompt[0] and len(other) + len(response) <= 8
        assert given.setdefault(prompt[0], other[0]) == other[0]
    assert sorted(given.values()) == sorted(given)
    with pytest.raises(UserError, match="at least two prompts"):
        mismatch(answers[3:4], longest=8, seed=0)


def test_answers_are_laid_out_one_or_several_to_a_row():
    answers = [([3] * 20, [4, 2]), ([5] * 39, [2]), ([3], [2])]
    assert width(answers, 64) == 64 and width(answers, 48) == 48 and width(answers[:1], 64) == 32
    apart = lay_out(answers, length=64, pad_id=0, packed=False)
    together = lay_out(answers, length=64, pad_id=0, packed=True)
    assert apart.mask.shape == (3, 64) and together.owner.shape == (1, 64)
    assert apart.mask.sum() == together.tokens.mask.sum() == 4
