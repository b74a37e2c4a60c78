"""The side of the program: it runs hostile code, and answers what the tests ask of it.

Whoever holds this process holds these answers and no more: expected values never come here, nor does the verdict.
"""

import importlib
import operator
import os
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

from rlhf_jax.rewards.sandboxed.limits import Limits, confine
from rlhf_jax.rewards.sandboxed.wire import Breach, Link, contents, decode, encode


class Callback:
    """A function of the tests, which is called there."""

    def __init__(self, number: int, call: Callable[..., Any]):
        self._number, self._call = number, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._number, args, kwargs)


class Objects:
    """The objects of the program that the tests know by number."""

    def __init__(self, callback: Callable[..., Any]):
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._callback = callback

    def refer(self, item: Any) -> tuple[bytes, str]:
        if type(item) is Callback:
            return b"c", str(item._number)
        number = self._numbers.setdefault(id(item), len(self._objects))
        if number == len(self._objects):
            self._objects.append(item)
        return b"h", f"{number} {type(item).__name__}"

    def resolve(self, letter: str, name: str) -> Any:
        if letter == "h":
            return self._objects[int(name)]
        if letter == "c":
            return Callback(int(name), self._callback)
        module, _, path = name.partition(":")
        return operator.attrgetter(path)(importlib.import_module(module))


def main(fd: int, limits: Limits, folders: list[str]) -> None:
    """Runs the program that comes first, then answers until the link ends."""
    sys.path.extend(folders)
    sys.argv[:] = ["solution"]
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's: each thread wants address space
    link = Link(socket.socket(fileno=fd))
    confine(limits)
    link.send(b"A", b"ready")
    source = link.receive()[1].decode("utf-8", "surrogatepass")
    module = types.ModuleType("solution")
    sys.modules[module.__name__] = module

    def callback(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known: list[Any] = []
        link.send(b"Q", encode(("callback", number, args, kwargs), known, objects.refer))
        kind, message = link.receive()
        while kind == b"Q":
            answer(message)
            kind, message = link.receive()
        status, value = decode(message, known, objects.resolve)[:2]
        if status == "raised":
            raise RuntimeError(str(value))
        return value

    def answer(message: bytes) -> None:
        known: list[Any] = []
        try:
            found = ACTIONS[(question := decode(message, known, objects.resolve))[0]](module.__dict__, *question[1:])
            changed = [contents(item) for item in known]
            reply = encode(("value", found, tuple(changed)), known, objects.refer)
            link.send(b"A", reply)
        except Breach:
            raise
        except BaseException as error:
            link.send(b"A", encode(raised(error), [], objects.refer))

    objects = Objects(callback)
    try:
        exec(compile(source, "program", "exec"), module.__dict__)
    except BaseException as error:
        link.send(b"A", encode(raised(error), [], objects.refer))
        return
    link.send(b"A", encode(("value", None, ()), [], objects.refer))
    while True:
        try:
            answer(link.receive()[1])
        except Breach:
            return


def raised(error: BaseException) -> tuple[str, tuple[str, ...], str]:
    """An exception of the program as data: the names of its classes, and a line."""
    try:
        text = str(error)
    except BaseException:
        text = ""
    names = tuple(kind.__name__ for kind in type(error).__mro__)
    return "raised", ("StopIteration",) if isinstance(error, StopIteration) else names, text[:500]


def names(namespace: dict[str, Any], wanted: tuple[str, ...]) -> dict[str, Any]:
    """The program's objects by name; without the names that it does not have."""
    return {name: namespace[name] for name in wanted if name in namespace}


def define(namespace: dict[str, Any], source: str) -> None:
    """Classes of the tests, which become the program's own."""
    exec(compile(source, "tests", "exec"), namespace)


def call(namespace: dict[str, Any], function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a function of the program."""
    return function(*args, **kwargs)


ACTIONS: dict[str, Callable[..., Any]] = {
    "names": names,
    "define": define,
    "call": call,
    "getattr": lambda _, item, name: getattr(item, name),
    "setattr": lambda _, item, name, value: setattr(item, name, value),
    "getitem": lambda _, item, key: item[key],
    "setitem": lambda _, item, key, value: operator.setitem(item, key, value),
    "delitem": lambda _, item, key: operator.delitem(item, key),
    "isinstance": lambda _, item, kind: isinstance(item, kind),
    "len": lambda _, item: len(item),
    "bool": lambda _, item: bool(item),
    "int": lambda _, item: int(item),
    "float": lambda _, item: float(item),
    "str": lambda _, item: str(item),
    "repr": lambda _, item: repr(item),
    "iter": lambda _, item: iter(item),
    "next": lambda _, item: next(item),
}
