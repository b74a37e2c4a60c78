"""The program as the tests see it: its plain data, and objects of which only it knows what they are."""

import builtins
import sys
import types
from collections.abc import Iterator
from typing import Any, NoReturn

from rlhf_jax.rewards.sandboxed.wire import MUTABLE, Breach, Link, NotPlain, contents, decode, encode, fill

VERDICTS = frozenset(
    name
    for kind in (str, bytes, set, int, float)
    for name in vars(kind)
    if name.startswith("is") or name in ("startswith", "endswith")
)
"""Methods of plain values that say yes or no: an object that only poses as one is not asked."""
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
        """The program's attribute. Raises AttributeError for one of Python's own (`__name__`)."""
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
        """The next item of an iterator. Raises StopIteration at its end."""
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
        status, *rest = shaped(decode(message, known, self._resolve), tuple)
        if status == "raised":
            names, text = rest
            if stops and "StopIteration" in names:
                raise Stop
            raise _exception(names, str(text))
        if status != "value":
            raise Breach("an answer of another form")
        value, changed = rest
        for item, content in zip(sent, shaped(changed, tuple), strict=False):
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


def shaped(value: Any, kind: type) -> Any:
    """The value, which must be exactly of this type. Raises Breach for any other."""
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
    for name in shaped(names, tuple):
        kind = getattr(builtins, str(name), None)
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, NEVER):
            if kind is Exception:
                break
            try:
                return kind(text)
            except TypeError:
                break
    return ProgramError(f"{names[0] if names else ''}: {text}")
