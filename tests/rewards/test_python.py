"""Reward functions that misbehave: what is refused, what is counted, and what the other answers score."""

import math
import re
from contextlib import contextmanager

import numpy as np
import pytest

import rlhf_jax
from rlhf_jax.errors import UserError
from rlhf_jax.rewards.python import Limits, parse, python_reward
from rlhf_jax.rewards.reward import trl_forms

LIMITS = Limits(seconds=0.5, start_seconds=20.0, memory=None, jobs=2, chunk=3)


@contextmanager
def reward_of(folder, body, *, limits=LIMITS, failed_score=-1.0, max_failed_share=1.0):
    path = folder / "mine.py"
    path.write_text(body)
    function = parse(f"{path}:score")
    with python_reward(
        function, limits, name="mine", weight=1.0, failed_score=failed_score, max_failed_share=max_failed_share
    ) as reward:
        yield reward


def score(folder, body, completions, columns=None, **how):
    with reward_of(folder, body, **how) as reward:
        return reward.on_texts(["p"] * len(completions), completions, columns or {})


def each(line):
    """A function that does something with each completion `c`, and else scores its length."""
    return (
        "import os, time\n"
        "def score(prompts, completions, **columns):\n"
        "    out = []\n"
        "    for c in completions:\n"
        f"        {line}\n"
        "        out.append(len(c))\n"
        "    return out\n"
    )


@pytest.mark.parametrize(
    "name, columns, right, wrong",
    [
        ("math", {"answer": "#### 4"}, "2 + 2 is 4", "5"),
        ("strict_math", {"answer": "#### 4"}, "\\boxed{4}", "2 + 2 is 4"),
        ("ifeval", {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}, "no", "no, no"),
        ("boxed", {}, "\\boxed{1}", "1"),
        ("tag", {}, "<think>a</think><answer>b</answer>", "b"),
    ],
)
def test_checkers_go_by_their_names(name, columns, right, wrong):
    limits = LIMITS._replace(start_seconds=60.0, seconds=20.0)
    with python_reward(parse(name), limits, name=name, weight=1.0, failed_score=-1.0, max_failed_share=1.0) as reward:
        found = reward.on_texts(["p", "p"], [right, wrong], {key: [value] * 2 for key, value in columns.items()})
    assert found.scores.tolist() == [1.0, 0.0] and found.errors == 0


def test_what_a_function_is_given(tmp_path):
    body = (
        "def score(prompts, completions, **columns):\n"
        "    assert type(prompts) is list and sorted(columns) == ['answer', 'level'], columns\n"
        "    return [float(c == a) + 10 * (p == 'q1') + l for p, c, a, l in\n"
        "            zip(prompts, completions, columns['answer'], columns['level'], strict=True)]\n"
    )
    with reward_of(tmp_path, body) as reward:
        found = reward.on_texts(["q0", "q1"] * 4, list("abcdefgh"), {"answer": list("abcdEFGH"), "level": range(8)})
    assert reward.name == "mine" and not reward.traceable
    np.testing.assert_array_equal(found.scores, [1, 12, 3, 14, 4, 15, 6, 17])
    assert found[1:] == (0, 0, 0, "")


def test_messages_where_the_prompt_is_messages(tmp_path):
    prompts, completions = trl_forms([({"role": "user", "content": "Hi"},), "Hi"], ["yes", "no"])
    assert prompts == [[{"role": "user", "content": "Hi"}], "Hi"]
    assert completions == [[{"role": "assistant", "content": "yes"}], "no"]
    body = (
        "def score(completions, **_):\n"
        "    return [len(c[0]['content']) if isinstance(c, list) else 0 for c in completions]\n"
    )
    with reward_of(tmp_path, body) as reward:
        np.testing.assert_array_equal(reward.on_texts(prompts, completions, {}).scores, [3, 0])


@pytest.mark.parametrize(
    "body",
    [
        "def score(completions, answer):\n    return [c == a for c, a in zip(completions, answer)]\n",
        "import numpy as np\ndef score(prompts, completions, *, answer, level=0):\n"
        "    return np.array(completions) == np.array(answer)\n",
        "import decimal\nclass Score:\n    def __call__(self, completions, answer, **_):\n"
        "        return tuple(decimal.Decimal(c == a) for c, a in zip(completions, answer))\nscore = Score()\n",
    ],
)
def test_functions_that_name_their_columns_and_give_other_numbers(tmp_path, body):
    found = score(tmp_path, body, list("ab"), {"answer": ["a", "a"], "unused": [0, 0]})
    np.testing.assert_array_equal(found.scores, [1.0, 0.0])


def test_none_is_where_it_does_not_apply(tmp_path):
    found = score(tmp_path, "def score(completions, **_):\n    return [None, 2, None]\n", ["a", "b", "c"])
    np.testing.assert_array_equal(found.scores, [np.nan, 2.0, np.nan])
    assert found.errors == 0


@pytest.mark.parametrize(
    "line, errors, timeouts, reason",
    [
        ("if c == 'bad': raise ValueError('no\\nsense')", 1, 0, r"answer 4: line 5: ValueError: no$"),
        ("if c == 'bad': exit()", 1, 0, "answer 4: line 5: SystemExit"),
        ("if c == 'bad': os._exit(3)", 1, 0, r"answer 4: its process died \(exit code 3\)"),
        ("if c == 'bad': import ctypes; ctypes.string_at(0)", 1, 0, r"answer 4: its process died \(signal SIGSEGV\)"),
        ("if c == 'bad': bytearray(2 << 30)", 1, 0, "answer 4: line 5: MemoryError"),
        ("while c == 'bad': pass", 0, 1, r"answer 4: no score within 0\.5 s"),
        ("if c == 'bad': time.sleep(60)", 0, 1, r"answer 4: no score within 0\.5 s"),
        ("if c == 'bad': os.closerange(3, 64); time.sleep(60)", 1, 0, "answer 4: its process died"),
        ("if c == 'bad': out.append(float('nan')); continue", 1, 0, "answer 4: it returned nan"),
        ("if c == 'bad': out.append(-10 ** 400); continue", 1, 0, "answer 4: it returned inf"),
    ],
)
def test_only_the_culprit_fails(tmp_path, line, errors, timeouts, reason):
    limits = LIMITS._replace(memory=1 << 30)
    found = score(tmp_path, each(line), ["a", "bb", "ccc", "d", "bad", "ee", "f"], limits=limits)
    np.testing.assert_array_equal(found.scores, [1, 2, 3, 1, -1, 2, 1])
    assert (found.errors, found.timeouts) == (errors, timeouts)
    assert re.search(reason, found.first_error), found.first_error


def test_a_call_has_the_time_of_all_its_answers(tmp_path):
    calls = tmp_path / "calls"
    body = (
        "import time\n"
        "def score(completions, **_):\n"
        f"    open({str(calls)!r}, 'a').write(f'{{len(completions)}} ')\n"
        "    time.sleep(0.6)\n"
        "    return [len(c) for c in completions]\n"
    )
    found = score(tmp_path, body, ["a", "bb", "ccc"], limits=LIMITS._replace(seconds=0.3))
    np.testing.assert_array_equal(found.scores, [1, 2, 3])
    assert calls.read_text() == "3 "


def test_a_worker_that_was_killed_is_replaced(tmp_path):
    limits = LIMITS._replace(seconds=0.3, jobs=1)
    with reward_of(tmp_path, each("time.sleep(60 if c == 'bad' else 0)"), limits=limits) as reward:
        for _ in range(2):
            found = reward.on_texts(["p"] * 3, ["bad", "bb", "c"], {})
            np.testing.assert_array_equal(found.scores, [-1, 2, 1])
            assert found.timeouts == 1


def test_what_is_printed_goes_to_standard_error(tmp_path, capfd):
    found = score(tmp_path, each("print('said', c); os.write(1, b'raw'); os.system('echo child')"), ["a", "bb"])
    np.testing.assert_array_equal(found.scores, [1, 2])
    out, err = capfd.readouterr()
    assert out == "" and all(word in err for word in ("said bb", "raw", "child"))


def test_a_worker_runs_the_file_as_it_was_at_the_start(tmp_path):
    with reward_of(tmp_path, each("if c == 'bad': os._exit(1)"), limits=LIMITS._replace(jobs=1)) as reward:
        (tmp_path / "mine.py").write_text("syntax error")
        found = reward.on_texts(["p"] * 2, ["bad", "bb"], {})
    np.testing.assert_array_equal(found.scores, [-1, 2])


def test_a_function_imports_what_lies_beside_it_and_this_library_but_no_jax(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "beside.py").write_text("def number(text):\n    return len(text)\n")
    body = (
        "import sys\nfrom beside import number\nimport rlhf_jax\nfrom rlhf_jax.rewards.math import grade\n"
        "def score(completions, **_):\n"
        f"    assert rlhf_jax.__file__ == {rlhf_jax.__file__!r}\n"
        "    return [number(c) + grade(c, '7').lenient + 100 * ('jax' in sys.modules) for c in completions]\n"
    )
    np.testing.assert_array_equal(score(tmp_path, body, ["7", "abc"]).scores, [2, 3])


@pytest.mark.parametrize("share, raises", [(0.25, False), (0.24, True)])
def test_past_a_share_of_failures_it_stops(tmp_path, share, raises):
    completions = ["a", "bad", "c", "d"]
    if not raises:
        assert score(tmp_path, each("1 / (c != 'bad')"), completions, max_failed_share=share).errors == 1
        return
    message = r"mine.py:score: it failed on 1 of 4 answers \(25%; at most 24% may\); answer 1: line 5: ZeroDivisionErr"
    with pytest.raises(UserError, match=message):
        score(tmp_path, each("1 / (c != 'bad')"), completions, max_failed_share=share)


@pytest.mark.parametrize(
    "returned, message",
    [
        ("[1.0]", "it returned 1 scores for 2 answers"),
        ("None", "it returned NoneType, not a list of numbers"),
        ("1.0", "it returned float, not a list of numbers"),
        ("(1.0 for _ in completions)", "it returned generator, not a list of numbers"),
        ("'ab'", "it returned str, not a list of numbers"),
        ("[1.0, '2']", "item 1 of what it returned is str '2', not a number"),
        ("[[1.0], 2]", "item 0 of what it returned is list"),
        ("[1.0, 2j]", "item 1 of what it returned is complex 2j, not a number"),
    ],
)
def test_what_is_returned_must_be_numbers_one_an_answer(tmp_path, returned, message):
    with pytest.raises(UserError, match=f"mine.py:score: {re.escape(message)}"):
        score(tmp_path, f"def score(completions, **_):\n    return {returned}\n", ["a", "b"])


@pytest.mark.parametrize(
    "body, message",
    [
        ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("\ndef score(:\n", "line 2: SyntaxError"),
        ("def other():\n    pass\ndef score2():\n    pass\n", "there is no 'score'; it has other, score2"),
        ("score = 3\n", "'score' is int, not a function"),
        ("import os\nos._exit(7)\n", r"its process died while it loaded \(exit code 7\)"),
        ("raise SystemExit('bye')\n", "line 1: SystemExit: bye"),
        ("import time\ntime.sleep(60)\n", "it did not load within 1 s"),
    ],
)
def test_a_file_that_does_not_load(tmp_path, body, message):
    with (
        pytest.raises(UserError, match=f"mine.py: {message}"),
        reward_of(tmp_path, body, limits=LIMITS._replace(start_seconds=1.0 if "sleep" in body else 20.0)),
    ):
        pass


@pytest.mark.parametrize(
    "text, message",
    [
        ("brevity", "named as FILE.py:NAME"),
        (":brevity", "named as FILE.py:NAME"),
        ("mine.py:", "named as FILE.py:NAME"),
        ("mine.py:a.b", "named as FILE.py:NAME"),
        ("missing.py:score", "missing.py: No such file"),
        (".:score", "Is a directory"),
    ],
)
def test_a_function_that_is_not_named_right(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        parse(text)


def test_columns_that_the_rows_lack_or_that_have_a_taken_name(tmp_path):
    body = "def score(completions, answer):\n    return [0] * len(completions)\n"
    with pytest.raises(
        UserError, match="it asks for 'answer', which the rows do not have; they have prompts, completions, level"
    ):
        score(tmp_path, body, ["a"], {"level": [1]})
    with pytest.raises(UserError, match="the rows have a field 'prompts'"):
        score(tmp_path, body, ["a"], {"prompts": [1]})
    with pytest.raises(ValueError, match="2 answer for 1 completions"):
        score(tmp_path, body, ["a"], {"answer": [1, 2]})


def test_no_answers_no_scores(tmp_path):
    assert score(tmp_path, each("pass"), []).scores.shape == (0,)
    assert math.isnan(score(tmp_path, "def score(completions, **_):\n    return [None]\n", ["a"]).scores[0])
