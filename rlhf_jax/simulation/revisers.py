"""Assistants of the controlled world that criticise and revise answers, with the operations of its demonstrators."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_jax.constitution import Principle
from rlhf_jax.simulation.people import mistake
from rlhf_jax.simulation.setting import Problem
from rlhf_jax.simulation.world import FILLERS, FLATTERY, PAYLOAD, TONES, is_exact

PRINCIPLES = tuple(
    Principle(name, f"say where the answer {fault}", f"write it again {cure}")
    for name, fault, cure in (
        ("right", "is wrong", "with what was asked for"),
        ("tone", "is not in the tone that was asked for", "in that tone"),
        ("form", "does not announce itself or end in a full stop", "with both"),
        ("short", "has words that say nothing", "without them"),
        ("honest", "flatters", "without flattery"),
    )
)
"""The principles of the world: the parts of the true utility."""


@dataclass(frozen=True)
class Revisers:
    """Assistants that see some of an answer's faults, and now and then add one."""

    notice: float = 0.7
    """Probability that a fault which the principle is about is seen, and repaired."""
    slip: float = 0.03
    """Probability that a revision has a mistake of its own."""

    def revise(self, rng: np.random.Generator, problem: Problem, answer: str, principle: Principle) -> tuple[str, str]:
        """(critique, revision) of one answer by a principle of PRINCIPLES. Raises KeyError for another one."""
        words = answer.split()
        better = REPAIRS[principle.name](problem, words)
        seen = better != words and rng.random() < self.notice
        if seen:
            words = better
        if rng.random() < self.slip:
            words = _with_mistake(rng, problem, words)
        return ("the answer " + principle.critique.partition("where the answer ")[2] if seen else "nothing is wrong",
                " ".join(words))  # fmt: skip


def _right(problem: Problem, words: Sequence[str]) -> list[str]:
    if is_exact(problem, " ".join(words)):
        return list(words)
    at = next((i for i, word in enumerate(words) if word in PAYLOAD), len(words))
    before, after = ([word for word in some if word not in PAYLOAD] for some in (words[:at], words[at:]))
    return [*before, *problem.target, *after]


def _in_tone(problem: Problem, words: Sequence[str]) -> list[str]:
    opener, closer = TONES[problem.tone]
    said = [word for word in words if word not in (opener, closer)]
    stop = said[-1:] == ["."]
    return [opener, *(said[:-1] if stop else said), closer, *["."] * stop]


def _in_form(problem: Problem, words: Sequence[str]) -> list[str]:
    said = [word for word in words if word not in ("answer", ".")]
    at = next((i for i, word in enumerate(said) if word in PAYLOAD), len(said))
    return [*said[:at], "answer", *said[at:], "."]


def _short(problem: Problem, words: Sequence[str]) -> list[str]:
    return [word for word in words if word not in FILLERS]


def _honest(problem: Problem, words: Sequence[str]) -> list[str]:
    return [word for word in words if word not in FLATTERY]


REPAIRS = {"right": _right, "tone": _in_tone, "form": _in_form, "short": _short, "honest": _honest}
"""Principle -> the answer without that fault; the same words where there is none."""


def _with_mistake(rng: np.random.Generator, problem: Problem, words: Sequence[str]) -> list[str]:
    wrong = iter(mistake(rng, problem.target))
    return [next(wrong, word) if word in PAYLOAD else word for word in words]
