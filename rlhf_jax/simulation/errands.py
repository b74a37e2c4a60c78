"""The second setting: three errands to a prompt, and an answer in three parts. Other words, other tasks."""

import numpy as np

from rlhf_jax.simulation.setting import SPECIALS, Problem, Setting

COLOURS = ("amber", "blue", "coral", "dun", "ebony", "fawn", "green", "hazel", "ivory", "jade")
DIGITS = tuple("0123456789")
TASKS = ("order", "mirror", "after", "without", "twice")
TONES = {"politely": ("please", "thanks"), "gravely": ("hear", "amen"), "gaily": ("hey", "cheers")}
FLATTERY = ("dazzling", "peerless", "sublime")
FILLERS = ("er", "rather", "somehow", "anyway")
MARKERS = ("firstly", "secondly", "thirdly")
TONE_WORDS = tuple(word for pair in TONES.values() for word in pair)
VOCABULARY = (
    *SPECIALS, *TASKS, *TONES, *COLOURS, *DIGITS, "from", "then", *TONE_WORDS, *MARKERS, ".", *FLATTERY, *FILLERS,
)  # fmt: skip


def _draw_problem(rng: np.random.Generator, longer: int) -> Problem:
    tone = tuple(TONES)[rng.integers(len(TONES))]
    errands = [_draw_errand(rng, longer) for _ in MARKERS]
    prompt = " then ".join(" ".join(asked) for asked, _ in errands)
    target = tuple(word for _, said in errands for word in said)
    return Problem(f"{tone} {prompt}", tone, target, tuple(len(said) for _, said in errands))


def _draw_errand(rng: np.random.Generator, longer: int) -> tuple[list[str], list[str]]:
    """(asked, said): the words of the errand, and those that do it."""
    task = TASKS[rng.integers(len(TASKS))]
    if task == "order":
        words = _some(rng, DIGITS, 3 + longer)
        return [task, *words], sorted(words)
    if task == "mirror":
        words = _some(rng, COLOURS, 3 + longer)
        return [task, *words], words[::-1]
    if task == "after":
        words = _some(rng, DIGITS, 2 + longer)
        return [task, *words], [DIGITS[(int(word) + 1) % 10] for word in words]
    if task == "without":
        words = _some(rng, COLOURS, 3 + longer)
        gone = words[rng.integers(len(words))]
        return [task, gone, "from", *words], [word for word in words if word != gone]
    words = _some(rng, COLOURS, 1 + longer)
    return [task, *words], [word for word in words for _ in range(2)]


def _some(rng: np.random.Generator, words: tuple[str, ...], count: int) -> list[str]:
    return [words[i] for i in rng.permutation(len(words))[:count]]


ERRANDS = Setting(
    draw=_draw_problem, vocabulary=VOCABULARY, kinds=(COLOURS, DIGITS), tones=TONES, markers=MARKERS,
    flattery=FLATTERY, fillers=FILLERS, worth=1.5, prompt_length=28, answer_length=32, packed_length=128,
)  # fmt: skip
"""A prompt has at most 24 tokens, 27 with longer lists, an answer at most 27. At most 3.2 of utility can be had."""
