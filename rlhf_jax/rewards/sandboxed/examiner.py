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
import types
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from .limits import Limits, confine
from .wire import COUNT, MUTABLE, Breach, Link, NotPlain, contents, decode, encode, fill

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
VERDICTS = frozenset(
    name
    for kind in (str, bytes, set, int, float)
    for name in vars(kind)
    if name.startswith("is") or name in ("startswith", "endswith")
)
"""Methods of plain values that say yes or no: an object that only poses as one is not asked."""
CONVENTIONS = {"np": "numpy"}
NEVER = (StopIteration, StopAsyncIteration)
"""Exceptions that would end a test's own loop as if it had been through."""


class ProgramError(Exception):
    """An exception of the program that is none of Python's own."""


class Remote:
    """An object of the program that is not plain data. Its comparison is refused, except with itself."""

    __slots__ = ("_kind", "_number", "_program")

    def __init__(self, program: "Program", number: int, kind: str):
        for name, value in (("_program", program), ("_number", number), ("_kind", kind)):
            object.__setattr__(self, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._program.ask("call", self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in VERDICTS:
            self._refuse(f"asks .{name} of")
        return self._program.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._program.ask("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._program.ask("setitem", self, key, value)

    def __delitem__(self, key: Any) -> None:
        self._program.ask("delitem", self, key)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._program.ask("iter", self)
        while True:
            try:
                item = self._program.ask("next", iterator)
            except Stop:
                return
            yield item

    def __next__(self) -> Any:
        try:
            return self._program.ask("next", self)
        except Stop:
            raise StopIteration from None

    def __instancecheck__(self, item: Any) -> bool:
        return type(item) is Remote and self._program.ask("isinstance", item, self) is True

    def __len__(self) -> int:
        return _exactly(int, self._program.ask("len", self))

    def __bool__(self) -> bool:
        return _exactly(bool, self._program.ask("bool", self))

    def __int__(self) -> int:
        return _exactly(int, self._program.ask("int", self))

    def __float__(self) -> float:
        return _exactly(float, self._program.ask("float", self))

    def __str__(self) -> str:
        return _exactly(str, self._program.ask("str", self))

    def __repr__(self) -> str:
        return _exactly(str, self._program.ask("repr", self))

    def __hash__(self) -> int:
        return hash(self._number)

    def __eq__(self, other: object) -> bool:
        return self is other or self._refuse("compares")

    def __ne__(self, other: object) -> bool:
        return self is not other and self._refuse("compares")

    def __lt__(self, other: object) -> bool:
        self._refuse("compares")

    __gt__ = __le__ = __ge__ = __lt__

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self._refuse("copies")

    def _refuse(self, action: str) -> NoReturn:
        self._program.broken = f"the test {action} a {self._kind}, which is not plain data"
        raise NotPlain(self._program.broken)


class Stop(BaseException):
    """The end of an iterator of the program: only who has asked for its next item is told."""


def _exactly(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise Breach(f"{type(value).__name__} instead of {kind.__name__}")
    return value


class Program:
    """The program as the tests see it."""

    def __init__(self, link: Link, namespace: dict[str, Any]):
        self._link, self._namespace = link, namespace
        self._remotes: dict[int, Remote] = {}
        self._functions: list[Any] = []
        self.broken = ""
        """Why the test that runs fails, even if it catches what it was told."""

    def load(self, source: str) -> None:
        """Hands over the program. Raises as it does."""
        self._link.send(b"Q", source.encode("utf-8", "surrogatepass"))
        self._reply([], [])

    def ask(self, action: str, *rest: Any) -> Any:
        """The program's answer, as data. Arguments that it has changed in place are changed here."""
        known: list[Any] = []
        try:
            self._link.send(b"Q", encode((action, *rest), known, self._refer))
            return self._reply(known, list(known), stops=action == "next")
        except (NotPlain, Breach) as error:
            self.broken = self.broken or str(error)
            raise

    def _reply(self, known: list[Any], sent: list[Any], *, stops: bool = False) -> Any:
        kind, message = self._link.receive()
        while kind == b"Q":
            self._serve(message)
            kind, message = self._link.receive()
        status, *rest = _shape(decode(message, known, self._resolve), tuple)
        if status == "raised":
            names, text = rest
            if stops and "StopIteration" in names:
                raise Stop
            raise _exception(names, str(text))
        if status != "value":
            raise Breach("an answer of another form")
        value, changed = rest
        for item, content in zip(sent, _shape(changed, tuple), strict=False):
            try:
                if not _same(item, content):
                    fill(item, content)
            except (TypeError, ValueError):
                raise Breach("a change that cannot be made") from None
        return value

    def _serve(self, message: bytes) -> None:
        """A call of one of the tests' functions, with plain data."""
        known: list[Any] = []
        try:
            _, number, args, kwargs = decode(message, known, self._resolve)
            found = self._functions[number](*args, **kwargs)
            self._link.send(b"A", encode(("value", found), known, self._refer))
        except Exception as error:
            self._link.send(b"A", encode(("raised", f"{type(error).__name__}: {error}"[:500]), [], self._refer))

    def _resolve(self, letter: str, name: str) -> Any:
        if letter == "h":
            number, _, kind = name.partition(" ")
            return self._remotes.setdefault(int(number), Remote(self, int(number), kind[:50]))
        if letter == "c":
            return self._functions[int(name)]
        raise Breach("a name of a module")

    def _refer(self, item: Any) -> tuple[bytes, str]:
        if type(item) is Remote:
            return b"h", str(item._number)
        own = isinstance(item, types.FunctionType) and item.__globals__ is self._namespace
        if own or (isinstance(item, types.BuiltinMethodType) and type(item.__self__) in MUTABLE):
            self._functions.append(item)
            return b"c", str(len(self._functions) - 1)
        home = getattr(getattr(item, "__objclass__", item), "__module__", None)
        name = getattr(item, "__qualname__", None)
        if callable(item) and isinstance(home, str) and isinstance(name, str) and "<" not in name:
            found: Any = sys.modules.get(home)
            for part in name.split("."):
                found = getattr(found, part, None)
            if found is item:
                return b"g", f"{home}:{name}"
        raise NotPlain(f"the test hands over a {type(item).__name__}, which is not plain data")


def _shape(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise Breach("an answer of another form")
    return value


def _same(item: Any, content: Any) -> bool:
    """Whether an object has this content already; not certain where it has objects of the program."""
    try:
        return contents(item) == tuple(content)
    except NotPlain:
        return False


def _exception(names: Any, text: str) -> Exception:
    for name in _shape(names, tuple):
        kind = getattr(builtins, str(name), None)
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, NEVER):
            if kind is Exception:
                break
            try:
                return kind(text)
            except TypeError:
                break
    return ProgramError(f"{names[0] if names else ''}: {text}")


class Tests(NamedTuple):
    """What the tests of a program share."""

    program: Program
    namespace: dict[str, Any]
    own: set[str]
    """Names that the tests have defined so far."""
    modules: dict[str, tuple[str, str]]
    """Names that they have from `PURE` because the program imports them: name -> module, attribute."""
    like_pythons: bool
    """Whether what they test must be called like one of Python's own functions, as they use no other name."""


def share(program: Program, namespace: dict[str, Any], source: str, tests: Sequence[str]) -> Tests:
    """Prepares what the tests of a program share."""
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
    """Those that are Python's modules, whatever the program says."""


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
    """Those of the names that the program has, and what they are."""
    found = _shape(program.ask("names", tuple(sorted(wanted))), dict) if wanted else {}
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
    """What an exception says, in one short line that can be printed."""
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
