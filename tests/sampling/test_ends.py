"""One token may end an answer, or any of several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from test_generate import MODEL, NEW, PAD, VOCAB, new_params, prompts_of, sample

from rlhf_jax.batches import Completions
from rlhf_jax.sampling import ended, generate
from rlhf_jax.sampling.ends import is_end

TOKENS = np.array([[3, 5, 0], [3, 4, 4], [5, 3, 7]])
MASK = np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1]], bool)


@pytest.mark.parametrize(
    "eos_id, expected",
    [
        (None, [False, False, False]),
        ((), [False, False, False]),
        (5, [True, False, True]),
        ((5,), [True, False, True]),
        ((7, 4), [False, True, True]),
        (0, [False, False, False]),  # only where it is masked
        (-1, [False, False, False]),
    ],
)
def test_an_answer_has_ended_when_any_of_the_ids_is_in_it(eos_id, expected):
    completions = Completions(*map(jnp.asarray, (TOKENS, MASK, np.zeros(TOKENS.shape, np.float32))))
    assert ended(completions, eos_id).tolist() == expected
    assert jax.jit(ended, static_argnums=1)(completions, eos_id).tolist() == expected
    assert isinstance(is_end(TOKENS, eos_id), np.ndarray)


def test_each_of_several_ids_ends_a_row():
    prompts, mask = prompts_of(32)
    whole = np.asarray(sample(prompts, mask).tokens)
    first, second = (int(token) for token in np.argsort(-np.bincount(whole[:, :-1].ravel(), minlength=VOCAB))[:2])
    found = sample(prompts, mask, eos_id=(first, second))
    where = np.isin(whole, [first, second])
    lengths = np.where(where.any(axis=1), where.argmax(axis=1) + 1, NEW)
    assert_array_equal(np.asarray(found.mask).sum(axis=1), lengths)
    assert_array_equal(np.asarray(found.tokens)[np.asarray(found.mask)], whole[np.asarray(found.mask)])
    last = {int(row[length - 1]) for row, length in zip(whole, lengths, strict=True) if length < NEW}
    assert last == {first, second}
    assert_array_equal(sample(prompts, mask, eos_id=(first,)).tokens, sample(prompts, mask, eos_id=first).tokens)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"eos_id": VOCAB}, "eos_id 11 is not among the model's 11 tokens"),
        ({"eos_id": (1, -2)}, "eos_id -2 is not among"),
        ({"eos_id": None, "pad_id": VOCAB}, "pad_id 11 is not among the model's 11 tokens"),
    ],
)
def test_ids_outside_of_the_vocabulary_are_refused(changes, message):
    prompts, mask = prompts_of(2)
    with pytest.raises(ValueError, match=message):
        generate(
            MODEL, new_params(), prompts, mask, jax.random.key(0), max_new_tokens=2, temperature=1.0,
            **{"pad_id": PAD} | changes,
        )  # fmt: skip


def test_prompts_with_ids_outside_of_the_vocabulary_are_refused():
    prompts, mask = prompts_of(3)
    for token in (VOCAB, -1):
        with pytest.raises(ValueError, match=f"prompt 1 has the id {token}, and the model has {VOCAB} tokens"):
            sample(prompts.at[1, -1].set(token), mask)
    hidden = prompts.at[0, 0].set(VOCAB)
    sample(hidden, mask.at[0].set(jnp.asarray([False, True, True, True])))  # padding is not read
