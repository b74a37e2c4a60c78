"""Sums with a difficulty: their answers are right, their size is what was asked for."""

import json
import re
import subprocess
import sys

import pytest

from rlhf_jax.data.arithmetic import FORM, make_problems
from rlhf_jax.rewards import math

KINDS = ("add", "subtract", "multiply", "compare", "largest")


def solved(row):
    """The answer by another way: Python's own reading of the question."""
    question = row["prompt"].removesuffix(FORM)
    numbers = [int(x) for x in re.findall(r"\d+", question)]
    if row["kind"] in ("compare", "largest"):
        return sorted(numbers)[-1]
    return eval(re.search(r"What is (.*)\?", question)[1])


@pytest.mark.parametrize("digits, terms", [(1, 2), (2, 3), (4, 2)])
def test_answers_are_right_and_numbers_have_the_digits(digits, terms):
    rows = make_problems(200, digits=digits, terms=terms, kinds=KINDS, seed=1)
    assert {row["kind"] for row in rows} == set(KINDS)
    for row in rows:
        assert row["answer"] == f"#### {solved(row)}"
        assert math.grade(row["answer"], row["answer"]).strict
        numbers = re.findall(r"\d+", row["prompt"].removesuffix(FORM))
        assert max(map(len, numbers)) <= digits
        assert len(numbers) == {"compare": 2, "largest": terms + 1}.get(row["kind"], terms)
    assert rows == make_problems(200, digits=digits, terms=terms, kinds=KINDS, seed=1)
    assert rows != make_problems(200, digits=digits, terms=terms, kinds=KINDS, seed=2)


def test_no_prompt_is_there_twice_while_there_are_others():
    assert len({row["prompt"] for row in make_problems(90, digits=1, kinds=("add",))}) == 90
    assert len(make_problems(150, digits=1, kinds=("add",))) == 150  # there are but 100


@pytest.mark.parametrize("wrong", [{"digits": 0}, {"terms": 1}, {"kinds": ()}])
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError):
        make_problems(3, **{"digits": 1} | wrong)


def test_the_command_writes_a_file_once(tmp_path):
    command = [sys.executable, "-m", "rlhf_jax.data.arithmetic", str(tmp_path / "sums.jsonl"), "--count", "5"]
    first, second = (subprocess.run(command, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert len([json.loads(line) for line in open(tmp_path / "sums.jsonl")]) == 5
    assert second.returncode == 2 and "is there already" in second.stderr
