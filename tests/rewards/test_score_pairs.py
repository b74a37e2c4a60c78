"""Pairs of answers are scored as in training, and those that do not fit are left out and counted."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from rlhf_jax.data.encode import encode
from rlhf_jax.data.rejects import Place
from rlhf_jax.data.suites import pair
from rlhf_jax.errors import UserError
from rlhf_jax.rewards.pairs import score_pairs


@pytest.fixture(scope="module")
def tokenizer(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "model" / "stories260K-hf")


def number(document):
    """A score that tells answers apart."""
    return float(sum(document[0]) + 1000 * sum(document[1]))


def score(documents):
    return np.array([number(document) for document in documents])


def test_both_answers_of_each_pair_that_fits(tokenizer):
    chosen = ["a b c", "word " * 80, "a", "b"]
    pairs = [pair(Place("FILE", line), "Who?", text, "a b") for line, text in enumerate(chosen, 1)]
    pairs[3] = pairs[3]._replace(ranks=(1, 0))  # the second answer is the better one
    found = score_pairs(score, "FILE", pairs, tokenizer, max_length=64)
    assert found.kept == [0, 2, 3] and found.notes == ["FILE: response too long for 64 tokens: 1 rows (lines 2)"]
    for at, kept in enumerate(found.kept):
        ids, _ = encode(pairs[kept], tokenizer, 64)
        best, worst = (ids.responses[pairs[kept].ranks.index(rank)] for rank in (0, 1))
        assert found.chosen[at] == number((ids.prompt, best)) and found.rejected[at] == number((ids.prompt, worst))
        assert found.lengths[:, at].tolist() == [len(best), len(worst)]


def test_a_conversation_that_lost_turns_is_counted(tokenizer):
    long = pair(Place("FILE", 7), "Who?", "a", "b")
    turns = ({"role": "user", "content": "word " * 80}, {"role": "assistant", "content": "Yes."})
    found = score_pairs(score, "FILE", [long._replace(prompt=turns + long.prompt)], tokenizer, max_length=64)
    assert found.notes == ["FILE: prompt shortened by whole turns to fit 64 tokens: 1 rows (lines 7)"]


def test_no_pair_that_fits_is_an_error(tokenizer):
    with pytest.raises(UserError, match="FILE: no pair fits: response too long for 64 tokens; raise --max-length"):
        score_pairs(score, "FILE", [pair(Place("FILE", 1), "Who?", "word " * 80, "b")], tokenizer, max_length=64)
