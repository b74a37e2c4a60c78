"""Whether two formulas are equal, by math-verify: https://github.com/huggingface/Math-Verify.

Worker processes load this file. Math-verify's own time limits are signals, which only a main
thread may set. They are off, and the process is killed.
"""

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import math_verify

logging.getLogger("math_verify").setLevel(logging.ERROR)


def equal(prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str]) -> list[float]:
    """1 where a completion is the answer, otherwise 0: both are LaTeX, without the dollars around it."""
    return [float(_equal(one, other)) for one, other in zip(answer, completions, strict=True)]


def _equal(right: str, given: str) -> bool:
    gold, found = _parse(right), _parse(given)
    return bool(gold and found) and bool(math_verify.verify(gold, found, timeout_seconds=None))


@lru_cache(maxsize=4096)
def _parse(text: str) -> Any:
    # In \boxed, and not between dollars: some formulas have dollars in them.
    forms = [math_verify.LatexExtractionConfig()]
    return math_verify.parse(
        f"\\boxed{{{text}}}", forms, parsing_timeout=None, fallback_mode="no_fallback", extraction_mode="first_match"
    )
