"""Answers to problems of mathematics: what a response arrives at, and whether it is the right answer.

An answer is strictly right in the demanded form: after the first "####", which is how GSM8K's own solutions end, or in
the last \\boxed{…}, which is how those of MATH do. It is leniently right also without one: the whole response where it
is a formula, what follows "the answer is", the last formula, or the last number. There is one candidate, not several
of which one may be right.

A reward asks for more than equality where the answer is a number: the response has to have worked it out. A policy
that is trained on equality alone learns to repeat the question ("764 + 729 = 764 + 729": experiments/results/sums.md).

Numbers are compared here, exactly (`quantity.py`); choices and words as text; all else by math-verify, in a process
that is killed when it takes longer than SECONDS (`symbolic/equal.py`).
"""

import atexit
import re
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.rewards.quantity import begins_with_number, first_quantity, last_number, plain_text, quantity, same
from rlhf_jax.rewards.text import Text, text_of
from rlhf_jax.rewards.worker import Setup
from rlhf_jax.rewards.workers import Failed, Pool

SECONDS = 5.0
"""For one comparison of two formulas; one that takes longer is not equal."""
START_SECONDS = 120.0
MEMORY = 2 * 2**30
JOBS = 2
LONGEST = 1000
"""Characters of a formula; one that is longer is compared as text alone."""
MARK = re.compile(r"####[ \t]*\n*(.*)")
CHOICE = re.compile(r"\(?\s*([A-Z])\s*(?:(?:[).:]|\s+(?:because|since|as)\b)\s*.*)?", re.DOTALL)
SAID = re.compile(r"(?i:(?:answer|result|solution)\s*(?:is|:|=)+|therefore,?|\*\*answer\*\*:?)[\s:*]*(?=\S)")
ENVIRONMENT = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<!\\)\$([^$\n]+?)(?<!\\)\$", re.DOTALL)
FORMULA = re.compile(r"[\d\s.,+\-−*/^()×÷=]+|[^\n]*\\[A-Za-z]+[^\n]*")
LOCK = threading.Lock()
WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")


Equal = Callable[[str, str], bool]


class Correct(NamedTuple):
    """Whether a response has the right answer."""

    strict: bool
    """In the demanded form."""
    lenient: bool
    """In the demanded form, or, without one, at the end."""


def math_reward(
    prompts: Sequence[Text], completions: Sequence[Text], *, answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    """1 for each completion with the right answer, leniently and worked out, otherwise 0; with TRL's signature.

    `answer`: a text or a number for each completion, as `grade` has it; where a row has none (None), neither has it a
    score. Raises ValueError as `grade` does.
    """
    return _rewards(completions, answer, strict=False)


def strict_math_reward(
    prompts: Sequence[Text], completions: Sequence[Text], *, answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    """The same for the right answer in the demanded form: after "####", or in \\boxed{…}."""
    return _rewards(completions, answer, strict=True)


def _rewards(completions: Sequence[Text], answer: Sequence[Any], *, strict: bool) -> list[float | None]:
    texts = [text_of(completion) for completion in completions]
    asked: list[tuple[str, str]] = []

    def note(one: str, other: str) -> bool:
        asked.append((one, other))
        return False

    rows = list(zip(texts, answer, strict=True))
    for text, right in rows:
        if right is not None:
            _grade(text, right, note, worked_out=True)
    pairs = list(dict.fromkeys(asked))
    equal = dict(zip(pairs, symbolically_equal(pairs, jobs=JOBS), strict=True))

    def known(one: str, other: str) -> bool:
        return equal[one, other]

    graded = [None if right is None else _grade(text, right, known, worked_out=True) for text, right in rows]
    return [None if found is None else float(found.strict if strict else found.lenient) for found in graded]


def verify(response: str, answer: Any) -> bool:
    """Whether a response has the right answer, leniently. Raises ValueError as `grade` does."""
    return grade(response, answer).lenient


def grade(response: str, answer: Any, *, worked_out: bool = False) -> Correct:
    """Compares what a response arrives at with the answer, as values: 18 is $18.00, 1/2 is \\frac{1}{2}.

    `worked_out`: where the answer is a number, so must be what the response arrives at; 9 + 9 is not 18 then, and 36/2
    is not. Without it they are right, as math-verify has it.
    `answer` is a number, a formula, a word or a letter, or a solution that ends in the demanded form. Raises
    ValueError when there is nothing in it.
    References: Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems", https://arxiv.org/abs/2110.14168;
    Hendrycks et al. 2021, "Measuring Mathematical Problem Solving With the MATH Dataset",
    https://arxiv.org/abs/2103.03874.
    """
    return _grade(response, answer, _equal, worked_out=worked_out)


def _equal(one: str, other: str) -> bool:
    return symbolically_equal([(one, other)], jobs=1)[0]


def _grade(response: str, answer: Any, equal: Equal, *, worked_out: bool) -> Correct:
    right = right_answer(answer)
    marked = MARK.search(response)
    if marked:
        strict = is_right(marked[1], right, equal, goes_on=True, worked_out=worked_out)
        if strict or quantity(right) is None or begins_with_number(marked[1]):
            return Correct(strict, strict)
    boxed = last_boxed(response)
    if boxed is not None:
        strict = is_right(boxed, right, equal, worked_out=worked_out)
        return Correct(strict, strict)
    said = candidate(response, right)
    return Correct(False, said is not None and is_right(said, right, equal, worked_out=worked_out))


def right_answer(answer: Any) -> str:
    """The answer without the solution that leads to it. Raises ValueError when there is nothing in it."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"the answer {answer!r} is neither a text nor a number")
    text = answer if isinstance(answer, str) else repr(answer)
    marked = MARK.search(text)
    boxed = last_boxed(text)
    found = (marked[1] if marked else boxed if boxed is not None else text).strip()
    if "\n" in found:  # a solution, which ends in its number
        found = last_number(found) or ""
    if inside := re.fullmatch(r"(?:\$\$?|\\\(|\\\[)\s*([^$]*[^$\\\s])\s*(?:\$\$?|\\\)|\\\])\.?", found):
        found = inside[1]
    if not found.strip("$. "):
        raise ValueError(f"the answer {answer!r:.80} is empty")
    return found


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{…} or \\fbox{…}, None without one that is closed."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    bare = re.compile(r"\\(?:boxed|fbox)\s+([^\s{}$])").match(text, start)
    if bare:
        return bare[1]
    depth, first = 0, text.find("{", start)
    for place in range(first, len(text)) if first >= 0 else ():
        depth += (text[place] == "{" and text[place - 1] != "\\") - (text[place] == "}" and text[place - 1] != "\\")
        if depth == 0:
            return text[first + 1 : place].strip()
    return None


def candidate(response: str, right: str) -> str | None:
    """The part of a response without the demanded form that counts as its answer, None without any."""
    text = response.strip()
    if FORMULA.fullmatch(text) and not WORDS.search(re.sub(r"\\text\w*\{[^}]*\}", "", text)):
        return _last_side(text) if quantity(right) is not None else text.lstrip("= ")
    formulas = [next(filter(None, match.groups())) for match in ENVIRONMENT.finditer(text)]
    if quantity(right) is not None:
        # A dollar elsewhere may be money.
        if formulas and re.search(r"(?:\$|\\\)|\\\])[\s.]*$", text):
            return _last_side(formulas[-1])
        return last_number(text)
    said = [match.end() for match in SAID.finditer(text)]
    if said:
        text = text[said[-1] :].strip()
        formulas = [next(filter(None, match.groups())) for match in ENVIRONMENT.finditer(text)]
        return formulas[0] if formulas else re.split(r"(?<=[^A-Z])[.!](?:\s|$)|\n", text)[0].strip(" *.")
    lines = [line for line in text.splitlines() if line.strip()]
    letters = set(re.findall(r"\(([A-Z])\)", lines[-1])) if lines and choice_of(right) else set()
    if len(letters) == 1:
        return letters.pop()
    if formulas:
        return formulas[-1]
    return lines[-1].strip(" *.") if lines else None


def is_right(given: str, right: str, equal: Equal, *, goes_on: bool = False, worked_out: bool = False) -> bool:
    """Whether a text is the answer. `goes_on`: more text may follow a number. `equal` compares two formulas.

    `worked_out`: a number is wanted as a number, as in `grade`.
    """
    wanted = quantity(right)
    found = first_quantity(given) if goes_on and wanted is not None else quantity(given)
    if worked_out and wanted is not None:
        found = found or quantity(_last_side(given))
        return found is not None and same(found, wanted) and not (found.is_division and not wanted.is_division)
    if wanted is not None and found is not None:
        return same(found, wanted)
    choice = choice_of(right)
    if choice is not None and (picked := choice_of(given)) is not None:
        return picked == choice
    one, other = normal(given), normal(right)
    if one == other or (one.casefold() == other.casefold() and len(one) > 1 and one.isalpha()):
        return bool(one)
    if not one or len(given) > LONGEST or len(right) > LONGEST or _are_words(given, right):
        return False
    return equal(_formula(given), _formula(right))


def choice_of(text: str) -> str | None:
    """The letter of a choice: C, (C), \\text{(C)}, C. because; None for any other text."""
    match = CHOICE.fullmatch(plain_text(text).strip(" $*."))
    return match[1] if match else None


def normal(text: str) -> str:
    """A text without what LaTeX has for looks: spaces, sizes of brackets, other kinds of fractions, fonts."""
    text = text.strip().strip("$").strip()
    text = re.sub(r"\\(?:left|right|displaystyle|limits|[bB]igg?[lr]?|q?quad)(?![A-Za-z])", "", text)
    text = re.sub(r"\\[!,;: ]|~|\{,\}", "", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\(?:text|textbf|mathrm|mbox|textrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\(?=[$%])", "", text)
    return re.sub(r"\s+", "", text).rstrip(".,")


def symbolically_equal(pairs: Sequence[tuple[str, str]], *, jobs: int) -> list[bool]:
    """Whether the two formulas of each pair are equal, by computer algebra; False where SECONDS do not suffice.

    From any thread, in up to `jobs` processes. Raises UserError when one cannot be started.
    """
    found = [False] * len(pairs)
    if not pairs:
        return found
    with LOCK:
        requests = [([""], [one], {"answer": [other]}) for one, other in pairs]
        for number, reply in _pool(jobs).map(requests, [SECONDS] * len(pairs)):
            found[number] = not isinstance(reply, Failed) and reply[0] == "scores" and reply[1] == [1.0]
    return found


@cache
def _pool(jobs: int) -> Pool:
    path = Path(__file__).with_name("symbolic") / "equal.py"
    setup = Setup(str(path), "equal", path.read_bytes(), MEMORY, str(Path(__file__).parents[2]))
    pool = Pool(setup, jobs=jobs, start_seconds=START_SECONDS)
    atexit.register(pool.close)
    return pool


def _are_words(given: str, right: str) -> bool:
    """Whether one of them is a text of a language, which algebra would read as a product of its letters."""
    texts = [_formula(text) for text in (given, right)]
    return any(WORDS.search(plain_text(text)) and not re.search(r"\\(?!text|mathrm|mbox)", text) for text in texts)


def _last_side(formula: str) -> str:
    """The part after the last "=" outside of brackets: 3 of x = 1 + 2 = 3."""
    sides = re.split(r"(?<![<>!\\])=|\\approx", formula)
    return sides[-1]


def _formula(text: str) -> str:
    """A formula as math-verify reads it: without dollars around it, a list with commas."""
    return re.sub(r"\s+(?:and|or)\s+", ", ", text.strip().strip("$").strip().rstrip("."))
