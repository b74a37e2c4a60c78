"""A judge that is an OpenAI-compatible server (chat completions).

with open_server("http://127.0.0.1:8000/v1", "some-model", "answers.sqlite") as server:
    verdicts = both_orders(comparing(server.ask), prompts, ours, theirs)
    print(server.metrics())

A request is tried again, after a wait that doubles, where the server is busy, fails or does not answer. Each answer is
kept in a file, so that nothing is paid for twice. It needs the package openai: pip install 'rlhf_jax[server]'.
"""

import json
import math
import os
import random
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from rlhf_jax.data.rejects import one_line
from rlhf_jax.errors import UserError, first_line
from rlhf_jax.hosts import from_first, many
from rlhf_jax.rewards.cache import Cache
from rlhf_jax.rewards.judge import Tolerance

AGAIN = {408, 409, 425, 429}
"""HTTP errors after which a request is tried again, with all from 500 on."""
NEVER = {401: "is the key right?", 403: "may the key use this model?", 404: "are URL and model right?"}
"""HTTP errors that every request would meet, and what to look at."""
WITHOUT = {400, 422}
"""HTTP errors of a server that knows no log-probabilities, or does not like the question."""
COUNTS = (
    "requests", "answers", "cache_hits", "retries", "failures", "without_logprobs", "prompt_tokens",
    "completion_tokens",
)  # fmt: skip

LETTER = re.compile(
    r"""
    (?: \A\W* | ^[^\w\n]*(?=[AB][^\w\n]*$) | \b(?i:answer|response|option)(?i:\s+is)?[^\w.,;?!]*\b )
    ([AB])
    (?= [ \t]*$ | [^\w\s+&/]+(?:\s|\Z) | \s*[\u2013\u2014] | \s+[-(] | \s+(?:is\s+(?:the\s+)?better|because)\b )
    """,
    re.VERBOSE | re.MULTILINE,
)
"""A letter that is an answer, and no article: first, alone on a line, or called an answer, response or option; after
it nothing, punctuation, or why."""


class ServerLimits(NamedTuple):
    """How much a server is asked, and how long it is waited for."""

    at_once: int = 8
    """Requests that wait for an answer at the same time."""
    requests: int | None = None
    """The most requests in all, those that are tried again too; None: no limit."""
    seconds: float = 60.0
    """The longest that a request waits for the server to say something."""
    retries: int = 5
    """How often a request is tried again."""
    wait: float = 1.0
    """Seconds before the first retry; twice as many before each further one, less up to a half of it at random."""
    longest_wait: float = 60.0
    """The most seconds before a retry, also where the server asks for more."""
    failed_share: float = 0.05
    """The share of the questions that may fail: of `questions`, or of those of a call."""
    questions: int | None = None
    """Questions in all calls."""
    silent_in_a_row: int = 20
    """So many questions without any response, one after the other, say that the server is down."""
    answer_tokens: int = 8
    """The longest answer."""


class Failure(Exception):
    """Why one question has no answer."""


class Silence(Failure):
    """Why there was no response at all."""


def is_server(judge: str | None) -> bool:
    """Whether a flag's text names a server, and not a folder."""
    return judge is not None and judge.startswith(("http://", "https://"))


@contextmanager
def open_server(
    url: str,
    model: str,
    cache: str | Path,
    *,
    limits: ServerLimits | None = None,
    key_variable: str = "OPENAI_API_KEY",
) -> Iterator["Server"]:
    """The judge at a URL, such as http://127.0.0.1:8000/v1, while the `with` lasts; `cache` is the file of answers.

    The API key is read from an environment variable; a server of one's own may need none. It is written nowhere.
    Raises UserError where openai is not installed, and for a URL with a password in it.
    """
    if find_spec("openai") is None:
        raise UserError("a judge at a URL needs a package that is not installed: pip install 'rlhf_jax[server]'")
    if urlsplit(url).username or urlsplit(url).password or urlsplit(url).query:
        raise UserError(f"the judge's URL must hold no password and no query: put the key into {key_variable}")
    import openai

    limits = limits or ServerLimits()
    secret = os.environ.get(key_variable, "")
    kept = Cache(cache)
    client = openai.OpenAI(base_url=url, api_key=secret or "none", max_retries=0, timeout=limits.seconds)
    try:
        yield Server(client, url, model, kept, limits, secret)
    finally:
        client.close()
        kept.close()


class Server:
    """A judge that was opened by `open_server`."""

    def __init__(self, client: Any, url: str, model: str, cache: Cache, limits: ServerLimits, secret: str):
        self._client, self._cache, self._limits, self._secret = client, cache, limits, secret
        self._url, self._model = url, model
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._logprobs = True
        """Whether the server has not yet refused to give log-probabilities."""
        self._in_a_row = 0
        self._kept = f"; answers so far are kept in {cache.path}: look at the server, then run again"
        self._tolerance = Tolerance(f"the judge {model} at {url}", limits.failed_share, limits.questions, self._kept)

    def ask(self, questions: Sequence[str]) -> np.ndarray:
        """The probability of "A" rather than "B" as the answer to each question, [N]; NaN where one has failed.

        It is normalised over the two letters where the server gives log-probabilities, otherwise 0 or 1. Equal
        questions are asked once. Of many processes the first asks.
        Raises UserError when more than `failed_share` of the questions fail, or so many get no response that the
        server must be down; when the limit on requests is reached; and at once for an error that all would meet.
        """
        found = from_first(lambda: self._ask(questions).tolist()) if many() else self._ask(questions)
        return np.asarray(found, np.float64)

    def metrics(self, prefix: str = "judge_") -> dict[str, float]:
        """The `COUNTS` since it was opened, by name. Answers from the cache cost no tokens.

        `without_logprobs` counts answers of a server that refused to give log-probabilities: each is 0 or 1.
        """
        with self._lock:
            return {prefix + name: float(self._counts[name]) for name in COUNTS}

    def _ask(self, questions: Sequence[str]) -> np.ndarray:
        unique = list(dict.fromkeys(questions))
        found = dict.fromkeys(unique, math.nan)
        failures: dict[int, str] = {}
        pool, stop, waits = ThreadPoolExecutor(self._limits.at_once), threading.Event(), True
        try:
            futures = {pool.submit(self._answer, question, stop): n for n, question in enumerate(unique)}
            for future in as_completed(futures):
                number = futures[future]
                try:
                    found[unique[number]] = future.result()
                    self._in_a_row = 0
                except Failure as failure:
                    failures[number] = str(failure)
                    self._count(failures=1)
                    self._in_a_row = self._in_a_row + 1 if isinstance(failure, Silence) else 0
                self._tolerance.check(failures, len(unique))
                if self._in_a_row >= self._limits.silent_in_a_row:
                    raise UserError(
                        f"the judge {self._model} at {self._url} was silent on {self._in_a_row} questions in a row:"
                        f" {failures[number]}{self._kept}"
                    )
            self._tolerance.add(failures)
        except KeyboardInterrupt:
            waits = False
            raise
        finally:  # what is on its way is paid for: it is waited for, and kept
            stop.set()
            pool.shutdown(wait=waits, cancel_futures=True)
        return np.array([found[question] for question in questions], np.float64)

    def _answer(self, question: str, stop: threading.Event) -> float:
        whole = {
            "model": self._model, "messages": [{"role": "user", "content": question}], "temperature": 0.0,
            "max_tokens": self._limits.answer_tokens, "logprobs": True, "top_logprobs": 20,
        }  # fmt: skip
        plain = {name: whole[name] for name in whole if "logprobs" not in name}
        kept = ((body, self._cache.get({"url": self._url, **body})) for body in (whole, plain))
        sent, text = next((some for some in kept if some[1] is not None), (whole, None))
        if text is None:
            sent, text = self._request(whole, plain, stop)
            reply = read_reply(text)
            self._cache.put({"url": self._url, **sent}, text)
            self._count(answers=1, prompt_tokens=reply.prompt_tokens, completion_tokens=reply.completion_tokens)
        else:
            reply = read_reply(text)
            self._count(cache_hits=1)
        self._count(without_logprobs=int(sent is plain))
        if reply.probability is None:
            raise Failure(f"it answers {one_line(reply.text)[:80]!r}, and not A or B")
        return reply.probability

    def _request(
        self, whole: dict[str, Any], plain: dict[str, Any], stop: threading.Event
    ) -> tuple[dict[str, Any], str]:
        """The request that was sent, and the server's response: `plain` is sent where the server has refused `whole`.

        Raises Silence when no try brings a response.
        """
        import openai

        sent = whole if self._logprobs else plain
        reason, wait, tries = "", 0.0, 0
        while tries <= self._limits.retries:
            if stop.wait(wait):
                raise Silence("stopped")
            self._spend(again=tries > 0)
            try:
                response = self._client.chat.completions.with_raw_response.create(**sent)
                if sent is plain:  # the log-probabilities were the trouble, and not the question
                    self._logprobs = False
                return sent, self._hide(response.http_response.text)
            except openai.APITimeoutError:
                reason, asked = f"no answer within {self._limits.seconds:g} seconds", 0.0
            except openai.APIConnectionError as error:
                reason, asked = self._clean(f"no connection: {first_line(error.__cause__ or error)}"), 0.0
            except openai.APIStatusError as error:
                code = error.status_code
                reason = self._clean(f"HTTP {code}: {first_line(error)}")
                asked = _seconds(error.response.headers.get("retry-after"))
                if code in NEVER:
                    raise UserError(f"the judge {self._model} at {self._url}: {reason}; {NEVER[code]}") from None
                if code in WITHOUT and sent is whole:
                    sent = plain
                    continue
                if code not in AGAIN and code < 500:
                    raise Silence(reason) from None
            tries += 1
            wait = min(self._limits.wait * 2 ** (tries - 1), self._limits.longest_wait) * random.uniform(0.5, 1.0)
            wait = max(wait, min(asked, self._limits.longest_wait))
        raise Silence(f"{reason} ({tries} tries)")

    def _spend(self, *, again: bool) -> None:
        """Counts a request before it is sent. Raises UserError at the limit."""
        with self._lock:
            if self._limits.requests is not None and self._counts["requests"] >= self._limits.requests:
                raise UserError(
                    f"the judge {self._model} at {self._url} was asked {self._limits.requests} times, which is the"
                    f" limit; answers are kept in {self._cache.path}: run again with a higher limit to go on"
                )
            self._counts.update(requests=1, retries=int(again))

    def _count(self, **numbers: int) -> None:
        with self._lock:
            self._counts.update(numbers)

    def _clean(self, text: str) -> str:
        """An error's words on one line, without the key."""
        return one_line(self._hide(text))

    def _hide(self, text: str) -> str:
        """A server's words, which may repeat the key."""
        return text.replace(self._secret, "***") if self._secret else text


class Reply(NamedTuple):
    """A server's response, read."""

    text: str
    probability: float | None
    """P("A") / (P("A") + P("B")); None without a letter."""
    prompt_tokens: int
    completion_tokens: int


def read_reply(response: str) -> Reply:
    """Reads the JSON of a chat completion. Raises Failure for anything else."""
    try:
        data = json.loads(response)
        choice = data["choices"][0]
        text = choice["message"]["content"] or ""
        used = data.get("usage") or {}
        tokens = (choice.get("logprobs") or {}).get("content") or []
        counts = [int(used.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
        return Reply(text, letter_probability(text, tokens), counts[0], counts[1])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise Failure(f"its response is no chat completion: {one_line(response)[:80]!r}") from None


def letter_probability(text: str, tokens: Sequence[Mapping[str, Any]]) -> float | None:
    """P(A) / (P(A) + P(B)) of an answer that names one of the two letters (`LETTER`); None for any other.

    `tokens` are the answer's, each with its logprob and top_logprobs. They are read where the letter stands, the
    letters with and without space around them. A letter that is not among the top ones has probability 0; without
    log-probabilities so has the one that was not said.
    """
    said = set(re.findall(r"\b[AB]\b", text))
    if len(said) != 1 or not LETTER.search(text):
        return None
    (letter,) = said
    place = next((token for token in tokens if token["token"].strip() == letter), None)
    if place is None:
        return float(letter == "A")
    top = {one["token"]: min(0.0, float(one["logprob"])) for one in (*(place.get("top_logprobs") or ()), place)}
    a, b = (sum(math.exp(top[some]) for some in top if some.strip() == of) for of in "AB")
    return a / (a + b) if a + b > 0 else float(letter == "A")


def _seconds(header: str | None) -> float:
    """The seconds of a Retry-After; 0 for none, or a date."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0
