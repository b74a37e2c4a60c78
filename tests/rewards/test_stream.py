"""Answers are scored while others are sampled: the same scores, each once, and what goes wrong is said."""

import threading

import numpy as np
import pytest

from rlhf_jax.batches import Ended, Prompts
from rlhf_jax.errors import UserError
from rlhf_jax.group_loop import sample_and_score
from rlhf_jax.rewards.reward import HostScores, Part, Reward, joined, score_texts
from rlhf_jax.rewards.stream import Stream
from rlhf_jax.sampling.sampler import numpy_completions

COUNT, T = 7, 3
TOKENS = np.arange(COUNT * T).reshape(COUNT, T).astype(np.int32)
MASK = np.arange(T)[None] <= np.arange(COUNT)[:, None] % T
PROMPTS = Prompts(np.zeros((COUNT, 1), np.int32), np.ones((COUNT, 1), bool), 10 + np.arange(COUNT))
ANSWERS = numpy_completions(TOKENS, MASK, np.zeros((COUNT, T), np.float32))


def texts(prompts, completions):
    answers = [" ".join(map(str, some[real])) for some, real in zip(completions.tokens, completions.mask, strict=True)]
    return list(map(str, prompts.row)), answers, {"number": prompts.row.tolist()}


def reward(seen, *, share=1.0, fails=(), name="sum"):
    def on_texts(prompts, completions, columns, part=None):
        assert prompts == [str(number) for number in columns["number"]]
        numbers = [sum(map(int, text.split())) for text in completions]
        seen.append(numbers)
        failed = sum(int(prompt) - 10 in fails for prompt in prompts)
        return HostScores(np.array(numbers, float), errors=failed, first_error="why" if failed else "")

    return Reward(name, 1.0, on_texts=on_texts, max_failed_share=share)


def put_some(stream, rows):
    rows = np.array(rows)
    stream.put(Ended(rows, TOKENS[rows], MASK[rows]))


def test_scores_are_those_of_the_whole_batch_and_come_before_the_last_answer():
    seen, stream, first_scored = [], Stream(), threading.Event()
    one, other = reward(seen), reward([], name="other")

    def sample():
        put_some(stream, [4, 1])
        for _ in range(500):  # until the first are scored, though others are not sampled yet
            if seen:
                first_scored.set()
                break
            threading.Event().wait(0.01)
        put_some(stream, [6])
        put_some(stream, [0, 2, 3, 5])
        return ANSWERS

    completions, found = sample_and_score(sample, stream, [one, other], texts, PROMPTS)
    assert first_scored.is_set()
    whole = score_texts([one, other], *texts(PROMPTS, ANSWERS))
    assert list(found) == list(whole) == ["sum", "other"]
    for name in found:
        np.testing.assert_array_equal(found[name].scores, whole[name].scores)
    np.testing.assert_array_equal(completions.tokens, TOKENS)
    assert sum(map(len, seen[:-1])) == COUNT  # each once; the last call is that of the whole batch
    # The next batch through the same stream.
    assert sample_and_score(sample, stream, [one, other], texts, PROMPTS)[1].keys() == {"sum", "other"}


def no_texts(prompts, completions):
    raise AssertionError("nothing is read as text")


def test_without_a_stream_all_are_scored_at_the_end_and_models_ask_for_no_texts():
    seen = []
    found = sample_and_score(lambda: ANSWERS, None, [reward(seen)], texts, PROMPTS)[1]
    assert len(seen) == 1 and found["sum"].scores.tolist() == seen[0]
    by_tokens = Reward("model", 1.0, on_tokens=lambda params, tokens: tokens.inputs[:, 0])
    assert sample_and_score(lambda: ANSWERS, None, [by_tokens], no_texts, PROMPTS)[1] == {}


def test_what_fails_counts_against_the_whole_batch():
    stream = Stream()

    def sample():
        for row in range(COUNT):
            put_some(stream, [row])
        return ANSWERS

    def ask(share):
        return sample_and_score(sample, stream, [reward([], share=share, fails={2, 5})], texts, PROMPTS)[1]

    found = ask(0.3)["sum"]
    assert found.errors == 2 and found.first_error == "why"
    with pytest.raises(UserError, match=r"sum: it failed on 2 of 7 answers \(29%; at most 25% may\); why"):
        ask(0.25)


def test_an_error_of_the_reward_or_of_the_sampler_ends_both():
    stream = Stream()

    def refuses(prompts, completions, columns, part=None):
        raise UserError("no such column")

    def sample():
        put_some(stream, range(COUNT))
        return ANSWERS

    with pytest.raises(UserError, match="no such column"):
        sample_and_score(sample, stream, [Reward("r", 1.0, on_texts=refuses)], texts, PROMPTS)

    def interrupted():
        put_some(stream, [0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_and_score(interrupted, stream, [reward([])], texts, PROMPTS)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("ThreadPool")]


def test_parts_are_put_back_in_their_places():
    parts = [Part(np.array([3, 0]), 4), Part(np.array([1, 2]), 4)]
    found = [HostScores(np.array([30.0, 0.0]), 1, 0, 2, ""), HostScores(np.array([10.0, 20.0]), 0, 1, 0, "late")]
    whole = joined(Reward("r", 1.0, max_failed_share=0.5), parts, found)
    assert whole.scores.tolist() == [0, 10, 20, 30]
    assert whole[1:] == (1, 1, 2, "late")
