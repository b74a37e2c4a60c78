"""The program of a worker process: it loads a user's reward function and calls it, one request at a time.

`workers.py` runs this file as a script. It imports the standard library alone: nothing of rlhf_jax, and no jax.
What the function prints goes to standard error, so that it cannot get between the replies.
"""

import fcntl
import inspect
import os
import resource
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

Reply = tuple[str, Any]
"""("scores", floats and None), ("raised", a line) for an error of the function, ("refused", a line) for wrong use."""


class Setup(NamedTuple):
    """The facts that a worker is told once. They are sent as a plain tuple."""

    path: str
    name: str
    source: bytes
    """The file as it was when the run began: a worker that starts later runs the same."""
    memory: int | None
    import_from: str
    """A folder to import from beside the file's own: the one that holds rlhf_jax."""


def main(link_fd: int, life_fd: int) -> None:
    """Answers requests until the parent closes the link, or ends."""
    for fd in (link_fd, life_fd):
        os.set_inheritable(fd, False)
    end_with_parent(life_fd)
    link = Connection(link_fd)
    setup = Setup(*link.recv())
    limit_memory(setup.memory)
    try:
        function = load(setup)
    except BaseException as error:
        link.send(("refused", error.args[0] if isinstance(error, NoFunction) else describe(error, setup.path)))
        return
    link.send(("loaded", None))
    while True:
        try:
            request = link.recv()
        except EOFError:
            return
        link.send(call(function, setup.path, *request))


def end_with_parent(life_fd: int) -> None:
    """Kills this process and its children when the parent is gone, whatever they are doing then.

    The parent holds the other end of a pipe to which it never writes. A thread waits for its end; the signal SIGIO,
    whose default is to end a process, comes also where the function never gives up Python's lock.
    """

    def wait() -> None:
        os.read(life_fd, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
    fcntl.fcntl(life_fd, fcntl.F_SETOWN, -os.getpgid(0))
    fcntl.fcntl(life_fd, fcntl.F_SETFL, fcntl.fcntl(life_fd, fcntl.F_GETFL) | os.O_ASYNC)


def limit_memory(size: int | None) -> None:
    """At most `size` bytes of address space; and where the machine runs out, the system ends a worker first."""
    if size is not None:
        resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass  # not Linux


class NoFunction(Exception):
    """The file has no such function; the message says in one line why."""


def load(setup: Setup) -> Callable[..., Any]:
    """Runs the file and returns the function that `setup` names.

    Raises NoFunction when the file has no such function, and whatever the file itself raises.
    """
    own = [setup.import_from] if setup.import_from not in sys.path else []
    sys.path[:0] = [os.path.dirname(setup.path), *own]
    module = types.ModuleType("reward_file")
    module.__file__ = setup.path
    sys.modules[module.__name__] = module
    exec(compile(setup.source, setup.path, "exec"), module.__dict__)
    found = vars(module).get(setup.name)
    if found is None:
        others = [n for n, value in vars(module).items() if inspect.isfunction(value) and not n.startswith("_")]
        raise NoFunction(f"there is no {setup.name!r}; it has {', '.join(others) or 'no functions'}")
    if not callable(found):
        raise NoFunction(f"{setup.name!r} is {type(found).__name__}, not a function")
    return found


def call(
    function: Callable[..., Any], path: str, prompts: Sequence, completions: Sequence, columns: Mapping[str, Sequence]
) -> Reply:
    """One call of the function, and what came of it."""
    given = {"prompts": prompts, "completions": completions, **columns}
    wanted, missing = accepted(function, given)
    if missing:
        names = ", ".join(map(repr, missing))
        hint = "--prompts-columns NAME=COLUMN gives a column a name"
        return "refused", f"it asks for {names}, which the rows do not have; they have {', '.join(given)}; {hint}"
    try:
        result = function(**{name: given[name] for name in wanted})
    except BaseException as error:
        return "raised", describe(error, path)
    return checked(result, len(completions))


def accepted(function: Callable[..., Any], given: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Names of what the function takes of `given`, and of what it needs beside that."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions written in C have none
        return list(given), []
    free = {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    named = [parameter for parameter in parameters if parameter.kind not in free]
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    wanted = list(given) if takes_all else [parameter.name for parameter in named if parameter.name in given]
    missing = [p.name for p in named if p.default is inspect.Parameter.empty and p.name not in given]
    return wanted, missing


def checked(result: Any, count: int) -> Reply:
    """The function's result as floats and None. Anything else is refused, and a list that is not `count` long."""
    if isinstance(result, str | bytes | Mapping) or not (hasattr(result, "__len__") and hasattr(result, "__iter__")):
        return "refused", f"it returned {type(result).__name__}, not a list of numbers"
    values = list(result)
    if len(values) != count:
        return "refused", f"it returned {len(values)} scores for {count} answers"
    scores: list[float | None] = []
    for number, value in enumerate(values):
        try:
            scores.append(None if value is None else float(type(value).__float__(value)))
        except OverflowError:
            scores.append(float("inf"))
        except Exception:
            shown = repr(value)[:80]
            return "refused", f"item {number} of what it returned is {type(value).__name__} {shown}, not a number"
    return "scores", scores


def describe(error: BaseException, path: str) -> str:
    """The last line of the traceback, after the line of the user's file that it leads through last."""
    said = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines.append(error.lineno)
    return f"line {lines[-1]}: {said}" if lines else said


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
