"""Eight CPU devices for every test, shapes checked in every call, this checkout's files, the folder of shared data."""

import atexit
import ctypes
import gc
import json
import os
import re
import shutil
import signal
import tempfile
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]

# The modules that say the shapes of arrays are checked in every call: before they are imported for the first time.
# Elsewhere mypy is enough, and a check at each row of data would take a tenth of the tests' time.
SHAPED = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "rlhf_jax").rglob("*.py")
    if "from jaxtyping import" in path.read_text(encoding="utf-8")
]
install_import_hook(SHAPED, "beartype.beartype")

# Workers and the processes that they start share compiled programs, and so does the next run.
COMPILED = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "xla"))
SLOW = os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
jax.config.update("jax_compilation_cache_dir", COMPILED)
jax.config.update("jax_persistent_cache_min_compile_time_secs", float(SLOW))

# Programs of tests are small and run a few times: their time is XLA's, most of it for speed that no test needs.
# A user's own flags stand.
GIVEN = os.environ.get("XLA_FLAGS", "")
QUICK = (
    "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
)  # fmt: skip
if jax.__version_info__ < (0, 12):  # XLA ends a process that gives it a flag that it does not know
    QUICK += ("--xla_cpu_use_fusion_emitters=false",)
os.environ["XLA_FLAGS"] = " ".join([GIVEN, *(flag for flag in QUICK if flag.partition("=")[0] not in GIVEN)]).strip()

# Each worker has its share of the cores: threads of two that wait for each other's cores take longer than one each.
WORKER, WORKERS = os.environ.get("PYTEST_XDIST_WORKER", ""), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKER and hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) >= WORKERS:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[int(WORKER.removeprefix("gw")) :: WORKERS])

# Before anything asks for a device: the number of devices is fixed from then on.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# A shell starts what it runs in the background with Ctrl-C ignored, and so would be all that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests leave nothing in the user's cache folder.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="rlhf-jax-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# The processes that a test starts import this checkout's files as the test does, whichever is installed.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of shared data sets beside the checkout; CI must have it, others may go without."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        message = f"the shared data sets are not at {folder}: put them there, or leave the tests that read them out"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def stories(tmp_path_factory, shared_data) -> str:
    """The folder of stories260K with two of its five layers: to compile all five is most of such a test's time."""
    source, folder = shared_data / "model" / "stories260K-hf", tmp_path_factory.mktemp("model") / "stories260K-hf"
    shutil.copytree(source, folder, copy_function=shutil.copyfile)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}), encoding="utf-8")
    weights = load_file(source / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not re.match(r"model\.layers\.[2-4]\.", name)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.fixture
def undrawn(monkeypatch):
    """A run's report has its pictures made but not drawn, a fifth of a small run's time. test_report.py draws all."""
    monkeypatch.setattr("rlhf_jax.figures._svg", lambda figure: "<svg></svg>")


def pytest_collection_finish():
    """What the imports have made stays: no collection of garbage looks through it again, and tracing makes much.

    Collections are rare, for the same reason: they took 6% of the time of tests that trace.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


KEPT, GROWTH = 1.1e9, 0.4e9
"""Bytes that a test process may hold when it goes from one test to the next, and more than after the last clearing."""
held = {"after the last clearing": 0.0}


def resident() -> float:
    """Bytes of memory that this process holds; 0 where the system does not tell."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0.0


@pytest.fixture(autouse=True)
def bounded_memory():
    """Gives compiled programs back: a process that keeps all of them grows to 3 GB and more. They stay on the disk."""
    yield
    if resident() > max(KEPT, held["after the last clearing"] + GROWTH):
        jax.clear_caches()
        gc.collect()
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc keeps what is freed, all the more after `keep_freed_memory`
            libc.malloc_trim(0)
        held["after the last clearing"] = resident()
