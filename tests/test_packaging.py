import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = [Requirement(line) for line in PROJECT["dependencies"]]
TEST_DEPENDENCIES = [Requirement(line) for line in PROJECT["optional-dependencies"]["test"]]
PINS = dict(line.split("==") for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines())

EXTRAS = {Requirement(line).name for extra in ("wandb", "server") for line in PROJECT["optional-dependencies"][extra]}


def canonical(name):
    return name.lower().replace("_", "-")


def test_constraints_are_names_and_public_versions_only():
    for name, version in PINS.items():
        assert re.fullmatch(r"[a-z0-9.-]+", name)
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), "a local version (+cpu) exists on one index only"


def test_every_dependency_has_a_lower_bound_and_a_tested_version_above_it():
    for requirement in DEPENDENCIES + TEST_DEPENDENCIES:
        (bound,) = requirement.specifier
        # torch is pinned: which version has a CPU build is known for one.
        assert bound.operator == ("==" if requirement.name == "torch" else ">="), requirement
        assert Version(PINS[canonical(requirement.name)]) >= Version(bound.version), requirement


def closure(requirements):
    """The distributions that a plain install brings: names, with what they need in turn."""
    found, todo = {}, list(requirements)
    while todo:
        requirement = todo.pop()
        extras = requirement.extras or {""}
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        name = canonical(requirement.name)
        if name in found and extras <= found[name]:
            continue
        found[name] = found.get(name, set()) | extras
        for line in importlib.metadata.requires(name) or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                needed.marker = None
                todo.append(needed)
    return found


def link(distributions, folder):
    """What these distributions brought, and nothing else, in a folder of its own."""
    for name in distributions:
        distribution = importlib.metadata.distribution(name)
        for top in {Path(file).parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))


def run_with(folder, program, *arguments):
    """Runs a program with this checkout and that folder, and no other packages."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    command = [sys.executable, "-S", "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def imported_anywhere():
    """The modules that files of ours import, inside functions too, without those of extras."""
    names = set()
    for folder in ("rlhf_jax", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    names.add(node.module)
    return sorted(name for name in names if name.partition(".")[0] not in EXTRAS)


EVERYTHING = """
import importlib, pkgutil, sys
import rlhf_jax, experiments
for package in (rlhf_jax, experiments):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
for name in sys.argv[1:]:
    importlib.import_module(name)
from rlhf_jax.tasks.simulated import Sizes, World
World(0, sizes=Sizes(demonstrations=8, validation=4, compared=4, heldout_pairs=4, prompts=8, heldout=4))
"""


def test_a_plain_install_has_all_that_the_experiments_need(tmp_path):
    link(closure(DEPENDENCIES), tmp_path)
    assert not (tmp_path / "torch").exists() and not (tmp_path / "pytest").exists()
    run_with(tmp_path, EVERYTHING, *imported_anywhere())


def test_the_equations_need_jax_and_jaxtyping_alone(tmp_path):
    link(closure([r for r in DEPENDENCIES if r.name in ("jax", "jaxtyping")]), tmp_path)
    assert not (tmp_path / "flax").exists() and not (tmp_path / "rich").exists()
    modules = ", ".join(f"rlhf_jax.{name}" for name in ("losses", "advantages", "kl", "logprobs", "masking"))
    run_with(tmp_path, f"import {modules}")


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert (ROOT / "rlhf_jax" / "py.typed").exists()


def test_ci_ends_in_pytest():
    path = ROOT / ".ci" / "run"
    lines = path.read_text().splitlines()
    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in lines
    assert lines[-1] == "CI=true python -m pytest"
