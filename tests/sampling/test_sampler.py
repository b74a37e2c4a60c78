"""Answers to any number of prompts: few shapes, every row once, each answer drawn for itself."""

import jax
import numpy as np
import pytest

from rlhf_jax.batches import Completions
from rlhf_jax.compiled import count_compilations
from rlhf_jax.data.tokens import pad_prompts, take
from rlhf_jax.errors import UserError
from rlhf_jax.models import Transformer
from rlhf_jax.pretrained import load_policy
from rlhf_jax.sampling import sampler
from rlhf_jax.sampling.sampler import SHORTEST, like_lengths, sample_answers, times_before
from rlhf_jax.sampling.texts import answer_texts


@pytest.fixture(scope="module")
def stories(shared_data):
    return load_policy(str(shared_data / "model" / "stories260K-hf"))


def answers(model, prompts, *, batch_size, temperature=0.0, max_new_tokens=4):
    rows = pad_prompts(prompts, length=max(map(len, prompts)), pad_id=model.pad_id)
    return sample_answers(
        Transformer(model.config), model.params, rows, jax.random.key(0), max_new_tokens=max_new_tokens,
        temperature=temperature, eos_id=model.eos_id, pad_id=model.pad_id, batch_size=batch_size,
    )  # fmt: skip


def test_every_row_once_and_few_shapes():
    lengths = np.random.default_rng(1).integers(1, 200, 300).tolist()
    rows, shapes = [], set()
    for some, real, width in like_lengths(lengths, 32, 200):
        rows += some[:real].tolist()
        shapes.add((len(some), width))
        assert set(some) == set(some[:real]) and max(lengths[row] for row in some) <= width
    assert sorted(rows) == list(range(300)) and len(shapes) <= 5


def test_no_batch_is_wider_than_it_has_to_be():
    lengths = np.random.default_rng(0).integers(1, 101, 200).tolist()
    for rows, _, width in like_lengths(lengths, 32, 100):
        longest = max(lengths[row] for row in rows)
        assert longest <= width <= 100 and (width < 2 * longest or width == SHORTEST)


def test_an_answer_is_that_of_its_prompt_alone_and_nothing_is_compiled_twice(stories):
    rng = np.random.default_rng(1)
    prompts = [[1, *rng.integers(3, 512, n % 60).tolist()] for n in range(50)]
    found = answers(stories, prompts, batch_size=16)
    with count_compilations() as compiled:
        again = answers(stories, prompts, batch_size=16)
        assert compiled() == 0
    np.testing.assert_array_equal(again.tokens, found.tokens)
    for row in (0, 17, 49):
        alone = answers(stories, [prompts[row]], batch_size=1)
        np.testing.assert_array_equal(alone.tokens[0], found.tokens[row])


def test_an_answer_is_drawn_by_its_row_and_not_by_its_batch(stories):
    rng = np.random.default_rng(2)
    prompts = [[1, *rng.integers(3, 512, n % 30).tolist()] for n in range(8)]
    rows = pad_prompts(prompts, length=30, pad_id=stories.pad_id)
    rows = take(rows._replace(row=np.arange(8) * 1000), np.arange(8).repeat(3))

    def drawn(rows, batch_size):
        return sample_answers(
            Transformer(stories.config), stories.params, rows, jax.random.key(0), max_new_tokens=6, temperature=1.0,
            eos_id=stories.eos_id, pad_id=stories.pad_id, batch_size=batch_size,
        ).tokens  # fmt: skip

    found = drawn(rows, 16)
    assert len(np.unique(found, axis=0)) > 16  # three of a prompt differ, and so do prompts
    np.testing.assert_array_equal(drawn(rows, 4), found)
    some = np.array([20, 18, 19, 3, 4])  # of a prompt the first that is asked for is its first
    np.testing.assert_array_equal(drawn(take(rows, some), 16), found[[18, 19, 20, 3, 4]])


def test_times_before():
    assert times_before(np.array([7, 5, 7, 7, 5, 0])).tolist() == [0, 0, 1, 2, 1, 0]


def test_prompts_without_their_padding_and_rows_that_fill_up_say_nothing(stories, monkeypatch):
    drawn, read = [], []

    def generate(model, params, prompts, mask, key, *, streams, eos_id, **_):
        drawn.append(np.asarray(streams).tolist())
        assert mask[:, -1].all()  # padded on the left
        read.extend(np.asarray(row)[np.asarray(real)].tolist() for row, real in zip(prompts, mask, strict=True))
        tokens = np.full((len(prompts), 2), 5)
        tokens[3:, 0] = eos_id
        return Completions(tokens, np.ones(tokens.shape, bool), np.zeros(tokens.shape))

    monkeypatch.setattr(sampler, "generate", generate)
    prompts = [[1, 5]] * 3 + [[1] * 20] * 3  # of two widths, each filled up to four rows
    found = answers(stories, prompts, batch_size=8, temperature=1.0, max_new_tokens=2)
    assert (found.tokens == 5).all() and found.mask.all()
    assert drawn == [[[0, 0], [1, 0], [2, 0], [0, 0]], [[3, 0], [4, 0], [5, 0], [3, 0]]]
    assert read == [prompts[0]] * 4 + [prompts[3]] * 4


def test_answers_in_text(stories):
    prompts = ["Who?", "Once upon a time there was a dog. Tell me more."]
    ask = {"max_new_tokens": 6, "temperature": 0.0, "batch_size": 4}
    found = answer_texts(stories, prompts, jax.random.key(0), max_length=128, **ask)
    for prompt, text in zip(prompts, found.texts, strict=True):
        ids = [1, *stories.tokenizer(f"\n\nHuman: {prompt}\n\nAssistant:", add_special_tokens=False)["input_ids"]]
        alone = answers(stories, [ids], batch_size=1, max_new_tokens=6)
        assert stories.read_answers(alone) == [text]
    assert found.ended.tolist() == [False, False]
    with pytest.raises(UserError, match=r"cannot answer prompt 2, 'Once upon .*: prompt too long for 26 tokens"):
        answer_texts(stories, prompts, jax.random.key(0), max_length=32, **ask)
