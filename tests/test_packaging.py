import os
import re
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
