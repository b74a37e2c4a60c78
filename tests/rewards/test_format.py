import subprocess
import sys
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rlhf_jax.rewards
from rlhf_jax.rewards import boxed_reward, ifeval_reward, length_reward, repetition_reward, tag_reward
from rlhf_jax.rewards.format import has_tags, length_penalty, repetition_penalty, tag_share


def said(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("text", "score", "share"),
    [
        ("<think>a</think><answer>b</answer>", 1, 1.0),
        (" <think>\na\n</think>\n\n<answer>b</answer>\n", 1, 1.0),
        ("<think>a</think> so <answer>b</answer>", 0, 1.0),
        ("<answer>b</answer><think>a</think>", 0, 1.0),
        ("<think></think><answer>b</answer>", 0, 1.0),
        ("<think>a<answer>b</answer></think>", 0, 1.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0, 0.5),
        ("<think>a</think><answer>b", 0, 0.75),
        ("<think>a</think>", 0, 0.5),
        ("", 0, 0.0),
    ],
)
def test_tags(text, score, share):
    assert tag_reward(["p", "q"], [text, said(text)], x=[1, 2]) == [score, score]
    assert tag_share(text, ("think", "answer")) == share


def test_any_tags():
    assert has_tags("<a.b>1</a.b>", ("a.b",)) and not has_tags("<axb>1</axb>", ("a.b",))


@pytest.mark.parametrize(
    ("text", "score"), [("\\boxed{1}", 1), ("\\boxed{}", 0), ("\\boxed{1", 0), ("\\boxed{1} \\boxed{1}", 0), ("1", 0)]
)
def test_one_box(text, score):
    assert boxed_reward(["p", "p"], [text, said(text)]) == [score, score]


@pytest.mark.parametrize(("length", "penalty"), [(0, 0.0), (10, 0.0), (15, -1.0), (20, -2.0), (110, -20.0)])
def test_the_penalty_of_length_by_hand(length, penalty):
    assert length_penalty(length, target=10, rate=2.0) == penalty
    with pytest.raises(ValueError, match="target"):
        length_penalty(length, target=0, rate=1.0)


def test_lengths_are_counted_by_the_function_that_is_given():
    reward = length_reward(partial(length_penalty, target=2, rate=1.0), lambda text: len(text.split()))
    assert reward(["p", "p", "p"], ["a b", "a b c", said("a b c d e")], x=[]) == [0.0, -0.5, -1.5]


@pytest.mark.parametrize(
    ("text", "size", "penalty"),
    [
        ("a b c d", 2, 0.0),
        ("a a a a a", 2, -0.75),
        ("a b a b a", 2, -0.5),
        ("A a", 1, -0.5),
        ("a", 2, 0.0),
        ("", 1, 0.0),
    ],
)
def test_repetition_by_hand(text, size, penalty):
    assert repetition_penalty(text, size=size, worst=-1.0) == penalty
    assert repetition_reward(size=size, worst=-2.0)(["p"], [said(text)]) == [2 * penalty]


@given(st.text("ab \n", max_size=30), st.integers(1, 4))
def test_repetition_lies_between_0_and_the_worst(text, size):
    assert -3.0 < repetition_penalty(text, size=size, worst=-3.0) <= 0.0


@pytest.mark.parametrize("wrong", [{"size": 0, "worst": -1.0}, {"size": 1, "worst": 1.0}])
def test_wrong_numbers_for_repetition_are_refused(wrong):
    with pytest.raises(ValueError, match="n-grams"):
        repetition_reward(**wrong)


def test_instructions_as_a_reward_and_where_it_does_not_apply():
    names = [["punctuation:no_comma", "length_constraints:number_words"], ["punctuation:no_comma"], None, []]
    arguments = [[{"num_words": None}, {"num_words": 3, "relation": "at least"}], [{}], None, []]
    texts = ["a b", said("a, b"), "x", "y"]
    found = ifeval_reward([""] * 4, texts, instruction_id_list=names, kwargs=arguments, key=[1, 2, 3, 4])
    assert found == [0.5, 0.0, None, None]
    with pytest.raises(ValueError, match="no instruction of IFEval"):
        ifeval_reward([""], ["x"], instruction_id_list=[["none"]], kwargs=[[{}]])


def test_every_name_of_the_package_is_there_and_none_costs_an_array_library():
    for name in rlhf_jax.rewards.HOMES:
        assert callable(getattr(rlhf_jax.rewards, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rlhf_jax.rewards.nothing
    program = f"import sys, rlhf_jax.rewards as r; [getattr(r, name) for name in {list(rlhf_jax.rewards.HOMES)}]; "
    program += "print(sorted({'jax', 'numpy', 'sympy', 'math_verify', 'flax'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"
