import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.rewards.math import Correct, grade, lenient_number, strict_number


def rows(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 18.", "18"),
        ("$18.00", "18"),
        ("$ 1,800 in all", "1800"),
        ("1,234.50!", "1234.5"),
        ("2 and 3", "3"),
        ("1,2,3", "3"),
        ("12,34", "34"),
        ("10-3", "3"),
        ("5 - 3", "3"),
        ("(5)-3", "3"),
        ("is -3", "-3"),
        ("−3", "-3"),
        ("$-5", "-5"),
        ("-$5", "-5"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("50%", "50"),
        ("x3", "3"),
        ("7 #### 8 and 9", "8"),
        ("7 #### none", "7"),
        ("#### 0 of 5", "0"),
        ("1,000,000", "1000000"),
    ],
)
def test_numbers_by_hand(text, number):
    value = lenient_number(text)
    assert value is not None and value == type(value)(number)


@pytest.mark.parametrize("text", ["", "none", "-", "$", ".", "####", "٣"])
def test_no_number(text):
    assert lenient_number(text) is None and strict_number(text) is None


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        ("2 + 2 = 4\n#### 4", Correct(True, True)),
        ("####4.00", Correct(True, True)),
        ("#### $4. So 4 it is, not 5.\n#### 5", Correct(True, True)),
        ("2 + 2 = 4", Correct(False, True)),
        ("#### 5, or 4", Correct(False, False)),
        ("#### so 4", Correct(False, True)),
        ("####\n\n4", Correct(True, True)),
        ("four", Correct(False, False)),
        ("-4", Correct(False, False)),
    ],
)
def test_strict_and_lenient(response, correct):
    assert grade(response, "#### 4") == grade(response, "4") == correct


def test_an_answer_without_a_number_is_refused():
    with pytest.raises(ValueError, match="has no number"):
        grade("4", "four")


def test_published_solutions_solve_themselves(shared_data):
    for name, count in (("train", 7473), ("test", 1319)):
        problems = rows(shared_data / "math" / f"gsm8k.{name}.jsonl.gz")
        assert len(problems) == count
        for row in problems:
            assert grade(row["answer"], row["answer"]) == (True, True)
            assert strict_number(row["answer"]) == int(row["answer"].split("#### ")[1].replace(",", ""))


def test_published_verdicts_on_four_models_solutions(shared_data):
    seen = 0
    for row in rows(shared_data / "math" / "gsm8k_model_solutions.jsonl.gz"):
        for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            solution = row[model]["solution"]
            assert grade(solution, row["ground_truth"]).lenient == row[model]["is_correct"]
            marked = solution.replace("A: ", "#### ")
            assert grade(marked, row["ground_truth"]).strict == row[model]["is_correct"], marked
            seen += 1
    assert seen == 4 * 1319


@given(st.text(st.sampled_from("0123456789,.-−$# \n") | st.characters(), max_size=40))
def test_any_text_is_graded_and_strict_implies_lenient(text):
    correct = grade(text, "7")
    assert correct.lenient or not correct.strict


@given(st.integers(-(10**12), 10**12))
def test_a_number_is_read_back_however_it_is_written(number):
    for text in (f"{number}", f"{number:,}", f"so {number:,}.", f"= {number}.00", f"#### {number:,}"):
        assert grade(text, str(number)).lenient
