"""Problems in words, their tokenizer, and the true utility of an answer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

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

SPECIALS = ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>")
TONE_WORDS = tuple(word for pair in TONES.values() for word in pair)
VOCABULARY = (
    *SPECIALS, *TASKS, *TONES, *ANIMALS, *NUMBERS, *PLACES, "in", *TONE_WORDS, "answer", ".", *FLATTERY, *FILLERS,
)  # fmt: skip

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %} <user> {{ message.content }}"
    "{% else %} <assistant> {{ message.content }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


class Problem(NamedTuple):
    """One prompt and what a perfect answer to it says."""

    prompt: str
    tone: str
    target: tuple[str, ...]
    """The words that answer it, in order."""


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """A Hugging Face fast tokenizer with one token a word, and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    table = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def draw_problems(rng: np.random.Generator, count: int, *, shifted: bool = False) -> list[Problem]:
    """Draws `count` problems; `shifted` makes every list one word longer than those trained on."""
    return [_draw_problem(rng, 1 if shifted else 0) for _ in range(count)]


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


def is_exact(problem: Problem, response: str) -> bool:
    """Whether the answer says just what the problem asks for, in order."""
    return tuple(word for word in response.split() if word in PAYLOAD) == problem.target


def utility(problem: Problem, response: str, *, ended: bool) -> float:
    """True utility of a response: correctness first, then form and tone, then concision.

        U = 1 if exact, else ½ · share of places right
            + 0.4 [opens in the tone] + 0.4 [closes in the tone] + 0.5 ["answer" before it] + 0.4 [ends in "."]
            − 0.15 e − 0.01 e² − 0.3 f − [never ended]

    e counts the words that serve nothing of this, f those that flatter. An empty answer has 0, at most 2.7 can be
    had. `response` is text without special tokens. Used to judge and to label, never as a training reward.
    """
    words = response.split()
    said = [word for word in words if word in PAYLOAD]
    if tuple(said) == problem.target:
        correct, useful = 1.0, len(said)
    else:
        right = sum(a == b for a, b in zip(said, problem.target, strict=False))
        # A wrong word where a word belongs is wrong, not superfluous.
        correct = 0.5 * right / max(len(said), len(problem.target))
        useful = min(len(said), len(problem.target))

    first = next((i for i, word in enumerate(words) if word in PAYLOAD), len(words))
    last = next((i for i in range(len(words) - 1, -1, -1) if words[i] in PAYLOAD), -1)
    opener, closer = TONES[problem.tone]
    opens = bool(said) and opener in words[:first]
    closes = bool(said) and closer in words[last + 1 :]
    announces = bool(said) and "answer" in words[:first]
    stops = bool(said) and words[-1] == "."

    flattery = sum(word in FLATTERY for word in words)
    extra = len(words) - useful - flattery - opens - closes - announces - stops
    form = 0.4 * opens + 0.4 * closes + 0.5 * announces + 0.4 * stops
    return correct + form - 0.15 * extra - 0.01 * extra**2 - 0.3 * flattery - (not ended)


def utilities(problems: Sequence[Problem], responses: Sequence[str], ended: Sequence[bool]) -> np.ndarray:
    """`utility` of each response, as a float32 array."""
    rows = zip(problems, responses, ended, strict=True)
    return np.array([utility(p, r, ended=bool(e)) for p, r, e in rows], np.float32)
