"""README.md of a saved model: what it is, and how it came about."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class ModelCard(NamedTuple):
    """The facts for a saved model's README.md: how the model was made. Only those that are given are written."""

    algorithm: str | None = None
    data: str | None = None
    base_model: str | None = None
    """A name on the hub, or a folder: of that the card has the name and the licence that lie in it, never the path."""
    metrics: Mapping[str, float] | None = None
    facts: Mapping[str, str] | None = None
    """More lines, such as versions and commit: `provenance.card_facts` has them from a run.json."""


def card_text(class_name: str, parameters: int, card: ModelCard) -> str:
    """The README.md of a model of that many parameters, with its YAML head."""
    base = hub_name(card.base_model)
    head = {"library_name": "transformers", "base_model": base, "license": license_of(card.base_model)}
    text = [f"A `{class_name}` of {parameters:,} parameters, in float32."]
    facts = {"Algorithm": card.algorithm, "Data": card.data, "Base model": base, **(card.facts or {})}
    text += [f"{what}: {value}" for what, value in facts.items() if value]
    if card.metrics:
        lines = ["| metric | value |", "|---|---|", *(f"| {k} | {v:.6g} |" for k, v in card.metrics.items())]
        text.append("\n".join(lines))
    matter = "\n".join(f"{name}: {json.dumps(value)}" for name, value in head.items() if value)
    return f"---\n{matter}\n---\n\n" + "\n\n".join(text) + "\n"


def hub_name(model: str | Path | None) -> str | None:
    """The model's name on the Hub, owner/model; None for a folder that does not say it.

    A folder says it in its config.json (_name_or_path), or in its README.md (base_model).
    """
    if model is None:
        return None
    folder = Path(model).expanduser()
    if not folder.exists():
        return _as_name(str(model))
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        named = None
    return _as_name(named) or _as_name(_front_matter(folder).get("base_model"))


def license_of(model: str | Path | None) -> str | None:
    """The licence that the README.md in a model's folder names, if there is one."""
    return None if model is None else _front_matter(Path(model).expanduser()).get("license")


def _as_name(text: object) -> str | None:
    """The text if it is owner/model and no folder here."""
    is_name = isinstance(text, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) and not Path(text).exists()
    return str(text) if is_name else None


def _front_matter(folder: Path) -> dict[str, str]:
    """Single-line fields of the YAML head of a folder's README.md; {} without one."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return {}
    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    fields = re.findall(r"^(\w+):[ \t]*(\S.*?)[ \t]*$", found[1], re.MULTILINE) if found else []
    return {name: value.strip("\"'") for name, value in fields}
