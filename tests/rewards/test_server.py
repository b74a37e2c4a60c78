"""A judge at a URL: against a server on 127.0.0.1 that does what it is told."""

import sqlite3
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from stub_server import Stub, completion

from rlhf_jax.errors import UserError
from rlhf_jax.rewards import server as servers
from rlhf_jax.rewards.cache import Cache
from rlhf_jax.rewards.judge import both_orders, comparing, grader
from rlhf_jax.rewards.server import Failure, ServerLimits, letter_probability, open_server, read_reply

KEY = "sk-a-very-secret-key"
QUICK = ServerLimits(wait=0.01, longest_wait=0.02, seconds=5.0)


@pytest.fixture
def serve(monkeypatch):
    """serve(reply) -> a running Stub."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    running = []

    def start(reply):
        running.append(Stub(reply).start())
        return running[-1]

    yield start
    for stub in running:
        stub.stop()


def asked(stub, tmp_path, questions, **limits):
    """The server's answers and its numbers."""
    with open_server(stub.url, "judge-1", tmp_path / "cache", limits=QUICK._replace(**limits)) as server:
        found = server.ask(questions)
        return found, server.metrics("")


def always(text, top=None):
    return lambda body, number: completion(text, top)


def test_log_probabilities_are_normalised_over_the_two_letters(serve, tmp_path):
    # A: 0.3 + 0.1, B: 0.2, of which the letters' share is 0.6; the rest is said by no letter.
    top = {name: float(np.log(p)) for name, p in {"A": 0.3, " A": 0.1, " B": 0.2, "C": 0.3, "a": 0.1}.items()}
    stub = serve(always("A", top))
    found, counts = asked(stub, tmp_path, ["Which?"])
    np.testing.assert_allclose(found, [2 / 3], rtol=1e-12)
    (body,) = stub.asked
    assert body["model"] == "judge-1" and body["messages"] == [{"role": "user", "content": "Which?"}]
    assert body["temperature"] == 0 and body["logprobs"] is True and body["top_logprobs"] == 20
    assert counts == {
        "requests": 1, "answers": 1, "cache_hits": 0, "retries": 0, "failures": 0, "without_logprobs": 0,
        "prompt_tokens": 30, "completion_tokens": 1,
    }  # fmt: skip


def token(text, logprob, **top):
    return {"token": text, "logprob": logprob, "top_logprobs": [{"token": t, "logprob": p} for t, p in top.items()]}


@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        ("A", [], 1.0),
        ("B.", [], 0.0),
        ("**B**", [], 0.0),
        ("Response A", [], 1.0),
        ("A\n", [], 1.0),
        (" (A)", [], 1.0),
        ('"B"', [], 0.0),
        ("[B]", [], 0.0),
        ("A) It is kinder", [], 1.0),
        ("**B**: it is kinder", [], 0.0),
        ("A - it is kinder", [], 1.0),
        ("B (it is kinder", [], 0.0),
        ("B\n\nIt is kinder", [], 0.0),
        ("<think>\n\n</think>\n\nB", [], 0.0),
        ("Answer: A", [], 1.0),
        ("**Answer:** B", [], 0.0),
        ("answer is: **A**", [], 1.0),
        ("The answer is B.", [], 0.0),
        ("The better response is A", [], 1.0),
        ("I prefer response B, as it", [], 0.0),
        ("Response A is better", [], 1.0),
        ("Option B", [], 0.0),
        ("B is better than the other", [], 0.0),
        ("I choose option A because it", [], 1.0),
        # A word that looks like the letter: the article, a vitamin, a grade.
        ("A tie.", [], None),
        ("A better answer would be shorter", [], None),
        ("Vitamin A deficiency", [], None),
        ("Vitamin A", [], None),
        ("Answer: A tie.", [], None),
        ("The answer is A better one", [], None),
        ("A-level work", [], None),
        ("A.I. wrote both", [], None),
        ("Neither is kind.\nA tie.", [], None),
        ("Response A is worse", [], None),
        ("A or B", [], None),
        ("A/B", [], None),
        ("A, or else B", [], None),
        ("Both", [], None),
        ("a", [], None),
        ("AB", [], None),
        ("", [], None),
        # Where the letter stands, and not before it.
        ("Answer A", [token("Answer", -0.1, A=-9.0, B=-3.0), token(" A", -1.0, B=-1.0)], 0.5),
        # The letter itself counts where the server does not name it among the top ones; and one may be all there is.
        ("B", [token("B", np.log(0.25), A=np.log(0.75))], 0.75),
        ("B", [token("B", -0.1)], 0.0),
        ("B", [token("B", -9999.0, A=-9999.0)], 0.0),
        ("A", [token("A", float("nan"), B=float("inf"))], 0.5),
    ],
)
def test_a_letter_is_read_out_of_an_answer(text, tokens, expected):
    found = letter_probability(text, tokens)
    assert found is expected if expected is None else found == pytest.approx(expected)


@pytest.mark.parametrize(
    "response",
    ["", "A", "[]", "{}", '{"choices": []}', '{"choices": [{"message": {"content": 3}}]}', "<html>busy</html>",
     '{"choices": [{"message": {"content": "A"}, "logprobs": {"content": [7]}}]}'],
)  # fmt: skip
def test_what_is_no_chat_completion_is_told(response):
    with pytest.raises(Failure, match="no chat completion"):
        read_reply(response)


def test_the_letter_alone_decides_where_a_server_has_no_log_probabilities(serve, tmp_path):
    said = {"first": "A", "second": "B"}
    stub = serve(lambda body, number: completion(said[body["messages"][0]["content"]]))
    found, _ = asked(stub, tmp_path, ["second", "first", "second"])
    np.testing.assert_array_equal(found, [0.0, 1.0, 0.0])
    assert len(stub.asked) == 2  # equal questions are asked once


def test_a_server_that_refuses_log_probabilities_is_asked_without_them(serve, tmp_path):
    def reply(body, number):
        return (400, {"error": {"message": "logprobs are not supported"}}) if "logprobs" in body else completion("B")

    stub = serve(reply)
    found, counts = asked(stub, tmp_path, ["1", "2", "3"], at_once=1)
    np.testing.assert_array_equal(found, [0.0, 0.0, 0.0])
    assert [sorted(body) for body in stub.asked[1:]] == [["max_tokens", "messages", "model", "temperature"]] * 3
    assert counts["requests"] == 4 and counts["failures"] == 0 and counts["without_logprobs"] == 3
    again = asked(stub, tmp_path, ["1", "2", "3"])[1]
    assert again["requests"] == 0 and again["without_logprobs"] == 3
    cache = sqlite3.connect(tmp_path / "cache")
    assert not any("logprobs" in request for (request,) in cache.execute("SELECT request FROM answers"))


@pytest.mark.parametrize("status", [400, 422])
def test_a_question_that_a_server_refuses_costs_the_others_no_log_probabilities(serve, tmp_path, status):
    def reply(body, number):
        if body["messages"][0]["content"] == "LONG":
            return status, {"error": {"message": "the question is too long"}}
        return completion("A", {"A": float(np.log(0.75)), "B": float(np.log(0.25))} if "logprobs" in body else None)

    stub = serve(reply)
    found, counts = asked(stub, tmp_path, ["LONG", "1", "2"], at_once=1, failed_share=0.5)
    np.testing.assert_allclose(found, [np.nan, 0.75, 0.75])
    assert ["logprobs" in body for body in stub.asked] == [True, False, True, True]
    assert counts["requests"] == 4 and counts["failures"] == 1 and counts["without_logprobs"] == 0


def test_a_server_that_is_busy_when_asked_without_log_probabilities_has_not_refused_them_yet(serve, tmp_path):
    refused = (400, {"error": {"message": "logprobs are not supported"}})
    stub = serve(lambda body, number: refused if "logprobs" in body else (503, "busy"))
    asked(stub, tmp_path, ["1", "2"], at_once=1, retries=1, failed_share=1.0)
    assert ["logprobs" in body for body in stub.asked] == [True, False, False] * 2


def test_a_busy_server_is_asked_again_after_waits_that_double(serve, tmp_path, monkeypatch):
    waits = []
    wait = threading.Event.wait
    record = lambda self, seconds=None: waits.append(seconds) or wait(self, 0)  # noqa: E731
    troubles = [(429, {"error": "slow down"}), (500, "oh"), (503, "busy"), (429, "", ("Retry-After", "7"))]
    stub = serve(lambda body, number: troubles[number] if number < 4 else completion("A"))
    with open_server(stub.url, "m", tmp_path / "cache", limits=QUICK._replace(wait=1.0, longest_wait=60)) as server:
        monkeypatch.setattr(servers.random, "uniform", lambda low, high: high)
        monkeypatch.setattr(servers.threading.Event, "wait", record)
        np.testing.assert_array_equal(server.ask(["Which?"]), [1.0])
        monkeypatch.undo()
    asked_for = [seconds for seconds in waits if seconds in (0.0, 1.0, 2.0, 4.0, 7.0, 8.0)]
    # 1, 2, 4, and then 8: longer than the 7 that the server asks for.
    assert [s for s in asked_for if s][:4] == [1.0, 2.0, 4.0, 8.0]
    assert server.metrics("")["retries"] == 4 and server.metrics("")["requests"] == 5


def test_a_server_says_how_long_to_wait(serve, tmp_path):
    stub = serve(lambda body, number: completion("A") if number else (429, "", ("Retry-After", "0.4")))
    start = time.monotonic()
    asked(stub, tmp_path, ["Which?"], wait=0.0, longest_wait=5.0)
    assert time.monotonic() - start >= 0.4


@pytest.mark.parametrize(
    ("status", "tries", "words"),
    [(500, 3, r"HTTP 500.*\(3 tries\)"), (429, 3, r"HTTP 429.*\(3 tries\)"), (413, 1, "HTTP 413")],
)
def test_a_server_that_stays_in_trouble_ends_the_run(serve, tmp_path, status, tries, words):
    stub = serve(lambda body, number: (status, {"error": {"message": "no\nway"}}))
    with pytest.raises(UserError, match=words) as caught:
        asked(stub, tmp_path, ["Which?"], retries=2)
    message = str(caught.value)
    assert "\n" not in message and "judge-1 at http://127.0.0.1" in message and "failed on 1 of 1" in message
    assert len(stub.asked) == tries


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_error_that_all_requests_would_meet_ends_the_run_at_once_without_the_key(serve, tmp_path, status):
    stub = serve(lambda body, number: (status, {"error": {"message": f"not with {KEY}"}}))
    with pytest.raises(UserError, match=f"HTTP {status}") as caught:
        asked(stub, tmp_path, [str(n) for n in range(50)], failed_share=1.0, at_once=2)
    assert KEY not in str(caught.value) and "***" in str(caught.value)
    assert stub.keys[0] == f"Bearer {KEY}" and len(stub.asked) <= 4


def test_a_server_that_repeats_the_key_does_not_bring_it_into_a_file_or_a_message(serve, tmp_path):
    stub = serve(always(f"You said {KEY}"))
    with pytest.raises(UserError, match=r"it answers 'You said \*\*\*'"):
        asked(stub, tmp_path, ["Which?"])
    assert KEY.encode() not in (tmp_path / "cache").read_bytes()


def test_a_slow_server_times_out(serve, tmp_path):
    def slow(body, number):
        time.sleep(2.5 if number == 0 else 0.0)
        return completion("A")

    stub = serve(slow)
    found, counts = asked(stub, tmp_path, ["Which?"], seconds=1.0)
    assert found == [1.0] and counts["retries"] == 1
    with pytest.raises(UserError, match=r"no answer within 0.1 seconds \(1 tries\)"):
        asked(serve(lambda *_: time.sleep(0.4) or completion("A")), tmp_path, ["Which?"], seconds=0.1, retries=0)


def test_a_server_that_is_not_there_ends_the_run(serve, tmp_path):
    stub = serve(always("A"))
    stub.stop()
    with pytest.raises(UserError, match=r"no connection: .*\(3 tries\)"):
        asked(stub, tmp_path, ["Which?"], retries=2)


def test_nonsense_is_counted_and_left_out_up_to_a_share(serve, tmp_path):
    says = lambda body, number: completion("A" if int(body["messages"][0]["content"]) > 1 else "Well …")  # noqa: E731
    stub = serve(says)
    found, counts = asked(stub, tmp_path, [str(n) for n in range(20)], failed_share=0.1)
    np.testing.assert_array_equal(np.isnan(found), [True, True] + [False] * 18)
    assert counts["failures"] == 2 and counts["answers"] == 20
    with pytest.raises(UserError, match=r"failed on 2 of 20 .*5% may.*it answers 'Well …', and not A or B"):
        asked(stub, tmp_path, [str(n) for n in range(20)], failed_share=0.05)
    assert len(stub.asked) == 20  # nonsense was paid for, too: the cache had it
    verdicts = both_orders(lambda *_: found, ["?"] * 20, ["a"] * 20, ["b"] * 20)
    np.testing.assert_array_equal(np.isnan(verdicts.shown_first), np.isnan(found))


def test_failures_are_a_share_of_all_calls_and_a_server_that_is_down_is_not_asked_on(serve, tmp_path):
    stub = serve(always("Well …"))
    with open_server(stub.url, "m", tmp_path / "a", limits=QUICK._replace(failed_share=0.5, questions=6)) as server:
        assert np.isnan(server.ask(["1"])) and np.isnan(server.ask(["2", "3"])).all()
        with pytest.raises(UserError, match="failed on 4 of 6 questions"):
            server.ask(["4", "5"])
    stub.asked.clear()
    limits = QUICK._replace(failed_share=1.0, silent_in_a_row=3, at_once=1, retries=0)
    with open_server(stub.url, "m", tmp_path / "b", limits=limits) as server:
        assert np.isnan(server.ask(["1", "2", "3", "4"])).all()  # nonsense is no silence
        stub.reply = lambda body, number: (500, "down")
        server.ask(["5", "6"])
        stub.reply = always("A")
        server.ask(["7"])
        stub.reply = lambda body, number: (500, "down")
        server.ask(["8", "9"])
        with pytest.raises(UserError, match="was silent on 3 questions in a row: HTTP 500"):
            server.ask([str(n) for n in range(10, 40)])
    assert len(stub.asked) < 4 + 2 + 1 + 2 + 10


def test_the_cache_answers_a_second_run_and_knows_other_requests(serve, tmp_path):
    stub = serve(always("B"))
    questions = ["1", "2", "3"]
    first, _ = asked(stub, tmp_path, questions)
    again, counts = asked(stub, tmp_path, questions)
    np.testing.assert_array_equal(first, again)
    assert len(stub.asked) == 3 and counts["cache_hits"] == 3 and counts["requests"] == counts["prompt_tokens"] == 0
    asked(stub, tmp_path, questions, answer_tokens=9)  # another request
    asked(stub, tmp_path, ["4"])
    with open_server(stub.url, "judge-2", tmp_path / "cache", limits=QUICK) as server:
        server.ask(["1"])
    assert len(stub.asked) == 3 + 3 + 1 + 1
    other = serve(always("A"))  # another address
    np.testing.assert_array_equal(asked(other, tmp_path, questions)[0], [1.0] * 3)
    assert KEY.encode() not in (tmp_path / "cache").read_bytes()


def test_a_run_that_ends_early_keeps_what_it_has_paid_for(serve, tmp_path):
    stub = serve(always("A"))
    questions = [str(n) for n in range(9)]
    with pytest.raises(UserError, match="was asked 5 times, which is the limit"):
        asked(stub, tmp_path, questions, requests=5, at_once=3)
    assert len(stub.asked) == 5
    _, counts = asked(stub, tmp_path, questions, requests=4)
    assert len(stub.asked) == 9 and counts["cache_hits"] == 5


def test_so_many_requests_at_once_and_no_more(serve, tmp_path):
    def reply(body, number):
        time.sleep(0.1)
        return completion("A")

    stub = serve(reply)
    asked(stub, tmp_path, [str(n) for n in range(12)], at_once=3)
    assert stub.most == 3


def test_a_judge_and_a_grader_ask_by_a_principle(serve, tmp_path):
    stub = serve(lambda body, number: completion("A" if "less harmful" in body["messages"][0]["content"] else "B"))
    principles = ["Choose the response that is less harmful.", "Choose the wittier response."]
    with open_server(stub.url, "m", tmp_path / "cache", limits=QUICK) as server:
        verdicts = both_orders(comparing(server.ask, principles), ["p", "q"], ["x", "y"], ["z", "w"])
        scores = grader(server.ask, principles[0])(["p"], ["x"])
    np.testing.assert_array_equal(verdicts.shown_first, [1.0, 0.0])
    np.testing.assert_array_equal(verdicts.shown_second, [0.0, 1.0])
    np.testing.assert_array_equal(scores, [1.0])
    with pytest.raises(ValueError, match="zip"):
        comparing(server.ask, principles)(["p"], ["x"], ["z"])


def test_threads_share_a_cache_and_a_damaged_one_is_told(tmp_path):
    cache = Cache(tmp_path / "cache")
    work = [
        threading.Thread(target=lambda n=n: [cache.put({"n": n, "i": i}, str(i)) for i in range(20)]) for n in "ab"
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    other = Cache(tmp_path / "cache")  # as another process would
    assert [other.get({"i": i, "n": n}) for n in "ab" for i in range(20)] == [str(i) for i in range(20)] * 2
    assert other.get({"n": "c"}) is None
    assert sqlite3.connect(tmp_path / "cache").execute("SELECT count(*) FROM answers").fetchone() == (40,)
    (tmp_path / "broken").write_text("no database " * 100)
    with pytest.raises(UserError, match="broken cannot be used"):
        Cache(tmp_path / "broken")
    with pytest.raises(UserError, match="cannot be opened"):
        Cache(tmp_path / "broken" / "inside")


def test_a_killed_process_keeps_what_it_has_put(tmp_path):
    program = (
        "import os, sys; from rlhf_jax.rewards.cache import Cache; cache = Cache(sys.argv[1]);"
        "cache.put({'n': 1}, 'paid for'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path / "cache")]).returncode == -9
    assert Cache(tmp_path / "cache").get({"n": 1}) == "paid for"


def test_a_password_in_the_url_is_refused_and_so_is_a_missing_package(tmp_path, monkeypatch):
    for url in ("http://me:secret@127.0.0.1/v1", "http://127.0.0.1/v1?key=secret"):
        with pytest.raises(UserError, match="no password") as caught, open_server(url, "m", tmp_path / "c"):
            pass
        assert "secret" not in str(caught.value)
    monkeypatch.setattr(servers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'rlhf_jax\[server\]'"), open_server("http://x", "m", tmp_path):
        pass
