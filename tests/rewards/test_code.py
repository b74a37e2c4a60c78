import ast
import gzip
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.rewards import code_reward
from rlhf_jax.rewards.code import find_program, run_tests

pytestmark = pytest.mark.skipif(
    shutil.which("bwrap") is None,
    reason="bubblewrap is not installed: install the system's package bubblewrap, as .ci/run does",
)

SECONDS, MEMORY = 20.0, 512 * 2**20


def run(program, *tests, **limits):
    return run_tests(program, tests, **{"time_limit": SECONDS, "memory_limit": MEMORY} | limits)


ALL = """
import collections, datetime, decimal, fractions, math
from dataclasses import dataclass
from typing import NamedTuple

class Stack:
    size = 0
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x); self.size += 1
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __getitem__(self, i): return self.items[i]

@dataclass
class Node:
    value: int
    left: object = None

class Point(NamedTuple):
    x: int
    y: int

def same(x): return x
def depth(node): return 0 if node is None else 1 + depth(node.left)
def sort(xs, **how): xs.sort(**how)
def update(d): d["b"] = d.pop("a")
def apply(f, xs): return [f(x) for x in xs]
def both(f, x): return f(x, same)
def odd(n):
    for i in range(n):
        if i % 2: yield i
def fail(kind): raise kind("no")
def point(): return Point(1, 2)
def kinds(): return {1: 2.5, "a": (True, None, b"x"), (1,): {1, 2}, 2: frozenset("ab"), 3: 1j, 4: [[]]}
def kin(x): return [collections.Counter(x), collections.OrderedDict(a=1), collections.deque([1]), range(3), slice(1)]
def values(): return [decimal.Decimal("1.5"), fractions.Fraction(1, 3), datetime.date(2020, 1, 2)]
def twice(): x = []; return [x, x]
def sum(a, b): return a * b
def main(): return __name__
if __name__ == "__main__": raise SystemExit
"""


@pytest.mark.parametrize(
    "tests",
    [
        ("assert same(3) == 3", "assert same(x='é\\ud800') == 'é\\ud800'", "assert math.isclose(same(0.1), 0.1)"),
        ("assert same(float('nan')) != 0 and same(-0.0) == 0", "assert same(True) is True and same(None) is None"),
        (
            "s = Stack()",
            "s.push(3); s.push(4)",
            "assert s.pop() == 4 and len(s) == 1",
            "assert list(s) == [3] and s[0] == 3",
        ),
        (
            "s = Stack()\ns.size = 5\nassert s.size == 5",
            "assert isinstance(Stack(), Stack) and not isinstance(3, Stack)",
        ),
        ("root = Node(1)", "root.left = Node(2, Node(3))", "assert depth(root) == 3 and root.left.value == 2"),
        ("assert depth(None) == 0 and same(root := Node(1)) is root", "assert str(Node(1)).startswith('Node')"),
        (
            "a = [3, 1, 2]\nb = a\nsort(a, reverse=True)\nassert b == [3, 2, 1]",
            "d = {'a': 1}\nupdate(d)\nassert d == {'b': 1}",
        ),
        ("xs = [1]\nassert same(xs) is xs", "x, y = twice()\nassert x is y and x == []"),
        ("assert apply(lambda x: x * 2, [1, 2]) == [2, 4]", "out = []\napply(out.append, [1])\nassert out == [1]"),
        (
            "assert apply(abs, [-1]) == [1]",
            "assert both(lambda x, f: f(x) + 1, 1) == 2",
            "assert apply(str.upper, 'a') == ['A']",
        ),
        (
            "assert list(odd(6)) == [1, 3, 5] and 3 in odd(6)",
            "assert next(iter(odd(3))) == 1",
            "assert set(odd(3)) == {1}",
        ),
        ("try:\n    fail(KeyError)\n    assert False\nexcept KeyError:\n    pass", "assert point() == (1, 2)"),
        (
            "assert kinds() == {1: 2.5, 'a': (True, None, b'x'), (1,): {1, 2}, 2: frozenset('ab'), 3: 1j, 4: [[]]}",
            "assert same(-(10**400)) == -(10**400) and same(10**20 - 1) == 10**20 - 1",
        ),
        (
            "assert kin('aab')[:2] == [collections.Counter(a=2, b=1), collections.OrderedDict(a=1)]",
            "assert kin('')[2:] == [collections.deque([1]), range(3), slice(1)]",
        ),
        (
            "assert [str(v) for v in values()] == ['1.5', '1/3', '2020-01-02']",
            "assert values()[1] * 3 == 1",
        ),
        ("assert sum(3, 4) == 12",),
        ("class Pair:\n    def __init__(self, a):\n        self.left = a\nassert depth(Pair(Pair(None))) == 2",),
        (
            "def check(candidate):\n    for i in range(3):\n        assert candidate(i) == i\ncheck(same)",
            "assert main() != '__main__'",
        ),
        (
            "assert collections.Counter(same('aa')) == {'a': 2}",
            "from math import pi\nassert same(pi) == pi",
            "assert [same(i) for i in (1,)] == [1]",
        ),
    ],
)
def test_what_tests_of_a_right_program_do(tests):
    assert run(ALL, *tests) == (len(tests), len(tests), "")


@pytest.mark.parametrize(
    ("program", "test", "reason"),
    [
        ("def f(): return 1", "assert f() == 2", "the assertion does not hold"),
        ("def f(): return 1", "assert g() == 1", "NameError"),
        ("def f(:", "assert f() == 1", "SyntaxError"),
        ("def f(): return 1", "assert f( == 1", "SyntaxError"),
        ("def f(): raise KeyError(3)", "assert f() == 1", "KeyError"),
        ("raise OSError('no file')", "assert f() == 1", "does not load: OSError: no file"),
        ("def f(): pass\nclass C: pass\ndef f(): return C()", "assert f() == 1", "a C, which is not plain data"),
        ("def f(): return 1", "import os; os._exit(0)", "has ended"),
        ("def f(x): return 1", "f(object())", "hands over a object"),
        ("def f(): return 'x' * 10**7", "assert f() == 1", "of data"),
    ],
)
def test_why_a_test_failed(program, test, reason):
    found = run(program, test)
    assert found[:2] == (0, 1) and reason in found.reason and "\n" not in found.reason


def test_tests_are_counted_one_by_one_and_go_on_after_a_failure():
    found = run("def f(x): return x", "assert f(1) == 2", "assert f(2) == 2", "assert f(3) == 3")
    assert found == (2, 3, "test 0 (assert f(1) == 2): the assertion does not hold")
    found = run("def f(x):\n while x: pass", "assert f(0) is None", "f(1)", "f(0)", time_limit=1.0)
    assert found[:2] == (1, 3) and "no verdict within 1 s" in found.reason


@pytest.mark.parametrize(
    "wrong",
    [{"time_limit": 0}, {"time_limit": float("inf")}, {"memory_limit": 1000}, {"tests": []}, {"tests": "assert 1"}],
)
def test_wrong_limits_and_tests_are_refused(wrong):
    with pytest.raises(ValueError):
        run_tests("", **{"tests": ["assert 1"], "time_limit": 1.0, "memory_limit": MEMORY} | wrong)


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("x = 1", "x = 1"),
        ("    return 1", "def f():\n    return 1"),
        ("So:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```\nx = 1\n```\nor\n```py\nx = 2\n```\n```sh\nls\n```", "x = 2\n"),
        ("```python\nx = 1", "x = 1"),
        ([{"role": "assistant", "content": "```\nx = 1\n```"}], "x = 1\n"),
    ],
)
def test_the_program_in_a_completion(completion, program):
    assert find_program("def f():\n", completion) == program


def test_trls_signature():
    completions = ["def f(): return 1", [{"role": "assistant", "content": "```python\ndef f(): return 2\n```"}], "no"]
    found = code_reward(
        ["a", "b", "c"], completions, tests=[["assert f() == 1"], ["assert f() == 1"], ["f()"]], x=[1, 2, 3]
    )
    assert found == [1.0, 0.0, 0.0]
    assert code_reward(["a"] * 2, ["x = 1"] * 2, tests=[None, ["assert x == 1"]]) == [None, 1.0]
    with pytest.raises(UserError, match="row 0"):
        code_reward(["a"], ["b"], tests=[[]])


def emptied(program):
    tree = ast.parse(program)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.body = [ast.Pass()]
    return ast.unparse(tree)


def test_published_solutions_pass_and_fail_without_their_bodies(shared_data):
    def rows(name):
        with gzip.open(shared_data / "code" / name, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    tasks = [
        (row["prompt"] + row["canonical_solution"], [f"{row['test']}\ncheck({row['entry_point']})"])
        for row in rows("HumanEval.jsonl.gz")
    ]
    tasks += [
        (row["code"], [*filter(None, [row["test_setup_code"]]), *row["test_list"]]) for row in rows("mbpp.jsonl.gz")
    ]
    assert len(tasks) == 164 + 974
    tasks = tasks if os.environ.get("ALL_PROGRAMS") else tasks[::20]  # all of them take two minutes
    with ThreadPoolExecutor(2) as pool:
        right = list(pool.map(lambda task: run(task[0], *task[1]), tasks))
        empty = list(pool.map(lambda task: run(emptied(task[0]), *task[1]), tasks))
    assert [found for found in right if found.passed < found.total] == []
    assert [task for task, found in zip(tasks, empty, strict=True) if found.passed == found.total] == []
