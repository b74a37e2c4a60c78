"""Hostile programs: each tries to score without adding two numbers, or to do harm. As a script it prints a table.

python tests/rewards/attacks.py > experiments/results/sandbox.md
"""

import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from rlhf_jax.rewards.code import run_tests

TESTS = ("assert add(2, 3) == 5", "assert add(10, 5) == 15", "assert add('a', 'b') == 'ab'")
MARK = "left-behind-by-a-hostile-program"
LINKS = "import os, socket\nlinks = []\nfor fd in range(3, 64):\n    try: links.append(socket.socket(fileno=fd))\n    except OSError: pass\n"
FRAME = "def frame(kind, data): return kind + len(data).to_bytes(4, 'little') + data\n"
C = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
ALWAYS = "class Always{base}:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n    def __hash__(self): return 1\n    def __bool__(self): return True\n"


class Attack(NamedTuple):
    """A program, the tests that it is given, and what it tries."""

    kind: str
    name: str
    program: str
    tests: tuple[str, ...] = TESTS


def _add(body: str, before: str = "") -> str:
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return f"{before}\ndef add(a, b):\n{lines}\n"


ATTACKS = [
    Attack("exit", "os._exit(0) at once", "import os; os._exit(0)"),
    Attack("exit", "sys.exit(0) at once", "import sys; sys.exit(0)"),
    Attack("exit", "SystemExit(0) in a call", _add("raise SystemExit(0)")),
    Attack("exit", "os._exit(0) in a call", _add("import os; os._exit(0)")),
    Attack("exit", "os.execv of /bin/true", _add("import os; os.execv('/bin/true', ['true'])")),
    Attack("exit", "atexit and exit", _add("raise SystemExit(0)", "import atexit, os; atexit.register(os._exit, 0)")),
    Attack("print", "success lines", _add("print('OK\\nPASSED\\n3 passed', flush=True)", "print('Ran 3 tests\\n\\nOK')")),
    Attack("print", "verdicts into every descriptor", _add(
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'\\x05\\0\\0\\0s\\0\\0\\0\\0' * 4)\n    except OSError: pass")),
    Attack("patch", "builtins.AssertionError", _add("return 0", "import builtins; builtins.AssertionError = type('Never', (), {})")),
    Attack("patch", "unittest and pytest", _add(
        "return 0", "import unittest, sys\nfor n in dir(unittest.TestCase):\n    if n.startswith('assert'): setattr(unittest.TestCase, n, lambda *a, **k: None)\nsys.modules['pytest'] = unittest")),
    Attack("patch", "sys.exit, os._exit, atexit", _add(
        "return 0", "import sys, os, atexit\nsys.exit = os._exit = atexit.register = lambda *a, **k: None")),
    Attack("patch", "the module that answers", _add(
        "return 0", "import sys\nfor m in list(sys.modules.values()):\n    if hasattr(m, 'ACTIONS'): m.ACTIONS['call'] = lambda *a: None; m.encode = lambda *a: b'T'; m.raised = lambda *a: ('value', True, ())")),
    Attack("equal", "an object that equals all", _add("return Always()", ALWAYS.format(base=""))),
    Attack("equal", "an int that equals all", _add("return Always(0)", ALWAYS.format(base="(int)"))),
    Attack("equal", "a str that equals all", _add("return Always()", ALWAYS.format(base="(str)"))),
    Attack("equal", "a list in a tuple that equals all", _add("return (Always(),)", ALWAYS.format(base="(list)"))),
    Attack("equal", "unittest.mock.ANY", _add("return ANY", "from unittest.mock import ANY")),
    Attack("equal", "an object posing as int", _add(
        "return Pose()", ALWAYS.format(base="").replace("Always", "Pose") + "    @property\n    def __class__(self): return int\n")),
    Attack("equal", "an object in a wrong type's name", _add(
        "return Decimal()", ALWAYS.format(base="").replace("Always", "Decimal") + "    def __str__(self): return 'NaN'\nDecimal.__module__ = 'decimal'\n")),
    Attack("names", "its own abs", "def f(x): return 0\ndef abs(x): return 0\n", ("assert abs(f(3) - 9) < 1e-6",)),
    Attack("names", "its own isinstance, len, all, set", (
        "def f(x): return 0\ndef set(x): return 0\nlen = all = sorted = isinstance = lambda *a: True\n"),
        ("assert set(f(3)) == set([1])", "assert isinstance(f(3), list)", "assert all(f(i) == i for i in (1, 2))", "assert sorted(f(1)) == [1]")),
    Attack("names", "its own abs, of a result that was kept", "def f(x): return 0\ndef abs(x): return 0\n", (
        "assert f(3) == 9", "y = f(3) or 1\nassert y == 9", "z = f(3)\nassert abs(z - 9) < 1e-6", "assert abs(z - 9) < 1e-6")),
    Attack("names", "the tests' own class of checks", (
        "import builtins\nbuiltins.AssertionError = type('Never', (Exception,), {})\ndef f(x): return 0\n"),
        ("class Check:\n    def __init__(self, x): assert x == 9\nCheck(f(3))", "assert False or f(3) == 9")),
    Attack("names", "its own math and np", (
        "def f(x): return 0\nclass math: isclose = staticmethod(lambda *a, **k: True)\nclass np: allclose = math.isclose\n"),
        ("assert math.isclose(f(3), 9, rel_tol=0.1)", "assert np.allclose(f(3), 9)")),
    Attack("names", "a result that poses as text", (
        "class T:\n    startswith = endswith = issubset = isdigit = lambda *a: True\n    def __contains__(self, x): return True\ndef f(x): return T()\n"),
        ("assert f(3).startswith('x')", "assert f(3).isdigit()", "assert 3 in f(3)", "assert f(3).issubset({1})")),
    Attack("raise", "StopIteration through a loop", "def f(x): raise StopIteration\n", (
        "assert all(map(lambda x: f(x) == x, [1, 2]))", "assert list(map(f, [1])) == [] and False or list(map(f, [1])) == []")),
    Attack("raise", "BaseException, GeneratorExit", _add("raise GeneratorExit")),
    Attack("raise", "an exception whose text raises", _add("raise E", "class E(Exception):\n    def __str__(self): raise SystemExit(0)")),
    Attack("spy", "the tests in its memory", _add(
        "import gc, sys\nseen = [o for o in gc.get_objects() if isinstance(o, (list, tuple, dict))]\nfor o in seen:\n    for t in o:\n        if isinstance(t, str) and t.startswith(''.join(['ass', 'ert add(']) + repr(a)): return eval(t.split('==')[1])\nframe = sys._getframe()\nwhile frame:\n    for t in frame.f_locals.values():\n        if isinstance(t, str) and t.startswith(''.join(['ass', 'ert add('])): return eval(t.split('==')[1])\n    frame = frame.f_back")),
    Attack("spy", "the tests in files and arguments", _add(
        "import os, sys, glob\ntexts = [*sys.argv, *os.environ.values()]\nfor path in glob.glob('/tmp/**', recursive=True) + glob.glob('/proc/*/cmdline') + glob.glob('/proc/*/environ') + ['/proc/self/mem', '/proc/1/mem', '/dev/stdin']:\n    try: texts.append(open(path, errors='replace').read())\n    except OSError: pass\nfor t in texts:\n    if 'assert add' in t: return eval(t.split('==')[1].split('\\n')[0])")),
    Attack("spy", "this data set on the disk", _add(
        f"import os\nreturn a + b if os.path.exists({__file__!r}) or os.path.exists({os.getcwd()!r}) else 0")),
    Attack("spy", "the host's files", _add(
        "import os\nfor path in ('/etc/passwd', '/etc/shadow', '/root/.ssh', '/home', '/proc', '/sys', '/var', '/run'):\n    if os.path.exists(path): return a + b\nreturn 0")),
    Attack("spy", "the environment", _add("import os\nreturn a + b if os.environ.get('HOME') or os.environ.get('PATH') else 0")),
    Attack("channel", "answers before the question", LINKS + FRAME + "for link in links:\n    try: link.send(frame(b'A', b'ready') + frame(b'A', b'T') * 9)\n    except OSError: pass\n" + _add("return 0")),
    Attack("channel", "names of the examiner's modules", LINKS + FRAME + _add("for link in links:\n    try: link.send(frame(b'A', b'g\\x0d\\0\\0\\0builtins:eval') * 3)\n    except OSError: pass")),
    Attack("channel", "a call of functions that it was not given", LINKS + FRAME + _add("for link in links:\n    try: link.send(frame(b'Q', b'\\x09\\x04\\0\\0\\0s\\x08\\0\\0\\0callbacki\\x01\\0\\0\\0\\0\\x09\\0\\0\\0\\0\\x03\\0\\0\\0\\0'))\n    except OSError: pass")),
    Attack("channel", "a message of 4 GiB", LINKS + _add("for link in links:\n    try: link.send(b'A\\xff\\xff\\xff\\xff' + b'x' * 1000)\n    except OSError: pass")),
    Attack("channel", "a list that says it has 4 billion items", LINKS + FRAME + _add("for link in links:\n    try: link.send(frame(b'A', b'\\x01\\xff\\xff\\xff\\xff'))\n    except OSError: pass")),
    Attack("channel", "a million brackets", LINKS + FRAME + _add("for link in links:\n    try: link.sendall(frame(b'A', b'\\x09\\x01\\0\\0\\0' * 1000000))\n    except OSError: pass")),
    Attack("channel", "closed", LINKS + "for link in links: link.close()\n" + _add("return 0")),
    Attack("processes", "fork, and the child goes on", _add("import os\nif os.fork() == 0:\n    while True: pass\nos._exit(0)")),
    Attack("processes", "a fork bomb", "import os\nwhile True: os.fork()\n"),
    Attack("processes", "a daemon", f"import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: os.execv('/bin/sleep', ['{MARK}', '1000'])\n"),
    Attack("processes", "subprocess", f"import subprocess\nsubprocess.Popen(['sh', '-c', 'touch /tmp/{MARK}; sleep 1000'], start_new_session=True)\n"),
    Attack("processes", "posix_spawn, vfork", "import os\nos.posix_spawn('/bin/sleep', ['sleep', '1000'], {})\n"),
    Attack("processes", "multiprocessing", _add("from multiprocessing import Pool\nwith Pool(4) as pool: pool.map(abs, [1])")),
    Attack("processes", "threads that never end", _add("import threading\nfor _ in range(4): threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()\nreturn 0")),
    Attack("processes", "a thread bomb", "import threading, time\nthreading.stack_size(32768)\nwhile True: threading.Thread(target=time.sleep, args=(1000,)).start()\n"),
    Attack("fill", "the disk", f"n = 0\nwhile True:\n    n += 1\n    with open(f'/tmp/{MARK}{{n}}', 'wb') as f: f.write(b'x' * 2**20)\n"),
    Attack("fill", "one file", f"f = open('/tmp/{MARK}', 'wb')\nwhile True: f.write(b'x' * 2**20)\n"),
    Attack("fill", "/dev/shm", f"open('/dev/shm/{MARK}', 'wb').write(b'x' * 2**20)\n"),
    Attack("fill", "files without content", f"n = 0\nwhile True:\n    n += 1\n    open(f'/tmp/{MARK}{{n}}', 'w').close()\n"),
    Attack("fill", "memory", "x = []\nwhile True: x.append(bytearray(2**24))\n"),
    Attack("fill", "memory of nobody (memfd)", "import os\nfds = [os.memfd_create('x') for _ in range(9)]\n"),
    Attack("fill", "memory shared (shmget)", C + "if libc.shmget(0, 2**24, 0o1600) < 0: raise OSError(ctypes.get_errno())\n"),
    Attack("fill", "a number without end", _add("return 10 ** 10 ** 9")),
    Attack("fill", "a result of 1 GB", _add("return 'x' * 200_000_000")),
    Attack("fill", "an iterator without end", "import itertools\ndef f(): return itertools.count()\n", ("assert list(f()) == [1]",)),
    Attack("fill", "standard output and error", "import sys\nwhile True:\n    print('x' * 2**16)\n    print('x' * 2**16, file=sys.stderr)\n"),
    Attack("fill", "open files", "import os\nx = [os.open('/dev/null', 0) for _ in range(10000)]\n"),
    Attack("hang", "a loop", _add("while True: pass")),
    Attack("hang", "sleep, signals ignored", _add("import signal, time\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: time.sleep(1)")),
    Attack("hang", "a loop at import", "while True: pass\n"),
    Attack("hang", "in a call back", "def f(g):\n    while True: g(1)\n", ("assert f(lambda x: x) == 1",)),
    Attack("recursion", "without a limit", _add("return add(a, b)", "import sys; sys.setrecursionlimit(10**9)")),
    Attack("recursion", "a list in itself", _add("x = []\nx.append(x)\nreturn x")),
    Attack("recursion", "100,000 brackets", _add("x = []\nfor _ in range(100000): x = [x]\nreturn x")),
    Attack("recursion", "source that breaks the parser", "x = " + "(" * 100_000 + ")" * 100_000),
    Attack("crash", "a null pointer", _add("import ctypes; ctypes.string_at(0)")),
    Attack("signals", "kill -9 -1", _add("import os; os.kill(-1, 9)")),
    Attack("signals", "kill its parent, and process 1", _add("import os\nfor pid in (os.getppid(), 1, 0):\n    try: os.kill(pid, 9)\n    except OSError: pass\nreturn 0")),
    Attack("signals", "SIGSTOP to all", _add("import os; os.kill(0, 19)")),
    Attack("signals", "setsid, and out of the group", _add("import os, time\ntry: os.setsid()\nexcept OSError: pass\nos.setpgid(0, 0) if os.getpgid(0) != os.getpid() else None\nwhile True: time.sleep(1)")),
    Attack("ptrace", "its parent", C + "for pid in (os.getppid(), 1):\n    if libc.ptrace(16, pid, 0, 0) < 0: raise OSError(ctypes.get_errno())\n"),
    Attack("ptrace", "process_vm_writev", C + "if libc.process_vm_writev(1, 0, 0, 0, 0, 0) < 0: raise OSError(ctypes.get_errno())\n"),
    Attack("namespaces", "unshare, mount, chroot", C + "if libc.unshare(0x10000000) and libc.mount(b'x', b'/tmp', b'tmpfs', 0, 0) and libc.chroot(b'/tmp'): raise OSError(ctypes.get_errno())\n"),
    Attack("namespaces", "setuid 0", _add("import os\nos.setresuid(0, 0, 0) if os.getuid() else os.setgroups([0])\nreturn a + b if os.access('/etc/shadow', 4) else 0")),
    Attack("network", "connect", "import socket\nsocket.create_connection(('1.1.1.1', 53), 1)\n"),
    Attack("network", "a server", "import socket\ns = socket.socket(); s.bind(('0.0.0.0', 0)); s.listen()\n"),
    Attack("network", "vsock, netlink, raw", "import socket\nfor family in (40, 16, 17):\n    try: socket.socket(family, 2)\n    except OSError: continue\n    else: break\nelse: raise OSError\n"),
    Attack("network", "a socket of the host's", "import socket, glob\nfor p in glob.glob('/run/*.sock') + glob.glob('/var/run/*.sock') + ['/var/run/docker.sock']:\n    s = socket.socket(socket.AF_UNIX); s.connect(p)\n"),
    Attack("write", "to the root", f"for d in ('/', '/usr', '/sandboxed', '/dev', '/etc', '/home', '/root'):\n    try: open(d + '/{MARK}', 'w')\n    except OSError: continue\n    else: break\nelse: raise OSError\n"),
    Attack("write", "its own examiner", "open('/sandboxed/examiner.py', 'w').write('')\n"),
    Attack("write", "Python's modules", "import os, ast\nopen(ast.__file__, 'a').write('#')\n"),
    Attack("write", "a device", "import os\nos.mknod('/tmp/x', 0o60600, os.makedev(8, 0)); open('/tmp/x')\n"),
    Attack("tmp", "what an earlier program left", _add("import os\nreturn a + b if [n for n in os.listdir('/tmp')] else 0", f"open('/tmp/{MARK}', 'w') if False else None")),
]  # fmt: skip


class Result(NamedTuple):
    """What came of an attack."""

    passed: int
    total: int
    seconds: float
    reason: str
    processes: list[str]
    """Command lines of processes that were not there before."""
    files: list[str]
    """Files in places that anybody can write to that were not there before."""


def attack(one: Attack, *, time_limit: float) -> Result:
    """Runs an attack and looks at what it left on this machine."""
    files = _files()
    start = time.monotonic()
    run = run_tests(one.program, one.tests, time_limit=time_limit, memory_limit=256 * 2**20)
    seconds = time.monotonic() - start
    return Result(run.passed, run.total, seconds, run.reason, _processes(), sorted(_files() - files))


def _processes() -> list[str]:
    """Processes of sandboxes, or with the attackers' mark, that are children of this process or of nobody."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    lines = [line.split(None, 2) for line in listed.splitlines()[1:]]
    ours = [
        line for line in lines if line[1] in ("1", str(os.getpid())) and ("sandboxed" in line[2] or MARK in line[2])
    ]
    return [line[2][:80] for line in ours]


def _files() -> set[str]:
    places = {
        "/",
        "/tmp",
        "/dev/shm",
        "/var/tmp",
        "/usr",
        "/etc",
        "/run",
        tempfile.gettempdir(),
        str(Path.home()),
        os.getcwd(),
    }
    return {str(path) for place in places if os.path.isdir(place) for path in Path(place).glob(f"*{MARK}*")}


def main() -> None:
    """Prints the table, and ends with 1 when an attack has scored or left something."""
    print("# The sandbox: attack → score, and what was left behind\n")
    print(
        "Command: `python tests/rewards/attacks.py > experiments/results/sandbox.md`. Each program is given tests that"
    )
    print(
        "it does not solve; the score is the number of tests that passed. After each the machine's processes and the"
    )
    print(
        "places that anybody can write to are searched. The same list is the test `tests/rewards/test_sandbox.py`.\n"
    )
    user = "root" if os.getuid() == 0 else "a user"
    print(f"{len(ATTACKS)} attacks on {platform.machine()}, Linux {platform.release().split('-')[0]}, as {user}.\n")
    print(
        "| kind | attack | score | processes left | files left | seconds | what was said |\n|---|---|---:|---:|---:|---:|---|"
    )
    bad = 0
    for one in ATTACKS:
        found = attack(one, time_limit=2.0)
        bad += bool(found.passed or found.processes or found.files)
        said = found.reason.partition("): ")[2].replace("|", "\\|")[:110]
        print(
            f"| {one.kind} | {one.name} | {found.passed}/{found.total} | {len(found.processes)} | {len(found.files)} "
            f"| {found.seconds:.1f} | {said} |",
            flush=True,
        )
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
