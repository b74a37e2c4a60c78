"""The first setting: one question in words to a prompt, and a short answer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlhf_jax.simulation.setting import SPECIALS, Problem, Setting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ANIMALS = ("ant", "bat", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay", "koi", "lynx")
NUMBERS = ("one", "two", "three", "four", "five", "six")
PLACES = ("first", "second", "third", "last")
TASKS = ("sort", "reverse", "count", "pick", "find")
# What each tone wants an answer to open and to close with.
TONES = {"kindly": ("sure", "friend"), "formally": ("indeed", "regards"), "plainly": ("so", "done")}
FLATTERY = ("brilliant", "wise", "genius")
FILLERS = ("well", "um", "perhaps", "basically")
PAYLOAD = frozenset(ANIMALS + NUMBERS)
TONE_WORDS = tuple(word for pair in TONES.values() for word in pair)
VOCABULARY = (
    *SPECIALS, *TASKS, *TONES, *ANIMALS, *NUMBERS, *PLACES, "in", *TONE_WORDS, "answer", ".", *FLATTERY, *FILLERS,
)  # fmt: skip


def _draw_problem(rng: np.random.Generator, longer: int) -> Problem:
    task = TASKS[rng.integers(len(TASKS))]
    tone = tuple(TONES)[rng.integers(len(TONES))]

    if task == "sort":
        words = _animals(rng, 3 + longer)
        target = sorted(words)
    elif task == "reverse":
        words = _animals(rng, 3 + longer)
        target = words[::-1]
    elif task == "count":
        words = _animals(rng, int(rng.integers(1, 5)) if not longer else 5)
        target = [NUMBERS[len(words) - 1]]
    elif task == "pick":
        items = _animals(rng, 4 + longer)
        place = PLACES[rng.integers(len(PLACES))]
        words = [place, "in", *items]
        target = [items[-1] if place == "last" else items[PLACES.index(place)]]
    else:
        keys = _animals(rng, 2 + longer)
        values = [NUMBERS[i] for i in rng.permutation(4)[: len(keys)]]
        which = rng.integers(len(keys))
        words = [keys[which], "in", *(word for pair in zip(keys, values, strict=True) for word in pair)]
        target = [values[which]]
    return Problem(" ".join([tone, task, *words]), tone, tuple(target))


def _animals(rng: np.random.Generator, count: int) -> list[str]:
    return [ANIMALS[i] for i in rng.permutation(len(ANIMALS))[:count]]


WORDS = Setting(
    draw=_draw_problem, vocabulary=VOCABULARY, kinds=(ANIMALS, NUMBERS[:4], NUMBERS), tones=TONES, markers=("answer",),
    flattery=FLATTERY, fillers=FILLERS, worth=1.0, prompt_length=16, answer_length=20, packed_length=64,
)  # fmt: skip
"""A prompt has at most 14 tokens, an answer at most 20. At most 2.7 of true utility can be had."""


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """A Hugging Face fast tokenizer with one token a word, and a chat template."""
    return WORDS.make_tokenizer()


def draw_problems(rng: np.random.Generator, count: int, *, shifted: bool = False) -> list[Problem]:
    """Draws `count` problems; `shifted` makes every list one word longer than those trained on."""
    return WORDS.draw_problems(rng, count, shifted=shifted)


def is_exact(problem: Problem, response: str) -> bool:
    """Whether the answer says just what the problem asks for, in order."""
    return WORDS.is_exact(problem, response)


def utility(problem: Problem, response: str, *, ended: bool) -> float:
    """True utility of a response; `Setting.utility`."""
    return WORDS.utility(problem, response, ended=ended)


def utilities(problems: Sequence[Problem], responses: Sequence[str], ended: Sequence[bool]) -> np.ndarray:
    """`utility` of each response, as a float32 array."""
    return WORDS.utilities(problems, responses, ended)
