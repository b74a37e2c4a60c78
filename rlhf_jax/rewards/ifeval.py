"""IFEval: whether a response follows instructions that a program can verify.

Zhou et al. 2023, "Instruction-Following Evaluation for Large Language Models", https://arxiv.org/abs/2311.07911: the
25 kinds of instruction of its table 1, each a function (response, **arguments) -> bool in `CHECKS`, under the names
and with the arguments of the published prompts.

Deviations from the published program:
- Sentences are counted by a rule (`count_sentences`), not by NLTK's trained Punkt model, which is a download.
- Words in capitals are counted by a rule (`capital_words`) that cuts as NLTK's word tokenizer does.
- Language detection has a fixed seed: without one langdetect may change its mind between two runs.
- Keywords are plain text, not regular expressions. The published prompts have none in which that differs.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from rlhf_jax.rewards.text import Text, text_of


class Followed(NamedTuple):
    """Whether each of a prompt's instructions was followed."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]
    """By the response or by one of `variants(response)`."""


def follow(instructions: Sequence[str], arguments: Sequence[Mapping[str, Any]], response: str) -> Followed:
    """Checks a response against its prompt's instructions, each with its arguments.

    Arguments that are None are as if they were not there; an empty response follows nothing. Raises ValueError for
    an instruction that is not in `CHECKS`, and for arguments that are not its own.
    """
    if len(instructions) != len(arguments):
        raise ValueError(f"{len(instructions)} instructions, but arguments for {len(arguments)}")
    loosely = variants(response)
    strict, loose = [], []
    for name, some in zip(instructions, arguments, strict=True):
        given = {key: value for key, value in some.items() if value is not None}
        strict.append(check(name, given, response))
        loose.append(strict[-1] or any(check(name, given, text) for text in loosely))
    return Followed(tuple(strict), tuple(loose))


def check(instruction: str, arguments: Mapping[str, Any], response: str) -> bool:
    """Whether a response that is not empty follows one instruction. Raises ValueError as `follow` does."""
    if instruction not in CHECKS:
        raise ValueError(f"{instruction!r} is no instruction of IFEval; known are {', '.join(CHECKS)}")
    try:
        # Also when the response is empty: whether the arguments fit does not depend on it.
        followed = CHECKS[instruction](response, **arguments)
    except (TypeError, AttributeError):
        raise ValueError(f"{instruction} cannot be checked with the arguments {dict(arguments)}") from None
    return bool(response.strip()) and followed


def variants(response: str) -> tuple[str, ...]:
    """The eight texts of which one must follow an instruction loosely (§2.2 of the paper).

    The response, and without its first line, its last line, or both (an introduction, a farewell); each of these
    also without asterisks (markdown's emphasis).
    """
    lines = response.split("\n")
    texts = [response, *("\n".join(some).strip() for some in (lines[1:], lines[:-1], lines[1:-1]))]
    return (*texts, *(text.replace("*", "") for text in texts))


def compare(count: int, relation: str, bound: int) -> bool:
    """Whether a count is "at least" or "less than" a bound. Raises ValueError for another relation."""
    if relation == "at least":
        return count >= bound
    if relation == "less than":
        return count < bound
    raise ValueError(f"relation {relation!r} is neither 'at least' nor 'less than'")


# Titles, months and the like, after which a sentence goes on.
ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st jr sr rep sen gen col lt maj vs inc ltd co corp bros ave ph.d "
    "jan feb aug sep sept oct nov dec tues wed fri".split()
)
STOP = re.compile(r"""[.?!]++(?=[)"'\]};:*@({\[]|\s|$)""")
CLOSING = re.compile(r"""\s*(?:["')\]}]+(?:\s+|$))?""")


def count_sentences(text: str) -> int:
    """The number of sentences: stretches that end in ".", "?" or "!" before a space or a sign, and what is left.

    A point ends no sentence after a known abbreviation, an initial or initials (U.S.), and where a number or an
    ellipsis is followed by a small letter. As with Punkt, the "1." of a list and a "P.S." are sentences, and a line
    break alone ends none.
    """
    count, start = 0, 0
    for match in STOP.finditer(text):
        before = text[max(0, match.start() - 20) : match.start()]
        word = before.split()[-1].lstrip("\"'([{*“‘") if before[-1:].strip() else ""
        if not _goes_on(word, match[0], text[match.end() :].lstrip()[:1]):
            count += 1
            start = match.end()
    return count + (CLOSING.match(text, start).end() < len(text))  # type: ignore[union-attr]


def _goes_on(word: str, stop: str, after: str) -> bool:
    if stop != ".":
        return set(stop) == {"."} and after.islower()
    if re.fullmatch(r"[^\W\d]|([^\W\d]\.)+[^\W\d]", word):  # a small letter alone is more likely a symbol
        return (len(word) > 1 or word.isupper()) and word.lower() not in ("i", "p.s", "p.p.s")
    return word.lower() in ABBREVIATIONS or (word.isdigit() and after.islower())


BETWEEN_WORDS = re.compile(
    r"""[\s;@#$%&?!*\[\](){}<>"“”‘’«»„`\u2012-\u2015]+ | --+ | \.{2,} | [:,](?!\d)
    | (?<=[^'\s])(?=(?:'[sSmMdD]|'ll|'LL|'re|'RE|'ve|'VE|n't|N'T)(?!\w))  # don't: do, n't
    | (?<=\bCAN)(?=NOT\b)""",
    re.VERBOSE,
)


def capital_words(text: str) -> int:
    """How many words have letters and all of them in capitals; AND/OR and ALL-STAR are one, DON'T is two."""
    return sum(word.isupper() for word in BETWEEN_WORDS.split(text))


@cache
def _detector() -> Callable[[str], str | None]:
    """text -> ISO 639-1 code, None where langdetect finds nothing to go by. Loads its profiles once."""
    import langdetect

    langdetect.DetectorFactory.seed = 0

    def detect(text: str) -> str | None:
        try:
            return str(langdetect.detect(text))
        except langdetect.LangDetectException:
            return None

    return detect


def is_language(response: str, language: str) -> bool:
    """Whether it is in a language (ISO 639-1); text without letters is, as published."""
    return _detector()(response) in (language, None)


def _english_capitals(response: str) -> bool:
    return response.isupper() and is_language(response, "en")


def _english_lowercase(response: str) -> bool:
    return response.islower() and is_language(response, "en")


def _capital_word_frequency(response: str, capital_frequency: int, capital_relation: str) -> bool:
    return compare(capital_words(response), capital_relation, capital_frequency)


def _repeat_prompt(response: str, prompt_to_repeat: str) -> bool:
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _two_responses(response: str) -> bool:
    parts = [part.strip() for part in response.split("******")]
    if not all(parts[1:-1]):
        return False
    filled = [part for part in parts if part]
    return len(filled) == 2 and filled[0] != filled[1]


def _number_placeholders(response: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", response)) >= num_placeholders


def _postscript(response: str, postscript_marker: str) -> bool:
    patterns = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
    marker = postscript_marker.strip()
    return re.search(patterns.get(marker, re.escape(marker.lower())), response.lower()) is not None


def _constrained_response(response: str) -> bool:
    return any(f"My answer is {word}." in response for word in ("yes", "no", "maybe"))


def _json_format(response: str) -> bool:
    text = response.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _multiple_sections(response: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(re.escape(section_spliter.strip()) + r"\s?\d+", response)) >= num_sections


def _number_bullet_lists(response: str, num_bullets: int) -> bool:
    stars, dashes = r"^[^\S\n]*\*[^*].*$", r"^[^\S\n]*-"
    return sum(len(re.findall(bullet, response, re.MULTILINE)) for bullet in (stars, dashes)) == num_bullets


def _number_highlighted_sections(response: str, num_highlights: int) -> bool:
    """*so* or **so**; the published count takes an emphasis in **…** only by its own pattern."""
    single = sum(bool(text.strip()) for text in re.findall(r"\*([^\n*]*)\*", response))
    double = sum(bool(text.strip()) for text in re.findall(r"\*\*([^\n*]*)\*\*", response))
    return single + double >= num_highlights


def _title(response: str) -> bool:
    return any(title.strip("<> ").strip() for title in re.findall(r"<<[^\n]+>>", response))


def _contains(response: str, keyword: str) -> int:
    return len(re.findall(re.escape(keyword.strip()), response, re.IGNORECASE))


def _existence(response: str, keywords: Sequence[str]) -> bool:
    return all(_contains(response, keyword) for keyword in keywords)


def _frequency(response: str, keyword: str, frequency: int, relation: str) -> bool:
    return compare(_contains(response, keyword), relation, frequency)


def _forbidden_words(response: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE) for word in forbidden_words)


def _letter_frequency(response: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return compare(response.lower().count(letter.strip().lower()), let_relation, let_frequency)


def _number_paragraphs(response: str, num_paragraphs: int) -> bool:
    """Paragraphs are parted by ***; an empty one is forgiven at either end."""
    parts = [part.strip() for part in response.split("***")]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def _nth_paragraph_first_word(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are parted by an empty line; empty ones are not counted, but keep their place."""
    parts = [part.strip() for part in response.split("\n\n")]
    count = sum(map(bool, parts))
    if nth_paragraph > count or not parts[nth_paragraph - 1]:
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return count == num_paragraphs and re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def _number_sentences(response: str, num_sentences: int, relation: str) -> bool:
    return compare(count_sentences(response), relation, num_sentences)


def _number_words(response: str, num_words: int, relation: str) -> bool:
    return compare(len(re.findall(r"\w+", response)), relation, num_words)


def _no_comma(response: str) -> bool:
    return "," not in response


def _end_checker(response: str, end_phrase: str) -> bool:
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quotation(response: str) -> bool:
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


CHECKS: dict[str, Callable[..., bool]] = {
    "change_case:capital_word_frequency": _capital_word_frequency,
    "change_case:english_capital": _english_capitals,
    "change_case:english_lowercase": _english_lowercase,
    "combination:repeat_prompt": _repeat_prompt,
    "combination:two_responses": _two_responses,
    "detectable_content:number_placeholders": _number_placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:constrained_response": _constrained_response,
    "detectable_format:json_format": _json_format,
    "detectable_format:multiple_sections": _multiple_sections,
    "detectable_format:number_bullet_lists": _number_bullet_lists,
    "detectable_format:number_highlighted_sections": _number_highlighted_sections,
    "detectable_format:title": _title,
    "keywords:existence": _existence,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:frequency": _frequency,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": is_language,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_words": _number_words,
    "punctuation:no_comma": _no_comma,
    "startend:end_checker": _end_checker,
    "startend:quotation": _quotation,
}


def ifeval_reward(
    prompts: Sequence[Text],
    completions: Sequence[Text],
    *,
    instruction_id_list: Sequence[Sequence[str] | None],
    kwargs: Sequence[Sequence[Mapping[str, Any]] | None],
    **columns: Any,
) -> list[float | None]:
    """The share of its prompt's instructions that each completion follows, strictly; with TRL's signature.

    The columns are those of IFEval's published prompts. None, the reward does not apply, for a row without
    instructions. Raises ValueError as `follow` does.
    """
    scores: list[float | None] = []
    for completion, names, arguments in zip(completions, instruction_id_list, kwargs, strict=True):
        strict = follow(names, arguments or [{}] * len(names), text_of(completion)).strict if names else ()
        scores.append(sum(strict) / len(strict) if strict else None)
    return scores
