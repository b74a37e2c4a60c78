"""What the experiments' reports look for is what the stages log."""

import json

import pytest

from experiments import reports
from experiments.rules import PPO_RULES
from rlhf_jax.sections import Report, from_json, to_json
from rlhf_jax.verdict import findings

REPORTS = {name: value for name, value in vars(reports).items() if isinstance(value, Report)}


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_is_plain_data_whose_sections_have_titles_of_their_own(name):
    shown = REPORTS[name]
    assert from_json(Report, json.loads(json.dumps(to_json(shown)))) == shown
    titles = [one.title for one in shown.headlines] + [one.title + one.stage for one in shown.sections]
    assert len(set(titles)) == len(titles)


def line(start, end, count=12):
    return [start + (end - start) * i / (count - 1) for i in range(count)]


GOOD = {
    "score": line(0, 2), "utility": line(1, 2), "watched": line(1, 1), "kl_k1": line(0, 7), "ended": line(0.9, 1),
    "entropy": line(1, 0.7), "explained_variance": line(0, 0.6), "no_end": line(0.1, 0.0), "skipped": [0] * 12,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"ended": line(0.5, 0.1)}, ["few answers end"]),
        ({"score": [1.0] * 12}, ["nothing improves"]),
        ({"no_end": line(0.6, 0.9)}, ["acts on"]),
        ({"kl_k1": line(0, 400)}, ["KL from the reference reaches"]),
        ({"entropy": line(1, 0.01)}, ["entropy collapses"]),
        ({"watched": line(1, 0)}, ["what is watched falls"]),
        ({"utility": line(2, 0)}, ["the reward is hacked"]),
        ({"explained_variance": line(0, -1)}, ["critic explains nothing"]),
        ({"skipped": line(0, 3)}, ["skipped"]),
    ],
)
def test_a_bad_ppo_run_is_told_from_a_good_one(changes, words):
    series = GOOD | changes
    rows = [{"step": i, **{name: values[i] for name, values in series.items()}} for i in range(12)]
    bad = [one.sentence for one in findings(PPO_RULES, {"ppo": rows}, {}) if one.bad]
    assert len(bad) == len(words)
    assert all(word in sentence for word, sentence in zip(words, bad, strict=True))
