"""What an install brings, what type checkers find of it, and which files a script of a checkout runs."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from setuptools import build_meta

import rlhf_jax

ROOT = Path(__file__).parents[1]
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
OURS = {"rlhf_jax", "experiments"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What an install reads of a checkout, and the experiments beside it."""
    ignore = shutil.ignore_patterns("__pycache__", "results")
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("rlhf_jax", "experiments", ".src"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def build(checkout, kind, folder, monkeypatch):
    monkeypatch.chdir(checkout)
    return folder / getattr(build_meta, f"build_{kind}")(str(folder))


def test_the_wheel_holds_one_package_with_its_types(checkout, tmp_path, monkeypatch):
    names = zipfile.ZipFile(build(checkout, "wheel", tmp_path, monkeypatch)).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"rlhf_jax"}
    inside = {str(path.relative_to(ROOT)) for path in (ROOT / "rlhf_jax").rglob("*.py")}
    data = {"rlhf_jax/py.typed", "rlhf_jax/constitution.json"}
    assert inside | data == {name for name in names if name.startswith("rlhf_jax/")}


@pytest.fixture
def user(checkout, tmp_path, monkeypatch):
    """A user's project, whose environment has an editable install of the checkout: its folder and its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (packages,) = (tmp_path / "venv" / "lib").glob("*/site-packages")
    zipfile.ZipFile(build(checkout, "editable", tmp_path, monkeypatch)).extractall(packages)
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    return project, tmp_path / "venv" / "bin" / "python"


def output(*command, environment=CLEAN):
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.stdout + done.stderr


def test_an_editable_install_leads_to_the_package_alone(user, checkout):
    _, python = user
    found = output(python, "-c", "import rlhf_jax as package; print(package.__version__, package.__file__)").split()
    assert (
        found[0] == rlhf_jax.__version__
        and Path(found[1]).resolve() == (checkout / "rlhf_jax" / "__init__.py").resolve()
    )
    for name in ("experiments", "tests", "tpu"):
        assert f"No module named '{name}'" in output(python, "-c", f"import {name}")


def test_a_users_own_folder_of_experiments_stays_theirs(user):
    project, python = user
    (project / "experiments").mkdir()
    (project / "experiments" / "mine.py").write_text("print('mine')")
    assert output(python, "-c", "import experiments.mine") == "mine\n"


def test_type_checkers_find_the_types_of_an_editable_install(user):
    project, python = user
    (project / "mine.py").write_text("from rlhf_jax.errors import at_least\nreveal_type(at_least)\nat_least()\n")
    said = output(sys.executable, "-m", "mypy", "--python-executable", python, "mine.py")
    assert "Cannot find implementation" not in said
    assert 'note: Revealed type is "def (cfg: Any' in said
    assert 'error: Missing positional argument "cfg"' in said


def imports(path):
    """The top level names that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


FILES = sorted(path for folder in ("experiments", "tpu") for path in (ROOT / folder).rglob("*.py"))
SCRIPTS = [path for path in FILES if "\nif __name__ == " in path.read_text() and OURS & set(imports(path))]


def beginning(path):
    """A script up to where it first imports a package that is not of Python's own library, or else up to its end."""
    for node in ast.parse(path.read_text()).body:
        name = ""
        if isinstance(node, ast.Import | ast.ImportFrom):
            name = (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).partition(".")[0]
        runs = isinstance(node, ast.If) and "run_main" in ast.unparse(node)
        if runs or (name and name not in sys.stdlib_module_names):
            return "".join(path.read_text().splitlines(keepends=True)[: node.lineno - 1])
    raise AssertionError(f"{path} runs nothing")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_script_runs_the_files_of_its_own_checkout(path, tmp_path):
    """Where another checkout is installed: the script's beginning in one, and PYTHONPATH leads to the other."""
    for clone in ("mine", "installed"):
        for package in OURS:
            (tmp_path / clone / package).mkdir(parents=True)
            (tmp_path / clone / package / "__init__.py").write_text(f"CLONE = {clone!r}")
    script = tmp_path / "mine" / path.relative_to(ROOT)
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(beginning(path) + "import rlhf_jax, experiments\nprint(rlhf_jax.CLONE, experiments.CLONE)\n")
    environment = CLEAN | {"PYTHONPATH": str(tmp_path / "installed")}
    assert output(sys.executable, script, environment=environment) == "mine mine\n"


def test_no_script_has_the_name_of_a_module_of_pythons_own():
    """A script's folder comes first where Python looks for modules: a profile.py there hides the standard one."""
    names = {path.stem for path in [*FILES, *(ROOT / "tests").rglob("*.py")]} - {"__init__"}
    assert not names & sys.stdlib_module_names
