"""The equations are cheap to import, and imports run one way."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import rlhf_jax

ROOT = Path(rlhf_jax.__file__).parent
LEVELS = (
    {"types", "arrays", "masking", "axes"},
    {"logprobs", "kl", "advantages"},
    {"losses"},
    {"hosts", "sharding", "clock", "compiled"},
    {"batches", "models", "sampling", "scoring", "rewards", "data", "diagnostics", "pretrained"},
    {
        "actor_critic",
        "budget",
        "adapters",
        "best_of_n",
        "constitution",
        "drawn",
        "frontier",
        "revision",
        "row_file",
        "ensemble",
        "export",
        "loop",
        "preference",
        "train",
        "checkpoint",
        "manifest",
        "signals",
        "metrics",
        "log",
        "folder",
        "screen",
        "trackers",
        "provenance",
        "evaluate",
        "simulation",
        "report",
        "figures",
        "page",
        "sections",
        "verdict",
        "optimizers",
    },
    {"tasks", "groups", "group_loop", "scored_groups"},
    {"cli"},
)
BASES = {"jax", "jaxtyping", "rlhf_jax"} | sys.stdlib_module_names
EQUATIONS = {"types", "arrays", "axes", "masking", "logprobs", "kl", "advantages", "losses"}
MEASURE = """
import json, sys, time
import jax
start = time.perf_counter()
import rlhf_jax.losses
print(json.dumps([time.perf_counter() - start, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def import_losses() -> tuple[float, list[str]]:
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    seconds, modules = json.loads(run.stdout)
    return seconds, modules


def test_the_equations_need_only_jax_and_add_less_than_half_a_second():
    runs = [import_losses() for _ in range(3)]
    heavy = {"flax", "optax", "transformers", "datasets", "grain", "torch"}
    assert not heavy & set(runs[0][1])
    assert min(seconds for seconds, _ in runs) < 0.5


HEAVY = {"torch", "transformers", "tokenizers", "datasets", "pyarrow", "orbax", "grain", "tensorboardX", "matplotlib"}
"""What `--help` does without: each takes up to two seconds, and is imported where it is used."""
MAKERS = {"figures", "page", "data.iterators"}
"""The modules that draw with matplotlib, or whose classes are made from grain's. Functions import them."""
LIGHT = """
import importlib, sys
for name in sys.argv[2:]:
    importlib.import_module(name)
    if found := {*sys.argv[1].split(",")} & {*sys.modules}:
        sys.exit(f"{name} imports {', '.join(sorted(found))}")
"""


def test_nothing_that_is_heavy_is_imported_before_it_is_used():
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in FILES} - MAKERS
    library = [f"rlhf_jax.{name}" for name in sorted(names)]
    scripts = sorted(path.relative_to(ROOT.parent) for path in (ROOT.parent / "experiments").rglob("[a-z]*.py"))
    experiments = [".".join(path.with_suffix("").parts) for path in scripts]
    for modules in (library, experiments):
        run = subprocess.run([sys.executable, "-c", LIGHT, ",".join(HEAVY), *modules], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


def modules_imported(source: str) -> set[str]:
    """Absolute dotted names, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from rlhf_jax import kl` names a module, `from rlhf_jax.kl import kl_k1` names what is in one.
            names |= {f"rlhf_jax.{a.name}" for a in node.names} if node.module == "rlhf_jax" else {node.module}
    return names


def level(part: str) -> int:
    return next(i for i, parts in enumerate(LEVELS) if part in parts)


def broken_arrows(part: str, source: str) -> list[str]:
    found = []
    for name in sorted(modules_imported(source)):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top == "experiments" or (part in EQUATIONS and top not in BASES):
            found.append(f"{part} imports {name}")
        elif top == "rlhf_jax" and target == "errors":
            if part in EQUATIONS:
                found.append(f"{part} imports {name}")
        elif top == "rlhf_jax" and target and (part == "errors" or level(target) > level(part)):
            found.append(f"{part} imports {name}")
    return found


FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_run_one_way(path):
    part = path.parts[0].removesuffix(".py")
    assert part == "errors" or any(part in parts for parts in LEVELS), f"{part} has no place in the order of imports"
    assert broken_arrows(part, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "part, source",
    [
        ("masking", "from rlhf_jax.kl import kl_k1"),
        ("kl", "def f():\n    from rlhf_jax import losses"),
        ("losses", "import rlhf_jax.models.heads"),
        ("losses", "import optax"),
        ("advantages", "def f():\n    import numpy as np"),
        ("losses", "from rlhf_jax.errors import UserError"),
        ("models", "from rlhf_jax.train import x"),
        ("errors", "from rlhf_jax.masking import masked_sum"),
        ("train", "from experiments.ppo import main"),
    ],
)
def test_an_arrow_the_wrong_way_is_seen(part, source):
    assert broken_arrows(part, source)
