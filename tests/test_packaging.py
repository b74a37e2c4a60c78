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


EVERYTHING = """
import importlib, pkgutil
import rlhf_jax, experiments
for package in (rlhf_jax, experiments):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
from experiments.setting import world_setting
world_setting(0)
"""


def test_a_plain_install_has_all_that_the_experiments_need(tmp_path):
    # Only what a plain install brings is linked into a folder of its own: torch and the test tools are not there.
    for name in closure(DEPENDENCIES):
        distribution = importlib.metadata.distribution(name)
        for top in {Path(file).parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (tmp_path / top).exists():
                (tmp_path / top).symlink_to(distribution.locate_file(top))
    assert not (tmp_path / "torch").exists() and not (tmp_path / "pytest").exists()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run([sys.executable, "-S", "-c", EVERYTHING], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


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
