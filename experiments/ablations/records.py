"""A grid after its run's folder is gone: its page, its figure, and the numbers that decide its claims.

`--publish` puts them into experiments/results/. A record has the hash of each file of this project that the run had
imported, so that a page can say what has changed since.
"""

import ast
import calendar
import hashlib
import inspect
import re
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.ablations.claims import Claim, claims_table, verdicts
from experiments.ablations.grid_results import Cells, Page, table_markdown, tables_markdown
from rlhf_jax.errors import UserError
from rlhf_jax.folder import read_json, write_json
from rlhf_jax.provenance import commit_in_words

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
FILES = "files.json"
"""A run's own: the code that it began with, which may be other code when it is resumed."""


def write_record(folder: Path, name: str, module: ModuleType, cells: Cells, page: Page, *, publish: bool) -> Path:
    """Writes page.md and record.json to a run's folder, and into the results under `name` to `publish`.

    Returns the page that was written last. Raises UserError for results to publish that leave a claim out.
    """
    sessions = read_json(folder / "run.json")["sessions"]
    claims, curves = claims_of(module), getattr(module, "CURVES", ())
    record = {
        "ablation": Path(str(module.__file__)).stem,
        "page": name,
        "seeds": list(cells.seeds),
        "variants": [variant._asdict() for variant in cells.variants],
        "cells": [
            {"seed": seed, "variant": cells.variants.index(variant), "values": kept_values(values, curves)}
            for (seed, variant), values in cells.values.items()
        ],
        "claims": verdicts(claims, cells),
        "minutes": round(minutes(sessions), 1),
        "commit": ", ".join(dict.fromkeys(map(commit_in_words, sessions))),
        "day": str(sessions[-1]["start"])[:10],
        "packages": {package: sessions[-1]["packages"][package] for package in ("jax", "numpy")},
        "devices": sessions[-1]["devices"],
        "files": read_json(folder / FILES),
    }  # fmt: skip
    text = page_text(name, module, record, claims, cells, page)
    (folder / "page.md").write_text(text, encoding="utf-8")
    write_json(folder / "record.json", record)
    if not publish:
        return folder / "page.md"
    if lacking := [one["text"] for one in record["claims"] if one["stands"] == "not made"]:
        raise UserError(f"{name} is not published: no cells were made that decide {lacking[0]!r}")
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    write_json(RESULTS / f"{name}.json", record)
    if page.panels:
        shutil.copyfile(folder / f"{name}.svg", RESULTS / f"{name}.svg")
    return RESULTS / f"{name}.md"


def page_text(
    name: str, module: ModuleType, record: dict[str, Any], claims: Sequence[Claim], cells: Cells, page: Page
) -> str:
    """The page: what the file says of itself, its claims, its figure and tables, and how they were made."""
    parts = [page_head(module, claims, cells)]
    if page.panels:
        parts.append(f"![{', '.join(panel.title for panel in page.panels)}]({name}.svg)")
    parts += ["## Numbers", tables_markdown(page, cells).strip()]
    line = shlex.join(["python", f"experiments/ablations/{record['ablation']}.py", *sys.argv[1:]])
    packages = ", ".join(f"{package} {version}" for package, version in record["packages"].items())
    parts.append(
        f"Written by `{line}` in {record['minutes']:g} minutes on {record['devices']}, {record['day']}; commit"
        f" {record['commit']}; {packages}."
    )
    return "\n\n".join(filter(None, parts)) + "\n"


def page_head(module: ModuleType, claims: Sequence[Claim], cells: Cells) -> str:
    """The beginning of a page: what the file says of itself, and its claims."""
    title, _, rest = inspect.cleandoc(module.__doc__ or module.__name__).partition("\n")
    said = re.sub(r"\n((?:    .*\n?)+)", r"\n\n\1\n", rest.strip() + "\n").strip()  # commands in a block of their own
    table = ["## Claims", table_markdown(claims_table(claims, cells))] if claims else []
    return "\n\n".join(filter(None, [f"# {title}", said, *table]))


def with_head(text: str, head: str) -> str:
    """A page with another beginning, before its figure or its numbers."""
    found = re.search(r"\n\n(?:!\[|## Numbers)", text)
    return head + text[found.start() :] if found else text


def claims_of(module: ModuleType) -> tuple[Claim, ...]:
    """The claims of an ablation; () where it has none."""
    return getattr(module, "CLAIMS", ())


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of a results file; None where it is another kind of file."""
    found = read_json(path)
    return found if isinstance(found, dict) and "ablation" in found else None


def cells_of(record: dict[str, Any], module: ModuleType) -> Cells:
    """A record's cells."""
    variants = tuple(module.Variant(**fields) for fields in record["variants"])
    values = {(cell["seed"], variants[cell["variant"]]): cell["values"] for cell in record["cells"]}
    return Cells(tuple(record["seeds"]), variants, values, {})


def kept_values(values: Any, curves: Sequence[str]) -> dict[str, Any]:
    """A cell's numbers, to six digits, with those of its curves that claims are decided by: the module's CURVES."""

    def short(x: Any) -> Any:
        return [short(one) for one in x] if isinstance(x, list) else None if x is None else float(f"{x:.6g}")

    return {name: short(x) for name, x in values.items() if name in curves or not isinstance(x, list)}


def minutes(sessions: Sequence[dict[str, Any]]) -> float:
    """Minutes of a run's sessions; the last one goes on until now, and one that was killed is not counted."""

    def seconds(stamp: str | None) -> float:
        return calendar.timegm(time.strptime(stamp, "%Y-%m-%dT%H:%M:%SZ")) if stamp else time.time()

    told = [one for one in sessions if one.get("end") or one is sessions[-1]]
    return sum(seconds(one.get("end")) - seconds(one["start"]) for one in told) / 60


def write_files(folder: Path) -> None:
    """Writes the hashes of this process's code to a run's folder, if they are not there."""
    if not (folder / FILES).exists():
        write_json(folder / FILES, imported_files())


def imported_files() -> dict[str, str]:
    """The files of this project that this process has imported, and a hash of the code of each."""
    paths = {Path(str(getattr(module, "__file__", None) or "")) for module in list(sys.modules.values())}
    own = sorted(path for path in paths if path.suffix == ".py" and path.is_relative_to(ROOT) and path.is_file())
    return {path.relative_to(ROOT).as_posix(): code_hash(path) for path in own}


def code_hash(path: Path) -> str:
    """A hash of a file's code: comments, docstrings and layout do not count."""
    return _code_hash(path, path.stat().st_mtime_ns)


@cache
def _code_hash(path: Path, _: int) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for name, some in ast.iter_fields(node):
            if isinstance(some, list) and some and isinstance(some[0], ast.stmt):
                setattr(node, name, [statement for statement in some if not is_text(statement)])
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:12]


def is_text(statement: ast.stmt) -> bool:
    """Whether a statement is a text alone: the docstring of a module, a function or a field."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def changed_since(record: dict[str, Any]) -> list[str]:
    """The files that a record rests on and that are others now, or gone."""
    return [name for name, was in record["files"].items()
            if not (ROOT / name).exists() or code_hash(ROOT / name) != was]  # fmt: skip
