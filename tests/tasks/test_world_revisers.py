"""The world's assistants repair what a principle is about, now and then; its judge has a known bias."""

import numpy as np
import pytest

from rlhf_jax.simulation import PRINCIPLES, Annotators, Problem, Revisers, utility
from rlhf_jax.simulation.world import FLATTERY, draw_problems

PROBLEM = Problem("kindly sort fox ant", "kindly", ("ant", "fox"))
SURE, NEVER = Revisers(notice=1.0, slip=0.0), Revisers(notice=0.0, slip=0.0)
BY_NAME = {principle.name: principle for principle in PRINCIPLES}


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("right", "sure fox ant .", "sure ant fox ."),
        ("right", "um", "um ant fox"),
        ("right", "answer ant um fox", "answer ant um fox"),
        ("tone", "ant fox .", "sure ant fox friend ."),
        ("tone", "friend ant fox sure", "sure ant fox friend"),
        ("form", "sure ant fox friend", "sure answer ant fox friend ."),
        ("form", "sure answer ant fox friend .", "sure answer ant fox friend ."),
        ("short", "um sure ant well fox", "sure ant fox"),
        ("honest", "genius ant fox wise", "ant fox"),
    ],
)
def test_each_principle_repairs_its_fault_and_nothing_else(name, before, after):
    rng = np.random.default_rng(0)
    critique, revised = SURE.revise(rng, PROBLEM, before, BY_NAME[name])
    assert revised == after
    assert (critique == "nothing is wrong") == (before == after)
    assert utility(PROBLEM, after, ended=True) >= utility(PROBLEM, before, ended=True)
    assert NEVER.revise(rng, PROBLEM, before, BY_NAME[name]) == ("nothing is wrong", before)


def test_all_principles_together_make_a_perfect_answer():
    rng = np.random.default_rng(1)
    for problem in draw_problems(rng, 50):
        answer = "genius um fox well"
        for principle in PRINCIPLES:
            _, answer = SURE.revise(rng, problem, answer, principle)
        assert utility(problem, answer, ended=True) == pytest.approx(2.7)


def test_faults_are_seen_and_made_at_their_rates():
    rng, often = np.random.default_rng(2), Revisers(notice=0.7, slip=0.2)
    found = [often.revise(rng, PROBLEM, "wise ant fox", BY_NAME["honest"])[1] for _ in range(2000)]
    honest = np.mean([not set(text.split()) & set(FLATTERY) for text in found])
    wrong = np.mean([[w for w in text.split() if w not in FLATTERY] != ["ant", "fox"] for text in found])
    assert abs(honest - 0.7) < 4 * np.sqrt(0.7 * 0.3 / 2000) and abs(wrong - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 2000)


def test_the_judges_probability_is_that_of_annotators_who_look_with_noise():
    people = Annotators(noise=0.5, length_bias=0.0, flattery_bias=1.0)
    seen = people.perceive(np.array([1.0, 1.0]), ["ant", "ant wise"])
    p = people.prefer(*seen[:, None])[0]
    assert p == pytest.approx(1 / (1 + np.exp(1.0 / 0.5)))
    rng = np.random.default_rng(3)
    wins = np.mean([people.rank(rng, seen)[0] == 0 for _ in range(4000)])
    assert abs(wins - p) < 4 * np.sqrt(p * (1 - p) / 4000)
