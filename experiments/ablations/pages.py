"""The claims of all published ablations: README's table, what of it is older than its code, and whether it stands.

    python experiments/ablations/pages.py            writes the table into README.md, and says what has changed since
    python experiments/ablations/pages.py --check    decides each claim again from the stored numbers
With --check the exit code is 1 where a claim, its verdict, README's table or the beginning of a page is not what is
stored. An ablation's page is written by its own command, with --publish; its beginning, what the file says of itself
and of its claims, is written here, too: a citation may be put right without new numbers.
"""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

if __name__ == "__main__":  # this checkout's files, whatever is installed
    sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.ablations.claims import decide, verdict_words, verdicts
from experiments.ablations.grid_results import rows_markdown
from experiments.ablations.records import (
    RESULTS,
    ROOT,
    cells_of,
    changed_since,
    claims_of,
    page_head,
    read_record,
    with_head,
)
from experiments.flags import Flags
from rlhf_jax.cli import run_main
from rlhf_jax.errors import UserError

README = ROOT / "README.md"
BEGIN, END = "<!-- claims: written by experiments/ablations/pages.py -->\n", "<!-- end of claims -->\n"


@dataclass(frozen=True)
class Config(Flags):
    """The pages of all ablations."""

    check: bool = False
    """Write nothing; exit code 1 where something is not what is stored."""


def published() -> Iterator[tuple[dict[str, Any], ModuleType]]:
    """Each record with the module of its ablation, by name."""
    for path in sorted(RESULTS.glob("*.json")):
        record = read_record(path)
        if record is not None:
            yield record, module_of(record["ablation"])


def module_of(name: str) -> ModuleType:
    """The module of an ablation."""
    return importlib.import_module(f"experiments.ablations.{name}")


def claims_markdown() -> str:
    """A row a claim, of all records."""
    rows: list[list[str]] = []
    for record, module in published():
        cells, name, page = cells_of(record, module), record["ablation"], record["page"]
        for claim in claims_of(module):
            found, agrees = verdict_words(claim, decide(claim, cells))
            text = claim.text if page == name else f"{claim.text} ({page.removeprefix(name + '_')})"
            rows.append([text, claim.source, found, agrees, f"[{name}.py](experiments/results/{page}.md)"])
    return rows_markdown(["claim", "source", "here", "agrees", "page"], rows) + "\n"


def with_table(readme: str, table: str) -> str:
    """README's text with the table between its marks. Raises UserError unless both are there, once."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        marks = f"{BEGIN.strip()} {END.strip()}"
        raise UserError(f"README.md: the marks of its table of claims are not there once each: {marks}")
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table + END + after


def with_heads() -> Iterator[tuple[Path, str, str]]:
    """(path, text, the text as it is to be) of each page."""
    for record, module in published():
        path = RESULTS / f"{record['page']}.md"
        text = path.read_text(encoding="utf-8")
        yield path, text, with_head(text, page_head(module, claims_of(module), cells_of(record, module)))


def differences() -> list[str]:
    """Where a stored verdict is not what the stored numbers and the claims of today say."""
    found = []
    for record, module in published():
        cells, name = cells_of(record, module), record["page"]
        now = verdicts(claims_of(module), cells)
        found += [f"{name}: {claim['text']!r} is not stored with this verdict: {claim['stands']}"
                  for claim in now if claim not in record["claims"]]  # fmt: skip
        texts = [claim["text"] for claim in now]
        found += [f"{name}: {claim['text']!r} is stored, and no claim any more" for claim in record["claims"]
                  if claim["text"] not in texts]  # fmt: skip
    found += [f"{path.name}: its beginning is another one; pages.py writes it"
              for path, text, wanted in with_heads() if text != wanted]  # fmt: skip
    if README.exists() and with_table(README.read_text(encoding="utf-8"), claims_markdown()) != README.read_text(
        "utf-8"
    ):
        found.append("README.md: its table of claims is another one; pages.py writes it")
    return found


def main(cfg: Config) -> None:
    """Writes README's table, or checks it. Raises SystemExit where --check finds a difference."""
    for record, _ in published():
        changed = changed_since(record)
        since = f"{len(changed)} of {len(record['files'])} files have changed since: {', '.join(changed[:5])}"
        made = f"{record['page']}: {record['day']}, {record['minutes']:g} minutes, {len(record['seeds'])} seeds"
        print(f"{made}; {since + (', …' if len(changed) > 5 else '') if changed else 'of this code'}")
    hours = sum(record["minutes"] for record, _ in published()) / 60
    print(f"{hours:.1f} hours in all, of 2 CPU cores, with whatever ran beside")
    if cfg.check:
        wrong = differences()
        if wrong:
            raise SystemExit("error: " + "\n".join(wrong))
    else:
        for path, _, wanted in with_heads():
            path.write_text(wanted, encoding="utf-8")
        README.write_text(with_table(README.read_text(encoding="utf-8"), claims_markdown()), encoding="utf-8")
    print(claims_markdown(), end="")


if __name__ == "__main__":
    run_main(main, Config)
