"""The side of the tests: it runs them here, and asks the program, in another sandbox, for what its functions return.

Every comparison is made in this process, with values that came as data. So a program can make a test pass in one way:
by answering its calls with values for which the test holds.
"""

import ast
import builtins
import importlib
import os
import socket
import symtable
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from rlhf_jax.rewards.sandboxed.asked import Program, shaped
from rlhf_jax.rewards.sandboxed.limits import Limits, confine
from rlhf_jax.rewards.sandboxed.wire import COUNT, Breach, Link, NotPlain, decode, encode

PURE = frozenset(
    "bisect calendar cmath collections copy datetime decimal fractions functools heapq itertools json math "
    "operator random re statistics string typing".split()
)
"""Modules that a test has from here where it relies on the program's own import of them."""
OURS = PURE | frozenset(
    "abc base64 binascii contextlib dataclasses difflib enum hashlib inspect io os secrets struct sys textwrap time "
    "unicodedata unittest urllib uuid warnings zlib".split()
)
"""Names that are always these modules before a dot, whatever the program calls so."""
CONVENTIONS = {"np": "numpy"}


class Tests(NamedTuple):
    """The state that the tests of a program share."""

    program: Program
    namespace: dict[str, Any]
    own: set[str]
    """Names that the tests have defined so far."""
    modules: dict[str, tuple[str, str]]
    """Names that they have from `PURE` because the program imports them: name -> module, attribute."""
    like_pythons: bool
    """Whether what they test must be called like one of Python's own functions, as they use no other name."""


def share(program: Program, namespace: dict[str, Any], source: str, tests: Sequence[str]) -> Tests:
    """Looks through the tests of a program before the first is run."""
    own: set[str] = set()
    others = False
    for test in tests:
        try:
            found = needs(test)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        others = others or any(not hasattr(builtins, name) for name in found.free - own - set(found.modules))
        own |= found.bound
    return Tests(program, namespace, set(), imported(source), not others)


def examine(tests: Tests, test: str) -> str:
    """Runs one test; "" when it holds, otherwise why it does not."""
    program = tests.program
    program.broken = ""
    try:
        tree = ast.parse(test)
        records = [node for node in tree.body if is_record(node)]
        if records:
            imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            program.ask("define", "\n".join(ast.unparse(node) for node in (*imports, *records)))
            tree.body = [node for node in tree.body if node not in records]
        give_names(tests, needs(test), {node.name for node in records if isinstance(node, ast.ClassDef)})
        exec(compile(tree, "test", "exec"), tests.namespace)
    except AssertionError as error:
        return program.broken or f"the assertion does not hold{': ' + line(error) if str(error) else ''}"
    except (NotPlain, Breach) as error:
        return line(error)
    except BaseException as error:
        return program.broken or f"{type(error).__name__}: {line(error)}"
    return program.broken


def is_record(node: ast.stmt) -> bool:
    """Whether it defines a class that only holds data: such a class of the tests becomes the program's own.

    One that does more stays here: what it compares must not be compared, nor read, by the program.
    """
    if not isinstance(node, ast.ClassDef):
        return False
    methods = [part for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)]
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign | ast.Assign | ast.Pass | ast.Expr)]
    plain = all(isinstance(base, ast.Name) and base.id in ("object", "NamedTuple") for base in node.bases)
    held = all(method.name in ("__init__", "__repr__", "__str__") for method in methods)
    calm = not any(isinstance(part, ast.Assert | ast.Compare) for part in ast.walk(node))
    return plain and held and calm and len(methods) + len(fields) == len(node.body)


class Needs(NamedTuple):
    """The names of a test."""

    free: set[str]
    """Used, and not defined in it."""
    bound: set[str]
    modules: dict[str, tuple[str, str]]
    """Names of Python's modules, whatever the program says."""


def needs(test: str) -> Needs:
    """The global names of a test, of whatever scope. Raises SyntaxError for what is no Python."""
    used, bound = global_names(symtable.symtable(test, "test", "exec"))
    heads = {name for node in ast.walk(ast.parse(test)) if (name := _head(node))}
    modules = {name: (CONVENTIONS.get(name, name), "") for name in heads & (OURS | set(CONVENTIONS))}
    return Needs(used - bound, bound, modules)


def give_names(tests: Tests, found: Needs, records: set[str]) -> None:
    """Puts what the test uses and does not define into its namespace: modules from here, all else from the program.

    Python's own functions are Python's own, whatever the program calls so; unless no test uses any other name, and
    the program has one of those that this test uses: then that is the function that it tests.
    """
    tests.own.update(found.bound - records)
    tests.own.difference_update(records)
    free = (found.free | records) - tests.own
    for name in free:
        tests.namespace.pop(name, None)
    modules = tests.modules | found.modules
    for name in free & set(modules):
        module, attribute = modules[name]
        home = importlib.import_module(module)
        tests.namespace[name] = getattr(home, attribute) if attribute else home
    free -= set(modules)
    pythons = {name for name in free if hasattr(builtins, name)}
    theirs = program_names(tests.program, free - pythons)
    if tests.like_pythons:
        named = program_names(tests.program, pythons)
        theirs |= named if len(named) == 1 else {}
    tests.namespace.update(theirs)


def program_names(program: Program, wanted: set[str]) -> dict[str, Any]:
    """The program's objects, or data, by name; without the names that it does not have."""
    found = shaped(program.ask("names", tuple(sorted(wanted))), dict) if wanted else {}
    return {name: value for name, value in found.items() if name in wanted}


def global_names(table: symtable.SymbolTable) -> tuple[set[str], set[str]]:
    """The global names that a test uses, in whatever scope, and those that it defines."""
    top = table.get_type() == "module"
    used, bound = set(), set()
    for symbol in table.get_symbols():
        if top or symbol.is_global():
            used |= {symbol.get_name()} if symbol.is_referenced() else set()
            bound |= {symbol.get_name()} if symbol.is_assigned() or symbol.is_imported() else set()
    for child in table.get_children():
        inner = global_names(child)
        used, bound = used | inner[0], bound | inner[1]
    return used, bound


def _head(node: ast.AST) -> str:
    """The name before an attribute: math of math.pi."""
    return node.value.id if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else ""


def imported(source: str) -> dict[str, tuple[str, str]]:
    """Names that the program's own import statements give to modules of `PURE` and what is in them."""
    found: dict[str, tuple[str, str]] = {}
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return found
    for node in body:
        if isinstance(node, ast.Import):
            found |= {(n.asname or n.name): (n.name, "") for n in node.names if n.name in PURE}
        elif isinstance(node, ast.ImportFrom) and node.module in PURE and not node.level:
            module = importlib.import_module(node.module)
            found |= {(n.asname or n.name): (node.module, n.name) for n in node.names if hasattr(module, n.name)}
    return found


def line(error: BaseException) -> str:
    """The text of an exception, as one short line that can be printed."""
    try:
        text = str(error)
    except BaseException:
        text = ""
    return "".join(letter if letter.isprintable() else " " for letter in text)[:200]


def main(fd: int, limits: Limits, folders: list[str]) -> None:
    """Reads the program and the tests from standard input; writes a frame for "ready" and for each test."""
    sys.path.extend(folders)
    verdicts = os.fdopen(os.dup(1), "wb")
    size = COUNT.unpack(sys.stdin.buffer.read(4))[0]
    source, tests = decode(sys.stdin.buffer.read(size), [], _nothing)
    confine(limits)

    def say(text: str) -> None:
        frame = encode(text, [], _nothing)
        verdicts.write(COUNT.pack(len(frame)) + frame)
        verdicts.flush()

    namespace: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins}
    link = Link(socket.socket(fileno=fd))
    program = Program(link, namespace)
    try:
        link.receive()
        say("ready")
        program.load(source)
    except BaseException as error:
        reason = f"the program does not load: {type(error).__name__}: {line(error)}"
        for _ in tests:
            say(reason)
        return
    shared = share(program, namespace, source, tests)
    for test in tests:
        say(examine(shared, test))


def _nothing(*_: Any) -> NoReturn:
    raise NotPlain("not plain data")
