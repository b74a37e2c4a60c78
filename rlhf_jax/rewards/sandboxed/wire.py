"""Messages between a program and the tests of it: plain data, and numbers for what is not plain.

Plain are None, bool, int, float, complex, str, bytes, tuple, list, dict, set, frozenset, their kin in `collections`,
range, slice, Decimal, Fraction, and dates. The reader builds these types and no other: it imports nothing and calls
nothing that the writer names. Lists, sets and dicts that a message has twice, or that the message before had, stay one
object, so that a cycle can be sent and a change in place comes back.
"""

import socket
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

LARGEST = 8 * 2**20
"""Bytes of a message; a larger one is refused."""
COUNT = struct.Struct("<I")
DOUBLE = struct.Struct("<d")
MUTABLE: tuple[type, ...] = (list, dict, set, bytearray, deque, Counter, OrderedDict, defaultdict)
FROZEN: tuple[type, ...] = (tuple, frozenset)
CODES = {kind: bytes([number]) for number, kind in enumerate((*MUTABLE, *FROZEN), start=1)}
KINDS = {code[0]: kind for kind, code in CODES.items()}
SINGLE = {b"N": None, b"T": True, b"F": False, b"E": Ellipsis}
LETTERS = {type(None): b"N", type(Ellipsis): b"E"}
BASES: tuple[type, ...] = (int, float, complex, str, bytes, tuple, frozenset)
"""Types whose subclasses are sent as themselves: a named tuple is a tuple."""

Refer = Callable[[Any], tuple[bytes, str]]
"""A function that gives what stands for an object that is not plain: a letter of "hcg" and a name. Raises NotPlain."""
Resolve = Callable[[str, str], Any]


class NotPlain(BaseException):
    """Something that is not data: a test fails. No `except Exception` catches it."""


class Breach(BaseException):
    """The other side has ended, or does not speak as agreed."""


class Link:
    """One end of the conversation. Each side may ask; while it waits for an answer it answers what it is asked."""

    def __init__(self, end: socket.socket):
        self._end = end

    def send(self, kind: bytes, message: bytes) -> None:
        """Sends a question (Q) or an answer (A). Raises Breach when nobody reads, NotPlain for too much data."""
        if len(message) > LARGEST:
            raise NotPlain(f"{len(message)} bytes of data: more than {LARGEST}")
        try:
            self._end.sendall(kind + COUNT.pack(len(message)) + message)
        except OSError:
            raise Breach("the program has ended") from None

    def receive(self) -> tuple[bytes, bytes]:
        """A kind and a message. Raises Breach at the end."""
        head = self._read(5)
        size = COUNT.unpack(head[1:])[0]
        if size > LARGEST:
            raise Breach(f"a message of {size} bytes: more than {LARGEST}")
        return head[:1], self._read(size)

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            try:
                part = self._end.recv(min(size, 2**16))
            except OSError:
                part = b""
            if not part:
                raise Breach("the program has ended")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def encode(value: Any, known: list[Any], refer: Refer) -> bytes:
    """The bytes of a value. `known` has the mutable objects that both sides have already; new ones are added."""
    writer = _Writer(known, refer)
    writer.put(value)
    return b"".join(writer.out)


class _Writer:
    """Values as bytes, one after the other."""

    def __init__(self, known: list[Any], refer: Refer):
        self.out: list[bytes] = []
        self._known, self._refer = known, refer
        self._places = {id(item): number for number, item in enumerate(known)}

    def put(self, item: Any) -> None:
        """Adds the bytes of one value. Raises NotPlain where `refer` does."""
        kind = type(item)
        if kind in LETTERS:
            self.out.append(LETTERS[kind])
        elif kind is bool:
            self.out.append(b"T" if item else b"F")
        elif kind is int:
            self._data(b"i", item.to_bytes(item.bit_length() // 8 + 1, "little", signed=True))
        elif kind is float:
            self.out.append(b"f" + DOUBLE.pack(item))
        elif kind is str:
            self._data(b"s", item.encode("utf-8", "surrogatepass"))
        elif kind is bytes:
            self._data(b"b", item)
        elif kind in MUTABLE:
            if id(item) in self._places:
                self.out.append(b"r" + COUNT.pack(self._places[id(item)]))
                return
            self._places[id(item)] = len(self._known)
            self._known.append(item)
            content = contents(item)
            self._many(CODES[kind], content, len(content))
        elif kind in FROZEN:
            self._many(CODES[kind], item, len(item))
        elif kind is complex:
            self.out.append(b"x" + DOUBLE.pack(item.real) + DOUBLE.pack(item.imag))
        elif (parts := _parts(item)) is not None:
            self.out.append(b"v")
            self.put(parts)
        elif isinstance(item, BASES):
            base = next(base for base in BASES if isinstance(item, base))
            self.put(_base(base, item))
        elif kind.__module__ == "numpy" and getattr(item, "shape", None) == () and kind.__name__ != "ndarray":
            self.put(item.item())
        else:
            letter, name = self._refer(item)
            self._data(letter, name.encode())

    def _many(self, code: bytes, items: Iterable[Any], count: int) -> None:
        self.out.append(code + COUNT.pack(count))
        for item in items:
            self.put(item)

    def _data(self, code: bytes, content: bytes) -> None:
        self.out.append(code + COUNT.pack(len(content)) + content)


def decode(message: bytes, known: list[Any], resolve: Resolve) -> Any:
    """The value; adds to `known` as `encode` does. Raises Breach for anything that `encode` does not write."""
    reader = _Reader(message, known, resolve)
    try:
        value = reader.get()
    except (LookupError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise Breach(f"a message that cannot be read ({type(error).__name__})") from None
    if reader.position != len(message):
        raise Breach("a message that goes on after its end")
    return value


class _Reader:
    """A message, and the position up to which it is read."""

    def __init__(self, message: bytes, known: list[Any], resolve: Resolve):
        self.position = 0
        self._message, self._known, self._resolve = message, known, resolve

    def get(self) -> Any:
        """The next value. Raises Breach at the end of the message; other errors, such as LookupError, for nonsense."""
        code = self._take(1)
        if code in SINGLE:
            return SINGLE[code]
        if code == b"i":
            return int.from_bytes(self._take(self._number()), "little", signed=True)
        if code == b"f":
            return DOUBLE.unpack(self._take(8))[0]
        if code == b"x":
            return complex(DOUBLE.unpack(self._take(8))[0], DOUBLE.unpack(self._take(8))[0])
        if code == b"s":
            return self._take(self._number()).decode("utf-8", "surrogatepass")
        if code == b"b":
            return self._take(self._number())
        if code == b"r":
            return self._known[self._number()]
        if code == b"v":
            return _whole(self.get())
        if code in (b"h", b"c", b"g"):
            return self._resolve(code.decode(), self._take(self._number()).decode())
        kind = KINDS[code[0]]
        count = self._number()
        if kind in FROZEN:
            return kind([self.get() for _ in range(count)])
        new = defaultdict() if kind is defaultdict else kind()
        self._known.append(new)
        fill(new, [self.get() for _ in range(count)])
        return new

    def _number(self) -> int:
        return int(COUNT.unpack(self._take(4))[0])

    def _take(self, size: int) -> bytes:
        self.position += size
        if self.position > len(self._message):
            raise Breach("a message without its end")
        return self._message[self.position - size : self.position]


def contents(item: Any) -> tuple[Any, ...]:
    """The items, or pairs, from which `fill` makes the object again."""
    return tuple(item.items()) if isinstance(item, dict) else tuple(item)


def fill(item: Any, content: Iterable[Any]) -> None:
    """Gives a mutable object this content, whatever it had."""
    item.clear()
    if isinstance(item, dict):
        for key, value in content:
            item[key] = value
    elif isinstance(item, set):
        item.update(content)
    else:
        item.extend(content)


def _base(base: type, item: Any) -> Any:
    """An instance of a subclass as the plain type, by that type's own means: not by methods that it overrides."""
    if base is int:
        return int.__add__(item, 0)
    if base is float:
        return float.__add__(item, 0.0)
    if base is complex:
        return complex.__add__(item, 0)
    if base is tuple:
        return tuple(tuple.__iter__(item))
    if base is frozenset:
        return frozenset(frozenset.__iter__(item))
    return str.__add__(item, "") if base is str else bytes.__add__(item, b"")


def _parts(item: Any) -> tuple[Any, ...] | None:
    """Values of other plain types as a name and its arguments; None for any other object.

    Their modules are not imported here: an object of a type shows that its module is there.
    """
    kind = type(item)
    if kind is range or kind is slice:
        return kind.__name__, item.start, item.stop, item.step
    if kind.__module__ not in ("decimal", "fractions", "datetime"):
        return None
    if kind.__name__ == "Decimal":
        return "Decimal", str(item)
    if kind.__name__ == "Fraction":
        return "Fraction", item.numerator, item.denominator
    if kind.__name__ == "timedelta":
        return "timedelta", item.days, item.seconds, item.microseconds
    if kind.__name__ in ("date", "time", "datetime") and getattr(item, "tzinfo", None) is None:
        return kind.__name__, item.isoformat()
    return None


def _whole(parts: Any) -> Any:
    name, *values = parts
    if name in ("range", "slice"):
        start, stop, step = values
        return range(start, stop, step) if name == "range" else slice(start, stop, step)
    if name == "Decimal":
        from decimal import Decimal

        return Decimal(str(values[0]))
    if name == "Fraction":
        from fractions import Fraction

        return Fraction(int(values[0]), int(values[1]))
    import datetime

    if name == "timedelta":
        return datetime.timedelta(*(int(value) for value in values))
    kinds: dict[str, Any] = {"date": datetime.date, "time": datetime.time, "datetime": datetime.datetime}
    return kinds[name].fromisoformat(values[0])
