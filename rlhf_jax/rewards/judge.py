"""Judges that read responses: which of two is better, asked in both orders, or how good one is.

A judge is a question around something that answers "A" or "B" (`Ask`): a language model of ours (`letters`) or a
server (`server.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from rlhf_jax.data.encode import encode
from rlhf_jax.data.formats import Comparison
from rlhf_jax.data.rejects import BadRow, Place
from rlhf_jax.errors import UserError
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.rewards.reward import (
    Columns,
    Completion,
    HostScores,
    Part,
    Prompt,
    Reward,
    first_failure,
    refuse_failures,
)
from rlhf_jax.rewards.text import text_of
from rlhf_jax.scoring import document_logprobs, token_choices

Ask = Callable[[Sequence[str]], ArrayLike]
"""ask(questions) -> [N]: the probability that the answer is "A" rather than "B"; NaN where there was no answer."""
Judge = Callable[[Sequence[str], Sequence[str], Sequence[str]], ArrayLike]
"""judge(prompts, first, second) -> [N]: 1 where the first response is better, 0 where the second is, ½ for neither;
NaN where the judge has failed."""
Grader = Callable[[Sequence[str], Sequence[str]], ArrayLike]
"""grade(prompts, answers) -> [N]: how good each answer is, from 0 to 1; NaN where the judge has failed."""

COMPARE = "Which of two responses to a prompt is better: more helpful, more honest, and harmless?"
GRADE = "Is the response to the prompt good: helpful, honest, and harmless?"


class Verdicts(NamedTuple):
    """How far our responses were preferred, 1 to 0, in each of the two orders; NaN where the judge has failed."""

    shown_first: Float[np.ndarray, " N"]
    shown_second: Float[np.ndarray, " N"]


def both_orders(judge: Judge, prompts: Sequence[str], ours: Sequence[str], theirs: Sequence[str]) -> Verdicts:
    """Asks twice, the responses changing places: judges favour a place (Zheng et al. 2023, §3.3).

    Raises ValueError when the judge does not answer with numbers from 0 to 1 or NaN, one a prompt.
    Reference: Zheng et al. 2023, "Judging LLM-as-a-Judge", https://arxiv.org/abs/2306.05685.
    """
    first, second = (probabilities(judge(prompts, *sides), len(prompts)) for sides in ((ours, theirs), (theirs, ours)))
    return Verdicts(first, 1 - second)


def probabilities(found: ArrayLike, count: int) -> Float[np.ndarray, " N"]:
    """A judge's answers to `count` prompts. Raises ValueError unless they are as many numbers from 0 to 1, or NaN."""
    numbers = np.asarray(found, np.float64)
    if numbers.shape != (count,) or not ((numbers >= 0) & (numbers <= 1) | np.isnan(numbers)).all():
        raise ValueError(f"a judge must answer {count} prompts with as many numbers from 0 to 1")
    return numbers


def comparison(prompt: str, first: str, second: str, question: str = COMPARE) -> str:
    """The question which of two responses is better, to be answered by "A" or "B"."""
    return (
        f"{question}\n\nPrompt:\n{prompt}\n\nResponse A:\n{first}\n\nResponse B:\n{second}\n\n"
        "Answer with A or B alone."
    )


def grading(prompt: str, answer: str, question: str = GRADE) -> str:
    """The question whether a response is good, to be answered by "A" for good or "B" for bad."""
    return f"{question}\n\nPrompt:\n{prompt}\n\nResponse:\n{answer}\n\nAnswer with A for good or B for bad alone."


def comparing(ask: Ask, question: str | Sequence[str] = COMPARE) -> Judge:
    """A judge of two responses: P(first is better) is that of "A".

    `question` is a principle, such as "Choose the response that is less harmful.", or one for each prompt. The judge
    raises ValueError when there are not as many of these as prompts.
    """

    def judge(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> ArrayLike:
        texts = zip(prompts, first, second, _each(question, len(prompts)), strict=True)
        return ask([comparison(*some) for some in texts])

    return judge


def grader(ask: Ask, question: str | Sequence[str] = GRADE) -> Grader:
    """A judge of one response: its score is the probability of "A" for good.

    `question` is a principle, or one for each prompt. The judge raises ValueError when there are not as many of these
    as prompts.
    """

    def grade(prompts: Sequence[str], answers: Sequence[str]) -> ArrayLike:
        texts = zip(prompts, answers, _each(question, len(prompts)), strict=True)
        return ask([grading(*some) for some in texts])

    return grade


class Tolerance:
    """The share of its questions on which a judge may fail: of `total` in all calls, or without it of each call's."""

    def __init__(self, who: str, share: float, total: int | None = None, advice: str = ""):
        self._who, self._share, self._total, self._advice, self._before = who, share, total, advice, 0

    def check(self, failures: Mapping[int, str], count: int) -> None:
        """Raises UserError when too many have failed; `failures` says why, of a call of `count` questions so far."""
        failed, total = self._before + len(failures), self._total or count
        if failures and failed > self._share * total:
            raise UserError(
                f"{self._who} failed on {failed} of {total} questions (at most {self._share:.0%} may):"
                f" {failures[min(failures)]}{self._advice}"
            )

    def add(self, failures: Mapping[int, str]) -> None:
        """Keeps the failures of a call that is done in mind."""
        self._before += len(failures) if self._total else 0


def letters(
    model: Pretrained,
    *,
    batch_size: int,
    max_length: int,
    max_failed_share: float = 0.0,
    total: int | None = None,
) -> Ask:
    """A language model as a judge, by how likely it answers a question with "A" rather than "B":

        P(A) = σ(log π(A | question) − log π(B | question))

    At most `batch_size` questions are read at once. One that is longer than `max_length` tokens, or that the model's
    chat template refuses, has failed. The judge raises UserError when more than `max_failed_share` have: of a call's
    questions, or of `total` in all calls.
    Reference: Bai et al. 2022, §4.1, https://arxiv.org/abs/2212.08073.
    """
    answers = tuple(({"role": "assistant", "content": letter},) for letter in "AB")
    tolerance = Tolerance(f"the judge {model.name}", max_failed_share, total)

    def ask(questions: Sequence[str]) -> np.ndarray:
        prompts: dict[int, list[int]] = {}
        replies: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        failures: dict[int, str] = {}
        for number, question in enumerate(questions):
            row = Comparison(({"role": "user", "content": question},), answers, (0, 1), Place("question", number))
            try:
                ids, _ = encode(row, model.tokenizer, max_length)
            except BadRow as error:
                failures[number] = str(error)
                continue
            prompts[number] = ids.prompt
            a, b = (tuple(reply[:-1]) for reply in ids.responses)  # without the EOS: only the letter is asked for
            replies[number] = a, b
        tolerance.check(failures, len(questions))
        tolerance.add(failures)
        found = np.full(len(questions), np.nan)
        for pair in sorted(set(replies.values())):
            numbers = [number for number in replies if replies[number] == pair]
            odds = _log_odds(model, [prompts[number] for number in numbers], pair, batch_size)
            found[numbers] = 0.5 * (1 + np.tanh(odds / 2))
        return found

    return ask


def letter_judge(model: Pretrained, *, batch_size: int, max_length: int) -> Judge:
    """A language model as a judge of two responses: `comparing` by its `letters`."""
    return comparing(letters(model, batch_size=batch_size, max_length=max_length))


def judge_reward(
    name: str, judge: Grader, weight: float, *, failed_score: float = 0.0, max_failed_share: float = 0.1
) -> Reward:
    """A judge's scores as a reward: a host reward, for PPO, GRPO and best of n.

        judge_reward("judge", grader(letters(model, batch_size=16, max_length=1024)), 1.0)

    An answer on which the judge fails scores `failed_score` and is counted as an error. The reward raises UserError
    when more than `max_failed_share` of a batch's answers fail, ValueError when the judge answers with something else
    than numbers from 0 to 1 or NaN, one an answer.
    """

    def on_texts(
        prompts: Sequence[Prompt], completions: Sequence[Completion], columns: Columns, part: Part | None = None
    ) -> HostScores:
        part = part or Part(np.arange(len(prompts)), len(prompts))
        found = judge([in_words(prompt) for prompt in prompts], [text_of(completion) for completion in completions])
        scores = probabilities(found, len(prompts))
        failures = {int(part.rows[row]): "the judge gave no verdict" for row in np.flatnonzero(np.isnan(scores))}
        refuse_failures(name, failures, part.total, max_failed_share)
        scores = np.where(np.isnan(scores), failed_score, scores)
        return HostScores(scores, errors=len(failures), first_error=first_failure(failures))

    return Reward(name, weight, on_texts=on_texts, max_failed_share=max_failed_share)


def in_words(prompt: Prompt) -> str:
    """A prompt as a judge reads it: one user's words as they are, a conversation turn by turn."""
    if isinstance(prompt, str):
        return prompt
    if [turn["role"] for turn in prompt] == ["user"]:
        return text_of(prompt)
    return "\n\n".join(f"{str(turn['role']).capitalize()}: {text_of([turn])}" for turn in prompt)


def _each(question: str | Sequence[str], count: int) -> Sequence[str]:
    return [question] * count if isinstance(question, str) else question


def _log_odds(
    model: Pretrained, prompts: Sequence[list[int]], pair: tuple[tuple[int, ...], tuple[int, ...]], batch_size: int
) -> np.ndarray:
    """log π(a|x) − log π(b|x) of the two replies: in one pass where each is one token."""
    a, b = pair
    if len(a) == len(b) == 1:
        return token_choices(model, prompts, (a[0], b[0]), batch_size=batch_size)
    both = [(prompt, reply) for reply in pair for prompt in prompts]
    first, second = document_logprobs(model, both, batch_size=batch_size).reshape(2, -1)
    return first - second
