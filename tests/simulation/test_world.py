"""The world's problems, its tokenizer and its true utility."""

import numpy as np
import pytest

from rlhf_jax.simulation import Problem, draw_problems, is_exact, make_tokenizer, utility
from rlhf_jax.simulation.world import ANIMALS, NUMBERS, PLACES, VOCABULARY

SORT = Problem("kindly sort fox ant dog", "kindly", ("ant", "dog", "fox"))


@pytest.mark.parametrize(
    ("response", "ended", "expected"),
    [
        ("sure answer ant dog fox friend .", True, 1 + 0.4 + 0.4 + 0.5 + 0.4),
        ("ant dog fox", True, 1.0),
        ("ant dog fox", False, 0.0),
        ("", True, 0.0),
        ("", False, -1.0),
        ("sure answer .", True, -0.15 * 3 - 0.01 * 9),  # form without an answer is three useless words
        ("ant fox dog", True, 0.5 / 3),  # one of three places right
        ("ant dog fox fox", True, 0.5 * 3 / 4 - 0.15 - 0.01),  # a fourth word makes it wrong, and is extra
        ("indeed ant dog fox", True, 1 - 0.15 - 0.01),  # another tone's opener is extra
        ("ant sure dog fox", True, 1 - 0.15 - 0.01),  # an opener that does not open
        ("um ant um dog um fox", True, 1 - 0.45 - 0.09),
        ("brilliant ant dog fox wise", True, 1 - 0.6),
        ("ant dog fox . friend", True, 1 + 0.4 - 0.15 - 0.01),  # "." must come last
        ("sure sure ant dog fox", True, 1 + 0.4 - 0.15 - 0.01),
    ],
)
def test_utility_by_hand(response, ended, expected):
    np.testing.assert_allclose(utility(SORT, response, ended=ended), expected, atol=1e-9)


def solve(prompt: str) -> tuple[str, ...]:
    """The answer worked out from the prompt's words alone."""
    _, task, *words = prompt.split()
    match task:
        case "sort":
            return tuple(sorted(words))
        case "reverse":
            return tuple(reversed(words))
        case "count":
            return (NUMBERS[len(words) - 1],)
        case "pick":
            place, _, *items = words
            return (items[-1] if place == "last" else items[PLACES.index(place)],)
        case "find":
            return (words[words.index(words[0], 1) + 1],)
    raise AssertionError(prompt)


@pytest.mark.parametrize("shifted", [False, True])
def test_targets_follow_from_prompts(shifted):
    problems = draw_problems(np.random.default_rng(0), 400, shifted=shifted)
    assert {p.prompt.split()[1] for p in problems} == {"sort", "reverse", "count", "pick", "find"}
    for problem in problems:
        assert problem.target == solve(problem.prompt)
        assert is_exact(problem, " ".join(problem.target))


def test_shifted_lists_are_longer_than_any_trained_on():
    def longest(shifted):
        problems = draw_problems(np.random.default_rng(0), 400, shifted=shifted)
        return {
            task: {sum(w in ANIMALS for w in p.prompt.split()) for p in problems if task in p.prompt}
            for task in ("sort", "reverse", "count", "pick", "find")
        }

    inside, outside = longest(False), longest(True)
    for task, lengths in inside.items():
        assert not lengths & outside[task]


def test_tokenizer_is_a_round_trip_through_the_chat_template():
    tokenizer = make_tokenizer()
    assert len(tokenizer) == len(set(VOCABULARY)) == len(VOCABULARY)
    message = {"role": "user", "content": SORT.prompt}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert text == "<bos> <user> kindly sort fox ant dog <assistant>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1 and tokenizer.decode(ids) == text
    answer = {"role": "assistant", "content": "ant dog fox"}
    whole = tokenizer.apply_chat_template([message, answer], tokenize=False)
    assert whole == text + " ant dog fox <eos>"
    # No word of the world falls to the unknown token.
    assert tokenizer.pad_token_id not in tokenizer(" ".join(VOCABULARY[1:]), add_special_tokens=False)["input_ids"]


def test_every_prompt_fits_and_the_same_seed_gives_the_same_world():
    problems = draw_problems(np.random.default_rng(7), 500, shifted=True)
    assert max(len(p.prompt.split()) for p in problems) + 3 <= 16
    assert problems == draw_problems(np.random.default_rng(7), 500, shifted=True)
