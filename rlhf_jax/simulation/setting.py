"""A setting of the controlled world: its words, how problems are drawn, and the true utility of an answer.

What people write and prefer, and the task that experiments see, know a setting by this interface alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>")
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
    parts: tuple[int, ...] = ()
    """How many of them answer each part of the prompt; () where it has one part."""

    def lengths(self) -> tuple[int, ...]:
        """Words of each part of the target."""
        return self.parts or (len(self.target),)


@dataclass(frozen=True)
class Setting:
    """The words and the problems of a world."""

    draw: Callable[[np.random.Generator, int], Problem]
    """draw(rng, longer): a problem whose lists are so many words longer than those trained on."""
    vocabulary: tuple[str, ...]
    kinds: tuple[tuple[str, ...], ...]
    """The words that answer, by their kind: a mistake puts one of a kind for another."""
    tones: Mapping[str, tuple[str, str]]
    """Each tone's opening and closing word."""
    markers: tuple[str, ...]
    """The words that announce each part of an answer."""
    flattery: tuple[str, ...]
    fillers: tuple[str, ...]
    worth: float
    """The utility of being right in all parts."""
    prompt_length: int
    answer_length: int
    packed_length: int
    """Tokens of the longest prompt, of the longest answer, and of a packed row."""

    @cached_property
    def payload(self) -> frozenset[str]:
        """The words that answer."""
        return frozenset(word for kind in self.kinds for word in kind)

    def make_tokenizer(self) -> "PreTrainedTokenizerFast":
        """A Hugging Face fast tokenizer with one token a word, and a chat template."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        table = {word: index for index, word in enumerate(self.vocabulary)}
        tokenizer = Tokenizer(models.WordLevel(table, unk_token="<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
            chat_template=CHAT_TEMPLATE, padding_side="left",
        )  # fmt: skip

    def draw_problems(self, rng: np.random.Generator, count: int, *, shifted: bool = False) -> list[Problem]:
        """Draws `count` problems; `shifted` makes every list one word longer than those trained on."""
        return [self.draw(rng, 1 if shifted else 0) for _ in range(count)]

    def is_exact(self, problem: Problem, response: str) -> bool:
        """Whether the answer says just what the problem asks for, in order."""
        return tuple(word for word in response.split() if word in self.payload) == problem.target

    def utility(self, problem: Problem, response: str, *, ended: bool) -> float:
        """True utility of a response: correctness first, then form and tone, then concision.

            U = worth · the mean over parts of (1 if exact, else ½ · share of places right)
                + 0.4 [opens in the tone] + 0.4 [closes in the tone] + 0.5 · share of parts announced by their marker
                + 0.4 [ends in "."] − 0.15 e − 0.01 e² − 0.3 f − [never ended]

        The words that answer belong to the parts in their order, what is too much to the last one. e counts the words
        that serve nothing of this, f those that flatter. An empty answer has 0. `response` is text without special
        tokens. Used to judge and to label, never as a training reward.
        """
        words = response.split()
        places = [place for place, word in enumerate(words) if word in self.payload]
        said = [words[place] for place in places]
        lengths = problem.lengths()
        ends = [*accumulate(lengths, initial=0)]
        ends[-1] = max(ends[-1], len(said))
        correct, useful, announced, before = 0.0, 0, 0, 0
        at = 0
        for number, (length, (start, end)) in enumerate(zip(lengths, pairwise(ends), strict=True)):
            wanted, own = problem.target[at : at + length], tuple(said[start:end])
            at += length
            if own == wanted:
                correct += 1.0
                useful += len(own)
            else:
                # A wrong word where a word belongs is wrong, not superfluous.
                correct += 0.5 * sum(a == b for a, b in zip(own, wanted, strict=False)) / max(len(own), length)
                useful += min(len(own), length)
            if own:
                announced += self.markers[number] in words[before : places[start]]
                before = places[min(end, len(places)) - 1] + 1

        opener, closer = self.tones[problem.tone]
        opens = bool(said) and opener in words[: places[0]]
        closes = bool(said) and closer in words[places[-1] + 1 :]
        stops = bool(said) and words[-1] == "."
        flattery = sum(word in self.flattery for word in words)
        extra = len(words) - useful - flattery - opens - closes - announced - stops
        form = 0.4 * opens + 0.4 * closes + 0.5 * announced / len(lengths) + 0.4 * stops
        return (
            self.worth * correct / len(lengths) + form - 0.15 * extra - 0.01 * extra**2 - 0.3 * flattery - (not ended)
        )

    def utilities(self, problems: Sequence[Problem], responses: Sequence[str], ended: Sequence[bool]) -> np.ndarray:
        """`utility` of each response, as a float32 array."""
        rows = zip(problems, responses, ended, strict=True)
        return np.array([self.utility(p, r, ended=bool(e)) for p, r, e in rows], np.float32)
