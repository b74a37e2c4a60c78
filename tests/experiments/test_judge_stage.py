"""A judge on comparisons from the command: its numbers by hand, its labels, and a run that was cut short."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from stub_server import Stub, completion

from experiments import evaluate, judge
from experiments.judging import OpenJudge, judged
from rlhf_jax.data.suites import read_preferences
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate import trinomial_interval, wilson_interval
from rlhf_jax.metrics import read_metrics
from rlhf_jax.pretrained import load_policy
from rlhf_jax.rewards.judge import COMPARE, Verdicts, both_orders, letter_judge

pytestmark = pytest.mark.usefixtures("undrawn")

# Of each pair, the probability that the judge gives to the first response: people's choice first, then second.
TOLD = {"one": (0.9, 0.2), "two": (0.8, 0.6), "three": (0.3, 0.6), "four": (0.9, 0.9), "five": (None, 0.5)}
ROWS = [
    {"prompt": name, "chosen": f"{name} good, it is", "rejected": f"{name} bad", "subset": "s"} for name in TOLD
] + [{"chosen": "\n\nHuman: six\n\nAssistant: Well?\n\nHuman: Yes.\n\nAssistant: six good, it is",
      "rejected": "\n\nHuman: six\n\nAssistant: Well?\n\nHuman: Yes.\n\nAssistant: six bad"}]  # fmt: skip


def reply(body, number):
    """Answers as TOLD says; "six" as "one"."""
    text = body["messages"][0]["content"]
    first = re.search(r"Response A:\n(.*)", text)[1]
    name, value = first.split()[:2]
    probability = TOLD.get(name, TOLD["one"])[value == "bad"]
    if probability is None:
        return completion("I cannot say")
    top = {"A": float(np.log(probability)), "B": float(np.log(1 - probability))}
    return completion(max(top, key=top.get), top)


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    running = Stub(reply).start()
    yield running
    running.stop()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def config(stub, tmp_path, name="run", **flags):
    # The transcript is another form: each form is a file of its own.
    file = write(tmp_path / "pairs.jsonl", ROWS[:-1])
    given = {"judge": stub.url, "judge_model": "m", "comparisons": file, "judge_max_failed": 0.5} | flags
    return judge.Config(run_dir=str(tmp_path / name), **given)


def test_every_number_is_that_by_hand(stub, tmp_path):
    metrics = judge.main(config(stub, tmp_path))
    # P(chosen): one 0.9 and 0.8; two 0.8 and 0.4; three 0.3 and 0.4; four 0.9 and 0.1, a tie; five has failed.
    expected = {
        "judge_agreement": trinomial_interval(2, 1, 1), "judge_agreement_first": trinomial_interval(3, 0, 1),
        "judge_agreement_second": trinomial_interval(1, 0, 3), "judge_orders_agree": wilson_interval(2, 4),
        "judge_length_baseline": trinomial_interval(5, 0, 0),
    }  # fmt: skip
    for name, rate in expected.items():
        found = [metrics[name + end] for end in ("", "_low", "_high")]
        assert found == pytest.approx(list(rate)), name
    # Verdicts for the first place: one A B, two A A, three B A, four A A.
    assert metrics["judge_takes_first"] == pytest.approx(6 / 8)
    assert metrics["judge_mean_first"] == pytest.approx((0.9 + 0.2 + 0.8 + 0.6 + 0.3 + 0.6 + 0.9 + 0.9) / 8)
    # Agreements 1, 1, 0, ½ have variance 11/64; 1, 1, 0, 1 have 3/16.
    assert metrics["judge_agreement_se"] == pytest.approx(np.sqrt(11 / 64) / 2)
    assert metrics["judge_agreement_first_se"] == pytest.approx(np.sqrt(3 / 16) / 2)
    assert (
        metrics["judge_ties"] == 0.25 and metrics["judge_failed"] == pytest.approx(0.2) and metrics["judge_pairs"] == 4
    )
    assert metrics["judge_requests"] == 10 and metrics["judge_failures"] == 1 and metrics["judge_prompt_tokens"] == 300
    saved = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert saved == pytest.approx(metrics)
    assert all(COMPARE in body["messages"][0]["content"] for body in stub.asked)


def test_its_labels_are_comparisons_with_a_probability(stub, tmp_path):
    cfg = config(stub, tmp_path)
    judge.main(cfg)
    rows = lines(tmp_path / "run" / "comparisons.jsonl")
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in rows] == [
        ("one", "one good, it is", "one bad"), ("two", "two good, it is", "two bad"),
        ("three", "three bad", "three good, it is"),  # as the judge has it, not people
    ]  # fmt: skip
    np.testing.assert_allclose([row["probability"] for row in rows], [0.85, 0.6, 0.65])
    read = read_preferences(str(tmp_path / "run" / "comparisons.jsonl"), None)
    assert [pair.responses[0][0]["content"] for pair in read.pairs] == [row["chosen"] for row in rows]
    assert [pair.probability for pair in read.pairs] == [row["probability"] for row in rows]  # soft labels
    assert not any("not read" in note for note in read.notes)
    told = lines(tmp_path / "run" / "verdicts.jsonl")
    assert [row["line"] for row in told] == [1, 2, 3, 4, 5]
    assert told[4] == {"line": 5, "chosen_first": None, "chosen_second": 0.5, "probability": None}
    assert told[0]["probability"] == pytest.approx(0.85)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "The judge and people" in page and "three good" in page


def test_a_conversation_is_judged_and_written_as_one(stub, tmp_path):
    file = write(tmp_path / "six.jsonl", ROWS[-1:])
    judge.main(config(stub, tmp_path, comparisons=file, principle="Which is kinder?"))
    asked = stub.asked[0]["messages"][0]["content"]
    assert asked.startswith("Which is kinder?\n\nPrompt:\nUser: six\n\nAssistant: Well?\n\nUser: Yes.\n\nResponse A:")
    (row,) = lines(tmp_path / "run" / "comparisons.jsonl")
    before, after = read_preferences(file, None), read_preferences(str(tmp_path / "run" / "comparisons.jsonl"), None)
    assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant", "user"]
    assert before.pairs[0].prompt == after.pairs[0].prompt and before.pairs[0].responses == after.pairs[0].responses


def test_a_prompt_that_reads_like_a_transcript_stays_what_it_is():
    text = "Human: is this a transcript?"
    assert judge.shown(({"role": "user", "content": text},)) == [{"role": "user", "content": text}]
    assert judge.shown(({"role": "user", "content": "no"},)) == "no"


def test_a_run_that_was_cut_short_goes_on_with_what_it_has_paid_for(stub, tmp_path):
    judge.main(config(stub, tmp_path, "whole"))
    whole = (tmp_path / "whole" / "comparisons.jsonl").read_bytes()
    cfg = config(stub, tmp_path, judge_max_requests=6, batch_size=1)
    with pytest.raises(UserError, match="asked 6 times"):
        judge.main(cfg)
    assert not (tmp_path / "run" / "comparisons.jsonl").exists() and len(stub.asked) == 10 + 6
    judge.main(replace(cfg, resume=True, judge_max_requests=None))
    assert (tmp_path / "run" / "comparisons.jsonl").read_bytes() == whole
    assert len(stub.asked) == 10 + 10
    assert [row["step"] for row in read_metrics(tmp_path / "run")["judge"]] == [4, 5]


def test_a_server_that_fails_too_often_ends_in_one_line_and_nothing_is_labelled(stub, tmp_path):
    with pytest.raises(UserError, match=r"failed on 1 of 10 .*'I cannot say', and not A or B.*judge.sqlite"):
        judge.main(config(stub, tmp_path, judge_max_failed=0.05))
    assert not (tmp_path / "run" / "comparisons.jsonl").exists()
    assert (tmp_path / "run" / "judge.sqlite").exists()


def test_nothing_is_left_of_a_run_whose_server_never_answered(stub, tmp_path):
    cfg = config(stub, tmp_path)
    stub.reply = lambda body, number: (404, {"error": {"message": "no such model"}})
    with pytest.raises(UserError, match=r"HTTP 404.*are URL and model right"):
        judge.main(cfg)
    assert not (tmp_path / "run").exists()


def test_a_model_of_ours_judges(stories, tmp_path):
    rows = [{"prompt": "Who?", "chosen": "Lily.", "rejected": text} for text in ("The dog ran.", "A cat and a boat.")]
    ranked = {"prompt": "Who?", "responses": ["Tom.", "Lily sat.", "Oh."], "ranks": [1, 0, 1]}
    file = write(tmp_path / "pairs.jsonl", rows)
    metrics = judge.main(
        judge.Config(run_dir=str(tmp_path / "run"), judge=stories, comparisons=file, batch_size=2, max_length=512)
    )
    found = lines(tmp_path / "run" / "verdicts.jsonl")
    expected = both_orders(
        letter_judge(load_policy(stories), batch_size=2, max_length=512),
        ["Who?"] * 2, ["Lily."] * 2, [row["rejected"] for row in rows],
    )  # fmt: skip
    for name, verdicts in zip(("chosen_first", "chosen_second"), expected, strict=True):
        np.testing.assert_allclose([row[name] for row in found], verdicts, rtol=1e-5)
    assert metrics["judge_pairs"] == 2 and "judge_requests" not in metrics
    said = []
    listener = type("Run", (), {"say": staticmethod(said.append)})
    pairs = judge.read_pairs(write(tmp_path / "ranked.jsonl", [ranked]), None, listener)
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("Lily sat.", "Tom."), ("Lily sat.", "Oh.")]


def test_pairs_that_failed_are_left_out_of_a_win_rate():
    verdicts = iter([[0.9, 0.8, np.nan], [0.3, 0.7, 0.4]])
    metrics, columns = judged(OpenJudge(lambda questions: next(verdicts), dict), ["p"] * 3, ["a"] * 3, ["b"] * 3)
    assert metrics["win_rate_judge"] == 0.75 and metrics["win_rate_judge_n"] == 2
    assert metrics["judge_failed"] == pytest.approx(1 / 3)
    assert columns["shown_first"] == [0.9, 0.8, None] and columns["shown_second"] == pytest.approx([0.7, 0.3, 0.6])
    with pytest.raises(UserError, match="failed on all of 1"):
        judged(OpenJudge(lambda questions: [np.nan], dict), ["p"], ["a"], ["b"])


def test_evaluation_takes_a_server_as_its_judge(stub, stories, tmp_path):
    stub.reply = lambda body, number: completion("A")
    metrics = evaluate.main(
        evaluate.Config(
            run_dir=str(tmp_path / "run"), model=stories, against=stories, judge=stub.url, judge_model="m",
            prompts=write(tmp_path / "prompts.jsonl", [{"prompt": "Who?"}, {"prompt": "Tell me."}]), max_new_tokens=4,
        )
    )  # fmt: skip
    assert metrics["win_rate_judge"] == 0.5 and metrics["judge_takes_first"] == 1.0 and metrics["judge_failed"] == 0
    assert metrics["judge_requests"] == 2  # the same greedy answers, so both orders are one question


def test_a_judge_without_any_verdict_has_no_agreement():
    metrics = judge.measure(Verdicts(np.array([np.nan]), np.array([0.5])))
    assert metrics["judge_failed"] == 1.0 and np.isnan(metrics["judge_agreement"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"judge": "http://127.0.0.1:1/v1"}, "--judge URL and --judge-model NAME"),
        ({"judge": "folder", "judge_model": "m"}, "--judge URL and --judge-model NAME"),
        ({"principle": " "}, "--principle is empty"),
        ({"judge_at_once": 0}, "judge-at-once"),
        ({"limit": 0}, "limit"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        judge.Config(**flags)


def test_a_judge_and_comparisons_are_needed():
    with pytest.raises(UserError, match="--comparisons FILE"):
        judge.main(judge.Config(judge="folder"))
