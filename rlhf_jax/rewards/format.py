"""Rewards for the form of an answer: tags, a box, its length, repetition; with TRL's signature, or makers of such.

A maker takes the numbers and returns `reward(prompts, completions, **columns) -> list[float]`. The lengths are in
tokens where a function that counts them is given, otherwise in characters: `count` maps a text to a number.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_jax.rewards.text import Text, text_of

RewardFunction = Callable[..., list[float]]
Count = Callable[[str], int]


def tag_reward(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
    """1 for each completion that is <think>…</think><answer>…</answer> and nothing else, otherwise 0.

    Reference: DeepSeek-AI 2025, "DeepSeek-R1", §2.2.2, https://arxiv.org/abs/2501.12948.
    """
    return [float(has_tags(text_of(completion), ("think", "answer"))) for completion in completions]


def boxed_reward(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
    """1 for each completion with one \\boxed{…} that is closed and not empty, otherwise 0."""
    from rlhf_jax.rewards.math import last_boxed

    texts = [text_of(completion) for completion in completions]
    return [float(text.count("\\boxed") == 1 and bool(last_boxed(text))) for text in texts]


def has_tags(text: str, tags: Sequence[str]) -> bool:
    """Whether a text is these tags one after the other, each once, with something in each and only space between."""
    pattern = r"\s*".join(
        rf"<{re.escape(tag)}>(?P<t{number}>.*)</{re.escape(tag)}>" for number, tag in enumerate(tags)
    )
    found = re.fullmatch(rf"\s*{pattern}\s*", text, re.DOTALL)
    once = all(text.count(f"<{tag}>") == text.count(f"</{tag}>") == 1 for tag in tags)
    return once and found is not None and all(part.strip() for part in found.groups())


def tag_share(text: str, tags: Sequence[str]) -> float:
    """The share of the 2 × n opening and closing tags that a text has exactly once: a signal before all are right."""
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    return sum(text.count(mark) == 1 for mark in marks) / len(marks)


def length_penalty(length: int, *, target: int, rate: float) -> float:
    """−rate · max(0, |y| − target) / target: nothing up to a length, then in proportion to what is above it.

    Raises ValueError for a target below 1.
    """
    if target < 1:
        raise ValueError(f"a target of {target}: it must be 1 or more")
    return -rate * max(0, length - target) / target


def length_reward(penalty: Callable[[int], float], count: Count) -> RewardFunction:
    """A penalty of lengths as a reward: `partial(length_penalty, target=…, rate=…)`, and what counts."""

    def reward(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        return [penalty(count(text_of(completion))) for completion in completions]

    return reward


def repetition_penalty(text: str, *, size: int, worst: float) -> float:
    """worst · (1 − distinct n-grams / n-grams), of words; 0 for a text with fewer words than n.

    `size` is n, `worst` the penalty of a text that is one word again and again, at most 0. Raises ValueError
    otherwise.
    Reference: Yeo et al. 2025, "Demystifying Long Chain-of-Thought Reasoning in LLMs", app. B,
    https://arxiv.org/abs/2502.03373.
    """
    if size < 1 or worst > 0:
        raise ValueError(f"n-grams of {size} words and a penalty of {worst}: at least 1 word, and at most 0")
    words = text.lower().split()
    grams = list(zip(*(words[start:] for start in range(size)), strict=False))
    return worst * (1.0 - len(set(grams)) / len(grams)) if grams else 0.0


def repetition_reward(*, size: int, worst: float) -> RewardFunction:
    """`repetition_penalty` as a reward."""
    repetition_penalty("", size=size, worst=worst)  # for its errors, before the first answer

    def reward(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        return [repetition_penalty(text_of(completion), size=size, worst=worst) for completion in completions]

    return reward
