"""What rules find in a run's metrics."""

import numpy as np
import pytest

from rlhf_jax.verdict import Condition, Finding, Rule, findings, holds, moved

FLAT = np.random.default_rng(0).normal(size=60)
UP = FLAT + np.linspace(0, 6, 60)


@pytest.mark.parametrize(
    ("sees", "threshold", "values", "expected"),
    [
        ("ends below", 0.5, [1.0, 1.0, 0.4], True),
        ("ends below", 0.5, [0.1, 0.1, 0.6], False),
        ("ends above", 0.5, [0.6], True),
        ("ends above", 0.5, [0.5], False),
        ("shrinks to", 0.1, [2.0, 1.0, 0.5, 0.19], True),
        ("shrinks to", 0.1, [2.0, 1.0, 0.5, 0.21], False),
        ("grows to", 3.0, [1.0, 2.0, 2.0, 3.1], True),
        ("grows to", 3.0, [1.0, 2.0, 2.0, 2.9], False),
        ("rises", 3.0, UP, True),
        ("rises", 3.0, FLAT, False),
        ("rises", 3.0, -UP, False),
        ("falls", 3.0, -UP, True),
        ("falls", 3.0, FLAT, False),
        ("does not rise", 3.0, FLAT, True),
        ("does not rise", 3.0, -UP, True),
        ("does not rise", 3.0, UP, False),
        ("does not fall", 3.0, FLAT, True),
        ("does not fall", 3.0, -UP, False),
        ("does not rise", 3.0, np.full(9, 2.0), True),
        ("rises", 3.0, np.linspace(0, 1, 9), True),
        ("does not rise", 3.0, [1.0, 1.0, 1.0], None),
        ("ends below", 3.0, [], None),
    ],
)
def test_a_condition_holds_or_not_or_cannot_be_told(sees, threshold, values, expected):
    assert holds(Condition("x", sees, threshold), np.asarray(values, np.float64)) is expected


def test_how_far_a_metric_moved_is_in_standard_errors():
    # 10 values: the ends are the first and the last two, 3 apart; the noise is sqrt(mean of squared differences / 2).
    values = np.array([0.0, 2, 1, 1, 3, 2, 2, 4, 3, 5])
    noise = np.sqrt((4 + 1 + 0 + 4 + 1 + 0 + 4 + 1 + 4) / 9 / 2)
    np.testing.assert_allclose(moved(values), 3 / (noise * np.sqrt(1 / 2 + 1 / 2)), rtol=1e-12)
    np.testing.assert_allclose(moved(values[::-1]), -moved(values), rtol=1e-12)
    # On noise alone it is that of a standard normal, whatever the length.
    for length in (20, 200):
        z = [moved(np.random.default_rng(seed).normal(size=length)) for seed in range(2000)]
        assert 0.8 < np.std(z) < 1.25


def rows(**series):
    return [
        {"step": i, **dict(zip(series, at, strict=True))} for i, at in enumerate(zip(*series.values(), strict=True))
    ]


HACKED = Rule(
    "ppo",
    (Condition("score", "rises", 2.0), Condition("watched", "falls", 2.0)),
    "from {start:.0f} to {end:.0f}, while {starts[1]:.0f} becomes {ends[1]:.0f}",
    "not hacked",
)
ENDED = Rule("ppo", (Condition("ended", "ends below", 0.5),), "few end: {end:.0%}", "{end:.0%} end")
FINAL = Rule(None, (Condition("accuracy", "ends below", 0.55),), "chance: {end:.2f}")


def test_findings_are_of_what_was_measured_the_bad_first():
    line = np.arange(10.0)
    good = {"ppo": rows(ended=[0.9] * 10, score=line, watched=line)}
    bad = {"ppo": rows(ended=[0.25] * 10, score=line, watched=9 - line)}
    rules = (ENDED, HACKED, FINAL)
    assert findings(rules, good, {"accuracy": 0.7}) == [Finding(False, "90% end"), Finding(False, "not hacked")]
    assert findings(rules, bad, {"accuracy": 0.5}) == [
        Finding(True, "few end: 25%"), Finding(True, "from 0 to 8, while 8 becomes 0"), Finding(True, "chance: 0.50"),
    ]  # fmt: skip
    mixed = {"ppo": rows(ended=[0.9] * 10, score=line, watched=9 - line)}
    assert [one.bad for one in findings(rules, mixed, {"accuracy": None})] == [True, False]
    # Nothing is said of what was not measured, not measured as a number, or measured too seldom.
    assert findings(rules, {}, {}) == []
    assert findings((HACKED,), {"ppo": rows(score=line)}, {}) == []
    assert findings((HACKED,), {"ppo": rows(score=line, watched=[None] * 10)}, {}) == []
    assert findings((HACKED,), {"ppo": rows(score=line[:3], watched=line[:3])}, {}) == []
