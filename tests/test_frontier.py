"""The optimum of a reward minus β·KL by reweighting, against closed forms."""

import numpy as np
import pytest

from rlhf_jax.frontier import frontier, optimal_weights, optimum


def test_weights_by_hand():
    np.testing.assert_allclose(optimal_weights([[0.0, np.log(3.0)]], 1.0), [[0.25, 0.75]])
    np.testing.assert_allclose(optimal_weights([[0.0, np.log(3.0)]], 0.5), [[0.1, 0.9]])
    np.testing.assert_allclose(optimal_weights([[5e4, 5e4, -5e4]], 0.01), [[0.5, 0.5, 0.0]])
    found = optimum([[0.0, np.log(3.0)]], 1.0, [[1.0, -1.0]])
    assert found.score == pytest.approx(0.75 * np.log(3.0)) and found.value == pytest.approx(-0.5)
    assert found.kl == pytest.approx(np.log(2) + 0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert found.effective == pytest.approx(1 / (0.25**2 + 0.75**2))


def test_it_is_the_optimum_of_normal_rewards():
    """r ~ N(0, 1) under π_ref: π* has r ~ N(1/β, 1), at KL 1/(2β²)."""
    scores = np.random.default_rng(0).normal(size=(400, 2000))
    for beta in (2.0, 1.0, 0.7):
        found = optimum(scores, beta, 3 * scores + 1)
        assert found.score == pytest.approx(1 / beta, rel=0.03) and found.kl == pytest.approx(0.5 / beta**2, rel=0.03)
        assert found.value == pytest.approx(3 * found.score + 1)


def test_no_weights_of_the_same_answers_do_better_at_that_beta():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(5, 40))

    def objective(weights):
        return ((weights * scores).sum(axis=1) - 0.3 * (np.log(40) + (weights * np.log(weights)).sum(axis=1))).mean()

    best = optimum(scores, 0.3)
    assert objective(optimal_weights(scores, 0.3)) == pytest.approx(best.score - 0.3 * best.kl)
    for _ in range(50):
        other = optimal_weights(scores, 0.3) * np.exp(0.1 * rng.normal(size=scores.shape))
        assert objective(other / other.sum(axis=1, keepdims=True)) < best.score - 0.3 * best.kl


def test_it_is_cut_off_where_few_answers_have_weight():
    scores = np.random.default_rng(2).normal(size=(20, 512))
    found = frontier(scores, [0.01, 3.0, 0.6, 1.0], least=10.0)
    assert [one.beta for one in found] == [3.0, 1.0, 0.6] and all(one.effective >= 10 for one in found)
    assert [one.kl for one in found] == sorted(one.kl for one in found)
    assert [one.score for one in found] == sorted(one.score for one in found)
    assert np.isnan(found[0].value)


@pytest.mark.parametrize("beta", [0.0, -1.0])
def test_a_beta_that_has_no_optimum(beta):
    with pytest.raises(ValueError, match="positive"):
        optimum(np.zeros((1, 2)), beta)


def test_values_of_another_shape():
    with pytest.raises(ValueError, match=r"\(1, 3\) do not belong to scores of shape \(1, 2\)"):
        optimum(np.zeros((1, 2)), 1.0, np.zeros((1, 3)))
