"""Demonstrators err at their rates; annotators agree, and have a ceiling, as the noise says."""

import numpy as np
import pytest

from rlhf_jax.simulation import (
    Annotators,
    Demonstrators,
    agreement_rate,
    calibrate_noise,
    ceiling,
    draw_problems,
    is_exact,
)
from rlhf_jax.simulation.world import FILLERS, FLATTERY, TONE_WORDS


def test_demonstrators_err_pad_and_flatter_at_their_rates():
    rng = np.random.default_rng(0)
    problems = draw_problems(rng, 4000)
    people = Demonstrators()
    texts = [people.write(rng, p) for p in problems]
    exact = np.mean([is_exact(p, t) for p, t in zip(problems, texts, strict=True)])
    np.testing.assert_allclose(exact, 1 - people.error, atol=0.03)
    fillers = sum(w in FILLERS for t in texts for w in t.split())
    others = sum(w not in FILLERS + FLATTERY for t in texts for w in t.split())
    # Geometric before each word, but for the cap.
    np.testing.assert_allclose(fillers / others, people.filler / (1 - people.filler), atol=0.03)
    assert max(sum(w in FILLERS for w in t.split()) for t in texts) == people.most_fillers
    assert max(len(t.split()) for t in texts) < 20
    flattery = np.mean([sum(w in FLATTERY for w in t.split()) for t in texts])
    np.testing.assert_allclose(flattery, 2 * people.flattery, atol=0.02)
    toned = np.mean([sum(w in TONE_WORDS for w in t.split()) for t in texts])
    np.testing.assert_allclose(toned, people.opener + people.closer, atol=0.03)
    np.testing.assert_allclose(np.mean(["." in t.split() for t in texts]), people.stop, atol=0.03)


def test_a_mistake_is_always_wrong():
    rng = np.random.default_rng(1)
    problems = draw_problems(rng, 300)
    bad = Demonstrators(error=1.0)
    assert not any(is_exact(p, bad.write(rng, p)) for p in problems)


def test_annotators_perceive_with_their_biases():
    seen = Annotators(noise=1.0, length_bias=0.1, flattery_bias=0.45).perceive(
        np.array([1.0, 2.0]), ["ant dog fox", "brilliant ant"]
    )
    np.testing.assert_allclose(seen, [1.3, 2.65])


def test_pairs_follow_bradley_terry_and_agreement_follows_the_noise():
    rng = np.random.default_rng(2)
    annotators = Annotators(noise=0.7)
    perceived = np.tile([1.0, 0.4], (40_000, 1))
    first = annotators.rank(rng, perceived)[:, 0] == 0
    p = 1 / (1 + np.exp(-0.6 / 0.7))
    np.testing.assert_allclose(first.mean(), p, atol=0.01)
    again = annotators.rank(rng, perceived)[:, 0] == 0
    np.testing.assert_allclose((first == again).mean(), agreement_rate(np.array([0.6]), 0.7), atol=0.01)
    np.testing.assert_allclose(agreement_rate(np.array([0.6]), 0.7), p**2 + (1 - p) ** 2, rtol=1e-12)
    np.testing.assert_allclose(ceiling(np.array([-0.6]), 0.7), p, rtol=1e-12)


def test_rankings_follow_plackett_luce():
    perceived = np.array([0.5, 0.0, -1.0])
    ranks = Annotators(noise=0.5).rank(np.random.default_rng(3), np.tile(perceived, (60_000, 1)))
    weights = np.exp(perceived / 0.5)
    best, middle, worst = weights
    expected = best / weights.sum() * middle / (middle + worst)
    np.testing.assert_allclose((ranks == [0, 1, 2]).all(axis=1).mean(), expected, atol=0.01)
    assert sorted(ranks[0]) == [0, 1, 2]


def test_noise_is_found_for_a_rate_and_refused_where_none_gives_it():
    differences = np.random.default_rng(4).normal(size=2000)
    noise = calibrate_noise(differences, 0.73)
    np.testing.assert_allclose(agreement_rate(differences, noise), 0.73, atol=1e-6)
    with pytest.raises(ValueError, match="no noise"):
        calibrate_noise(differences, 0.5)
    with pytest.raises(ValueError, match="no noise"):
        calibrate_noise(np.zeros(5), 0.73)
