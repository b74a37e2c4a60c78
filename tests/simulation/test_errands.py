"""The second setting: its targets follow from its prompts, its utility by hand, and what people write in it."""

import numpy as np
import pytest

from rlhf_jax.simulation import ERRANDS, Annotators, Demonstrators, Problem
from rlhf_jax.simulation.errands import COLOURS, DIGITS
from rlhf_jax.simulation.people import mistake, parts_of

PROBLEM = Problem(
    "gravely order 3 1 2 then mirror blue dun then after 9 4", "gravely",
    ("1", "2", "3", "dun", "blue", "0", "5"), (3, 2, 2),
)  # fmt: skip
PERFECT = "hear firstly 1 2 3 secondly dun blue thirdly 0 5 amen ."


def solve(prompt):
    """The answer worked out from the prompt's words alone, part by part."""
    found = []
    for errand in prompt.split(" ", 1)[1].split(" then "):
        task, *words = errand.split()
        match task:
            case "order":
                found.append(sorted(words, key=int))
            case "mirror":
                found.append(words[::-1])
            case "after":
                found.append([str((int(word) + 1) % 10) for word in words])
            case "without":
                gone, _, *others = words
                found.append([word for word in others if word != gone])
            case "twice":
                found.append([word for word in words for _ in range(2)])
    return found


@pytest.mark.parametrize("shifted", [False, True])
def test_targets_follow_from_prompts_and_fit(shifted):
    tokenizer, seen = ERRANDS.make_tokenizer(), set()
    assert len(tokenizer) == len(ERRANDS.vocabulary) == len(set(ERRANDS.vocabulary))
    for problem in ERRANDS.draw_problems(np.random.default_rng(0), 400, shifted=shifted):
        parts = solve(problem.prompt)
        assert [list(part) for part in parts_of(problem)] == parts and ERRANDS.is_exact(
            problem, " ".join(problem.target)
        )
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.prompt}], add_generation_prompt=True
        )
        assert len(asked["input_ids"]) <= ERRANDS.prompt_length and tokenizer.unk_token_id not in asked["input_ids"]
        assert len(problem.target) + 3 + 4 + 8 + 2 <= ERRANDS.answer_length + 6 * shifted
        seen |= {len(part) for part in parts}
    assert seen == ({3, 4} if shifted else {2, 3})


@pytest.mark.parametrize(
    ("response", "ended", "expected"),
    [
        (PERFECT, True, 1.5 + 0.4 + 0.4 + 0.5 + 0.4),
        (PERFECT, False, 2.2),
        ("1 2 3 dun blue 0 5", True, 1.5),
        ("", True, 0.0),
        ("firstly 1 2 3 dun blue thirdly 0 5", True, 1.5 + 0.5 * 2 / 3),
        # One of three places of the first part, one of two of the third.
        ("1 3 2 dun blue 0 6", True, 1.5 * (0.5 / 3 + 1 + 0.25) / 3),
        # A fourth word for the first part moves all that follow; the last part has three words for two.
        ("1 2 3 3 dun blue 0", True, 1.5 * (1 + 0 + 0) / 3),
        # The last part has a word too many: half of two of three, and a word that serves nothing.
        ("1 2 3 dun blue 0 5 5", True, 1.5 * (2 + 0.5 * 2 / 3) / 3 - 0.15 - 0.01),
        # A marker after its part announces nothing.
        ("1 2 3 firstly dun blue 0 5", True, 1.5 - 0.15 - 0.01),
        ("er 1 2 3 dun blue 0 5 sublime", True, 1.5 - 0.15 - 0.01 - 0.3),
        # Half of an answer: two parts are missing.
        ("firstly 1 2 3", True, 0.5 + 0.5 / 3),
    ],
)
def test_utility_by_hand(response, ended, expected):
    np.testing.assert_allclose(ERRANDS.utility(PROBLEM, response, ended=ended), expected, atol=1e-9)


def test_people_write_all_parts_and_err_in_each():
    rng, people = np.random.default_rng(0), Demonstrators(error=0.5, filler=0.0, flattery=0.0)
    told = [people.write(rng, PROBLEM, ERRANDS).split() for _ in range(2000)]
    said = [[word for word in words if word in ERRANDS.payload] for words in told]
    assert all(len(words) == 7 for words in said)
    ends = [(0, 3), (3, 5), (5, 7)]
    right = [np.mean([tuple(words[a:b]) == PROBLEM.target[a:b] for words in said]) for a, b in ends]
    np.testing.assert_allclose(right, 0.5, atol=0.05)
    marked = [np.mean([marker in words for words in told]) for marker in ERRANDS.markers]
    np.testing.assert_allclose(marked, people.announce, atol=0.05)
    for target, kind in ((("dun", "blue"), COLOURS), (("0", "5"), DIGITS), (("jade", "jade"), COLOURS)):
        wrong = [tuple(mistake(rng, target, ERRANDS)) for _ in range(50)]
        assert target not in wrong and all(set(words) <= set(kind) for words in wrong)


def test_annotators_know_which_words_flatter():
    people = Annotators(noise=0.0, length_bias=0.0)
    seen = people.perceive(np.zeros(2), ["sublime 1", "brilliant 1"], ERRANDS.flattery)
    np.testing.assert_allclose(seen, [people.flattery_bias, 0.0])
