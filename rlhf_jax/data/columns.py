"""Columns beside those of a format: used by every format, refused by name, or not read."""

from collections.abc import Iterable, Mapping
from typing import Any

from rlhf_jax.data.rejects import BadRow

SYSTEM = ("system", "system_prompt", "system_message")
"""Columns with the system's text, in front of the conversation."""
HISTORY = "history"
"""A column with earlier turns, as LLaMA-Factory's: pairs of a user's words and the answer to them."""
TOOLS = ("tools", "functions")
COMMON = (*SYSTEM, HISTORY, *TOOLS)
"""Columns that every format of conversations reads."""

UNSUPPORTED = {
    **dict.fromkeys(("images", "image", "videos", "video", "audios", "audio"), "only text is learned"),
    "chat_template_kwargs": "the chat template is given no arguments of a row",
    "chat_template": "the chat template is the tokenizer's",
    "documents": "the chat template is given no documents",
}
"""Columns that would change what the model is given, and why they cannot."""
WEIGHTS = (
    "weight", "weights", "sample_weight", "loss_weight", "loss_mask", "loss_masks", "loss_scale", "mask",
    "assistant_mask", "assistant_masks", "completion_mask",
)  # fmt: skip
"""Columns that would change how much of a row is learned."""
BETWEEN = ("margin", "probability")
"""Columns that are between a chosen and a rejected answer."""
VERDICTS = ("label", "kto_tag")
"""Columns that say whether an answer is a good one."""
SHOWN = 8
"""Names of columns that a note has."""


def given(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column; None where it is empty, for no form of files tells the two apart."""
    value = row.get(name)
    empty = value is None or (isinstance(value, str) and not value.strip()) or value == [] or value == {}
    return None if empty else value


def refuse(row: Mapping[str, Any], kind: str, read: Iterable[str]) -> None:
    """Raises BadRow for a column that means something and is not used; `read` are the columns that are.

    Columns beside a prompt are for rewards: of those only what would change the prompt is refused.
    """
    read = set(read)
    for name, reason in UNSUPPORTED.items():
        if name not in read and given(row, name) is not None:
            raise BadRow(f"column {name!r} cannot be used: {reason}; take it out of the row")
    for name in COMMON:
        if name not in read and given(row, name) is not None:
            raise BadRow(f"column {name!r} cannot be used in this format; take it out of the row")
    if kind == "prompts":
        return
    for name in WEIGHTS:
        if name not in read and given(row, name) is not None and not _is_one(row[name]):
            raise BadRow(
                f"column {name!r} cannot be used: rows count alike; an answer that is not to be learned is marked by"
                ' "weight": 0 in its message'
            )
    for name in VERDICTS:
        if name not in read and isinstance(row.get(name), bool) and kind == "demonstrations":
            raise BadRow(
                f"column {name!r} says whether the answer is good, and a demonstration is learned whatever it says;"
                " take it out, or give prompt, completion and label as --unpaired"
            )
    for name in BETWEEN:
        if kind == "comparisons" and name not in read and given(row, name) is not None:
            raise BadRow(f"column {name!r} cannot be used: it is between two answers, chosen and rejected")


def not_read(row: Mapping[str, Any], kind: str, read: Iterable[str], others: Iterable[str] = ()) -> str:
    """A note that names the columns of a row that nothing reads, and others; empty without any."""
    if kind == "prompts":  # rewards read them
        return ""
    read = {*read, *COMMON}
    names = [*sorted(str(name) for name in row if name not in read and given(row, name) is not None), *others]
    some = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
    return f"columns not read: {some}" if names else ""


def _is_one(value: Any) -> bool:
    return isinstance(value, int | float) and value == 1
