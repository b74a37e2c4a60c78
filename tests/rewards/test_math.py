import gzip
import json
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.rewards import math, math_reward, strict_math_reward
from rlhf_jax.rewards.math import Correct, grade, last_boxed, symbolically_equal, verify
from rlhf_jax.rewards.quantity import last_number, quantity


def rows(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 18.", "18"), ("$18.00", "18"), ("$ 1,800 in all", "1800"), ("1,234.50!", "1234.5"), ("2 and 3", "3"),
        ("1,2,3", "3"), ("12,34", "34"), ("10-3", "3"), ("5 - 3", "3"), ("(5)-3", "3"), ("is -3", "-3"), ("−3", "-3"),
        ("$-5", "-5"), ("-$5", "-5"), (".5", "0.5"), ("-.5", "-0.5"), ("x3", "3"), ("1,000,000", "1000000"),
        ("3/4 of it", "3/4"), ("1 1/2 cups", "3/2"), ("it is 5 cm^2", "5"), ("6/2=3", "3"), ("on 3/4/2020", "2020"),
        ("2.5e3", "2500"), ("1/0", None), ("", None), ("none", None), ("-", None), ("$", None), ("٣", None),
    ],
)  # fmt: skip
def test_the_last_number_by_hand(text, number):
    found = last_number(text)
    value = None if found is None else quantity(found)
    assert value == (None if number is None else quantity(number)) or value.value == quantity(number).value


RIGHT = [
    # signs, thousands, decimals
    ("-4", "-4"), ("−4", "-4"), ("- 4", "-4"), ("+4", "4"), ("4.0", "4"), ("4.", "4"), ("004", "4"), (".5", "0.5"),
    ("1,800", "1800"), ("1{,}800", "1800"), ("1\\,800", "1800"), ("11,\\! 111", "11111"), ("1,234.5", "1234.50"),
    ("1.2e3", "1200"), ("1.2 \\times 10^3", "1200"), ("0.333333", "1/3"),
    # currency, units, per cent
    ("$18", "18"), ("\\$18.00", "18"), ("18 dollars", "$18"), ("€5", "5"), ("5 cm", "5"), ("5\\text{ cm}", "5 cm"),
    ("5 centimeters", "5 cm"), ("12 apples", "12"), ("90^\\circ", "90"), ("90 degrees", "90^\\circ"),
    ("5m", "5"), ("10 m/s", "10"), ("10 €", "€10"),
    ("15 \\mbox{ cm}^2", "15"), ("50%", "50"), ("50\\%", "0.5"), ("50 percent", "50%"), ("0.5", "50%"), ("50", "50%"),
    # fractions and mixed numbers
    ("1/2", "\\frac{1}{2}"), ("\\dfrac12", "0.5"), ("-\\frac{1}{2}", "-1/2"), ("\\frac{-1}{2}", "-0.5"),
    ("2/4", "1/2"),
    ("1 1/2", "3/2"), ("1\\frac{1}{2}", "1.5"), ("$\\frac{3}{4}$", "0.75"),
    ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"),
    # formulas
    ("x+1", "1+x"), ("(x+1)^2", "x^2+2x+1"), ("x=5", "5"), ("5", "x = 5"), ("y=2x+3", "2x+3"),
    ("\\sqrt{8}", "2\\sqrt{2}"),
    ("6+9i", "9i + 6"), ("2\\pi k", "2k\\pi"), ("( 290.0 / 2.0 )", "145"), ("3\\cdot 4", "12"), ("10!", "3628800"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{bmatrix}1\\\\2\\end{bmatrix}"), ("x>5", "5 < x"),
    # sets, tuples, intervals
    ("2, 1", "1,2"), ("\\{1,2\\}", "\\{2, 1\\}"), ("1 and 2", "1,2"), ("\\pm 2", "2,-2"), ("(1, 2]", "(1,2]"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi/2)"), ("(3,4)\\cup[1,2)", "[1,2) \\cup (3,4)"),
    # choices and words
    ("(C)", "C"), ("C", "\\text{(C)}"), ("C.", "C"), ("C) because", "C"), ("\\textbf{(C)}", "(C)"),
    ("evelyn", "\\text{Evelyn}"), ("Evelyn", "Evelyn"),
]  # fmt: skip
WRONG = [
    ("4", "-4"), ("-4", "4"), ("1,80", "180"), ("1800", "1,801"), ("0.33", "1/3"), ("18.01", "18"), ("5", "0.5"),
    ("5 cm", "5 km"), ("5 hours", "5 min"), ("5!", "5"), ("€5", "$5"), ("5 €", "$5"), ("50%", "5"), ("50", "0.5"),
    ("5", "50%"),
    ("2/1", "1/2"), ("1/2", "1 1/2"), ("11/2", "1 1/2"), ("1 1/0", "1"), ("x+1", "x-1"), ("x", "y"), ("5x", "5"),
    ("5xy", "5"), ("5 x", "5"), ("5\\pi", "5"), ("2^3", "23"), ("\\sqrt{3}", "3"), ("5i", "5"), ("x=4", "5"),
    ("4 or 5", "4"), ("4, 5", "4"), ("4, 5", "5"), ("\\{1,2,3\\}", "1,2"), ("1", "1,2"), ("\\pm 2", "2"),
    ("(1,2)", "(2,1)"), ("[1,2]", "(1,2)"), ("(1,2]", "[1,2)"), ("(1,2,3)", "(3,2,1)"), ("A", "B"),
    ("(A) or (B)", "B"),
    ("A, B, C", "B"), ("Evelyn or Carla", "\\text{Evelyn}"), ("Carla", "\\text{Evelyn}"), ("", "5"), ("}{", "5"),
    ("\\frac{1}{", "1"), ("ANY", "5"), ("None", "0"), ("nan", "5"), ("\\infty", "5"), ("0/0", "0"),
    ("1000001", "1000000"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "right"), RIGHT)
def test_right_in_either_form_and_in_a_sentence(given, right):
    assert grade(f"So it is\n#### {given}", right) == (True, True)
    assert grade(f"So $x$ it is $\\boxed{{{given}}}$.", right) == (True, True)
    assert grade(f"The answer is ${given}$.", right) == (False, True)


@pytest.mark.parametrize(("given", "right"), WRONG)
def test_wrong(given, right):
    assert grade(f"\\boxed{{{given}}}", right) == (False, False)
    assert not grade(f"#### {given}", right).strict


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        ("2 + 2 = 4\n#### 4", Correct(True, True)),
        ("####4.00", Correct(True, True)),
        ("#### $4. So 4 it is, not 5.\n#### 5", Correct(True, True)),
        ("2 + 2 = 4", Correct(False, True)),
        ("#### 5, or 4", Correct(False, False)),
        ("#### 4\n#### 5\n\\boxed{6}", Correct(True, True)),
        ("#### so 4", Correct(False, True)),
        ("####\n\n4", Correct(True, True)),
        ("four", Correct(False, False)),
        ("-4", Correct(False, False)),
        ("\\boxed{5} no, \\boxed{4}", Correct(True, True)),
        ("\\boxed{4} no, \\boxed{5}", Correct(False, False)),
        ("\\boxed{4", Correct(False, True)),
        ("4, so \\boxed{\\frac{8}{2}}", Correct(True, True)),
        ("I had 4, and the answer is 5", Correct(False, False)),
        ("$x = 2 + 2 = \\frac{8}{2}$", Correct(False, True)),
    ],
)
def test_strict_and_lenient(response, correct):
    assert grade(response, "#### 4") == grade(response, "4") == grade(response, 4.0) == correct


@pytest.mark.parametrize(
    "text",
    [
        "764 + 729",
        "764 + 729 = 764 + 729", "764+729=764+729", "$764 + 729$", "\\boxed{764 + 729}", "\\boxed{2986/2}",
        "\\boxed{\\frac{2986}{2}}", "#### 2986/2", "#### 764 + 729", "So \\(764 + 729\\)",
        "\\boxed{x = 764 + 729}",
        "2000 - 507", "1493 \\cdot 1", "\\boxed{\\sqrt{2229049}}",
    ],
)  # fmt: skip
def test_as_a_reward_a_sum_that_is_not_worked_out_is_wrong(text):
    assert math_reward([""], [text], answer=["1493"]) == strict_math_reward([""], [text], answer=["1493"]) == [0.0]
    assert not grade(text, "#### 1493", worked_out=True).lenient


@pytest.mark.parametrize(
    "text",
    [
        "764 + 729 = 1493", "#### 1,493", "\\boxed{1493.0}", "\\boxed{x = 1493}", "$764 + 729 = 1493$",
        "#### 1493 eggs", "764 + 729 is 1493.", "$1493", "\\(x = 1493\\)",
    ],
)  # fmt: skip
def test_as_a_reward_a_sum_that_is_worked_out_is_right(text):
    assert math_reward([""], [text], answer=["#### 1493"]) == [1.0]
    assert math_reward([""] * 3, ["2/4", "\\boxed{\\frac{1}{2}}", "#### 0.5"], answer=["1/2"] * 3) == [1.0] * 3


@pytest.mark.parametrize("text", ["1 " + "a" * 4000 + "!", "1 " + "word " * 800 + "!", "1 " + "m/s " * 900 + "!"])
def test_no_answer_takes_long_to_read(text):
    began = time.perf_counter()
    assert quantity(text) is None and not verify(text + " 2", 1)
    assert time.perf_counter() - began < 0.5


def test_a_number_of_thousands_of_digits_is_no_answer():
    assert not verify("9" * 5000, 5) and not verify("#### " + "9" * 5000, 5) and quantity("9" * 5000) is None


def test_dollars_around_the_answer_are_not_money():
    for answer in ("$18$", "$$18$$", "\\(18\\)", "\\[ 18 \\]", "$18$."):
        assert verify("#### 18 eggs", answer) and verify("She has 18 eggs left.", answer)
    assert verify("28 percent", "$28\\%$") and verify("18 dollars", "$18") and not verify("18 euros", "$18")


def test_a_row_without_an_answer_has_no_score_and_strictness_asks_for_the_form():
    assert math_reward([""] * 2, ["4", "4"], answer=[None, "4"]) == [None, 1.0]
    found = strict_math_reward([""] * 4, ["4", "#### 4", "\\boxed{4}", "4"], answer=["4", "4", "4", None])
    assert found == [0.0, 1.0, 1.0, None]


@pytest.mark.parametrize("answer", ["", " ", "#### ", "\\boxed{}", None, True, ["4"]])
def test_an_answer_with_nothing_in_it_is_refused(answer):
    with pytest.raises(ValueError, match="the answer"):
        grade("4", answer)


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("The answer is (B).", True), ("Answer: B", True), ("**B**", True), ("The correct option is (B) 12", True),
        ("The answer is B or C", False), ("(A) is wrong, so (C)", False), ("(A) or (B)", False), ("Because", False),
        ("The answer is B because A is wrong.", True),
    ],
)  # fmt: skip
def test_a_choice_in_a_sentence(response, right):
    assert verify(response, "B") is verify(response, "\\text{(B)}") is right


def test_the_content_of_the_last_box():
    assert last_boxed("\\boxed{1} \\boxed{\\{a_{1}\\}}.") == "\\{a_{1}\\}"
    assert last_boxed("\\boxed 5") == "5" and last_boxed("\\fbox{2}") == "2"
    assert last_boxed("\\boxed{2") is last_boxed("none") is None


def test_texts_and_messages_are_scored_with_trls_signature():
    messages = [{"role": "assistant", "content": "\\boxed{2}"}]
    found = math_reward(
        ["a", "b", [{"role": "user", "content": "c"}]], ["#### 2", "3", messages], answer=["2", 2, "2"], x=[]
    )
    assert found == [1.0, 0.0, 1.0]
    formulas = ["\\boxed{1+x}", "\\boxed{1-x}", "so $x+1$", "#### x + 1", "none"]
    assert math_reward([""] * 5, formulas, answer=["x+1"] * 5) == [1.0, 0.0, 1.0, 1.0, 0.0]
    with pytest.raises(ValueError):
        math_reward(["a"], ["2"], answer=[])


def test_a_formula_without_end_is_wrong_in_time_off_the_main_thread(monkeypatch):
    monkeypatch.setattr(math, "SECONDS", 1.0)
    assert symbolically_equal([("1+x", "x+1"), ("x", "y")], jobs=1) == [True, False]
    found = {}

    def ask():
        start = time.monotonic()
        found["equal"] = verify("\\boxed{9^{9^{9^{9^9}}} + x}", "x^2 - 1")
        found["seconds"] = time.monotonic() - start
        found["after"] = verify("\\boxed{1+x}", "x+1")

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(120)
    assert found["equal"] is False and found["after"] is True and found["seconds"] < 30


def test_published_solutions_solve_themselves_and_not_their_neighbours(shared_data):
    folder = shared_data / "math"
    gsm8k = [row for name in ("train", "test") for row in rows(folder / f"gsm8k.{name}.jsonl.gz")]
    assert len(gsm8k) == 7473 + 1319
    sets = {
        "gsm8k": [(row["answer"], row["answer"].split("#### ")[1]) for row in gsm8k],
        "math": [(row["solution"], row["answer"]) for row in rows(folder / "math500.jsonl.gz")],
        "svamp": [(f"It is {row['Answer']}", row["Answer"]) for row in rows(folder / "svamp.jsonl.gz")],
        "multiarith": [(str(row["target"]), row["target"]) for row in rows(folder / "multiarith.jsonl.gz")],
    }
    for name, pairs in sets.items():
        for (solution, answer), (_, other) in zip(pairs, pairs[1:] + pairs[:1], strict=True):
            found = grade(solution, answer, worked_out=True)
            assert found.lenient and (found.strict or name not in ("gsm8k", "math")), (name, answer)
            same = answer == other or (answer, other) == ("5", "x=5")
            assert verify(solution, other) == same or str(answer).replace(",", "") == str(other).replace(",", "")


def test_published_verdicts_on_four_models_solutions(shared_data):
    seen = 0
    for row in rows(shared_data / "math" / "gsm8k_model_solutions.jsonl.gz"):
        for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            solution = row[model]["solution"]
            assert grade(solution, row["ground_truth"]).lenient == row[model]["is_correct"]
            assert grade(solution, row["ground_truth"], worked_out=True).lenient == row[model]["is_correct"]
            marked = solution.replace("A: ", "#### ")
            assert grade(marked, row["ground_truth"]).strict == row[model]["is_correct"], marked
            seen += 1
    assert seen == 4 * 1319


@given(st.text(st.sampled_from("0123456789,.-−$# \n%/{}\\") | st.characters(), max_size=40))
def test_any_text_is_graded_and_strict_implies_lenient(text):
    correct = grade(text, "7")
    assert correct.lenient or not correct.strict


@given(st.integers(-(10**12), 10**12))
def test_a_number_is_read_back_however_it_is_written(number):
    for text in (
        f"{number}",
        f"{number:,}",
        f"so {number:,}.",
        f"= {number}.00",
        f"#### {number:,}",
        f"\\boxed{{{number}}}",
    ):
        assert grade(text, str(number)).lenient


# huggingface/Math-Verify, tests/test_all.py and tests/test_mixed_number_extraction.py: (answer, response, verdict)
THEIRS = [
    ("-5", "-5", 1), ("7425000", "7,425,000", 1), ("1000", "1 000", 1), ("1000", "1000.0", 1),
    ("1000.0", "1,000.0", 1),
    ("0.4", ".4", 1), ("1000.99", "$1,000.99", 1), ("1000.99", "1,000.99$", 1),
    ("1000.99", "the number is not 10 which is 1,000.99€", 1),
    ("1000.99", "so the number is 10 which is 1,000.99m²", 1), ("10/9", r"\frac{10}{9}", 1),
    ("-10/9", r"-\frac{10}{9}", 1), ("$9$", r"Answer \[ 9 \]", 1), ("$10$", r"Answer \( (9+1) \)", 1),
    ("$1/3$", r"$\frac13 $", 1), ("$1$", r"$\frac3{3} $", 1), ("$1/3$", r"$\cfrac{1}{3} $", 1),
    ("$1/3$", r"$\frac{1}{3} \text{meters}$", 1), ("$1/3$", r"$k = \frac{1}{3}$", 1),
    (r"$28\%$", r"$\boxed{28}$ pct", 1), (r"$28\%$", "28", 1), ("$0.28$", "28", 0), ("$28$", "28/100", 0),
    ("40/9", "The answer is 4 4/9.", 1), ("4", "The answer is 4 4/9.", 0), ("71/6", "+11 5/6", 1), ("4", "4 0/9", 1),
    ("4", "4 4/0", 0), ("11", "11 6/6", 0), ("40/900", "4 4/9%", 1),
]  # fmt: skip
DIFFERENT = [
    # Decimal commas are not read here.
    ("1000.99", "1000,99", 1), ("1,22", "1.22", 1), ("2.74", "Soucis : 2,74 $ a..", 1), ("0,111", "0.111", 1),
    # A number inside of a word.
    ("2", "AZYUK2A", 0),
    ("9004/9", "1 000 4/9", 1),
    # 11 6/6 is 12, though nobody writes it.
    ("12", "11 6/6", 0),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "response", "verdict"), THEIRS)
def test_math_verifys_own_cases(answer, response, verdict):
    assert verify(response, answer) == bool(verdict)


@pytest.mark.parametrize(("answer", "response", "verdict"), DIFFERENT)
def test_where_math_verify_says_otherwise(answer, response, verdict):
    assert verify(response, answer) != bool(verdict)
