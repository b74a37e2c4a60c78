"""Public functions and classes say what they do, and which errors they raise."""

import ast
from itertools import pairwise
from pathlib import Path

import pytest

import rlhf_jax

ROOT = Path(rlhf_jax.__file__).parent.parent
FOLDERS = ("rlhf_jax", "experiments", "tpu")
FILES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
DANGLING = ("Of ", "What ", "As ", "Those ", "Whose ")
"""Beginnings that refer to another sentence."""
MAKING = {"__init__", "__post_init__", "__new__"}
"""Methods whose errors the docstring of the class may tell of."""
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def own(node):
    """The nodes of a definition, without those of the functions and classes inside it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Definition | ast.Lambda):
            yield child
            yield from own(child)


def exception(statement):
    """The name of the exception that a raise statement makes; None where it raises a caught one again."""
    made = statement.exc.func if isinstance(statement.exc, ast.Call) else statement.exc
    return made.id if isinstance(made, ast.Name) and made.id[0].isupper() else None


def caught_at_once(node):
    """The raise statements of a function inside a try that catches what they raise."""
    for block in own(node):
        if isinstance(block, ast.Try):
            types = [handler.type for handler in block.handlers if handler.type]
            names = {name.id for kind in types for name in ast.walk(kind) if isinstance(name, ast.Name)}
            inside = [one for line in block.body for one in ast.walk(line) if isinstance(one, ast.Raise)]
            yield from (one for one in inside if exception(one) in names)


def raised(node):
    """The names of the exceptions that a function's own lines raise and let out."""
    caught = {id(one) for one in caught_at_once(node)}
    found = {exception(one) for one in own(node) if isinstance(one, ast.Raise) and id(one) not in caught}
    return sorted(found - {None})


def unsaid(name, node, text):
    return [f"{name} raises {error} and does not say so" for error in raised(node) if not says(text, error)]


def says(text, error):
    return "raise" in text.lower() and error in text


def described(tree):
    """(name, docstring) of everything in a file that has one: private definitions, constants and fields too."""
    for node in ast.walk(tree):
        if isinstance(node, Definition | ast.Module):
            yield getattr(node, "name", "the file"), ast.get_docstring(node) or ""
            for before, after in pairwise(node.body):
                if isinstance(before, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr):
                    target = before.targets[0] if isinstance(before, ast.Assign) else before.target
                    if isinstance(after.value, ast.Constant):
                        yield ast.unparse(target), str(after.value.value)


def faults(source):
    """A line about each fault of a file."""
    tree = ast.parse(source)
    for node in tree.body:
        if not isinstance(node, Definition) or node.name.startswith("_"):
            continue
        text = ast.get_docstring(node) or ""
        if not text:
            yield f"{node.name} has no docstring"
        if not isinstance(node, ast.ClassDef):
            yield from unsaid(node.name, node, text)
            continue
        for method in (one for one in node.body if isinstance(one, ast.FunctionDef)):
            both = f"{text} {ast.get_docstring(method) or ''}" if method.name in MAKING else ast.get_docstring(method)
            if not method.name.startswith("_") or method.name.startswith("__"):
                yield from unsaid(f"{node.name}.{method.name}", method, both or "")
    for name, text in described(tree):
        if text.startswith(DANGLING):
            yield f"{name}: a docstring begins with {text.split()[0]!r}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_what_is_public_says_what_it_does_and_raises(path):
    assert list(faults((ROOT / path).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source, fault",
    [
        ("def f():\n    return 1", "f has no docstring"),
        ("class C:\n    x = 1", "C has no docstring"),
        ('def f():\n    """One."""\n    raise UserError("no")', "f raises UserError and does not say so"),
        ('def f():\n    """UserError."""\n    raise UserError', "f raises UserError and does not say so"),
        ('class C:\n    """One."""\n    def __init__(self):\n        raise TypeError', "C.__init__ raises TypeError"),
        ('class C:\n    """One."""\n    def f(self):\n        raise BadRow("x")', "C.f raises BadRow"),
        ('def _f():\n    """Of one."""', "_f: a docstring begins with 'Of'"),
        ('"""As others."""', "the file: a docstring begins with 'As'"),
        ('X = 1\n"""Those of others."""', "X: a docstring begins with 'Those'"),
        ('class C:\n    """One."""\n    x: int\n    """What it is."""', "x: a docstring begins with 'What'"),
    ],
)
def test_a_fault_is_seen(source, fault):
    (found,) = faults(source)
    assert found.startswith(fault)


@pytest.mark.parametrize(
    "source",
    [
        'def f():\n    """Raises UserError for 1."""\n    raise UserError("no")',
        'def f():\n    """One."""\n    try:\n        raise KeyError\n    except KeyError:\n        raise',
        'class C:\n    """Raises TypeError for 1."""\n    def __init__(self):\n        raise TypeError',
        'def f():\n    """One."""\n    def g():\n        raise KeyError\n    return g',
        "def _f():\n    raise KeyError",
    ],
)
def test_what_is_right_is_let_through(source):
    assert not list(faults(source))
