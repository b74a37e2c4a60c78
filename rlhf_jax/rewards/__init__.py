"""Scores of answers: reward models, functions of the user, checkers of sums, programs, forms and instructions, judges.

`math_reward` and the like are loaded when they are first asked for, so that this file imports nothing.
"""

import importlib
from typing import Any

HOMES = {
    "math_reward": "math",
    "strict_math_reward": "math",
    "code_reward": "code",
    "ifeval_reward": "ifeval",
    "tag_reward": "format",
    "boxed_reward": "format",
    "length_reward": "format",
    "repetition_reward": "format",
}
"""Functions with TRL's signature, and makers of such functions -> their modules."""


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
