"""What an evaluation counts, from answers and scores that are known."""

from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from experiments import evaluate, judging
from rlhf_jax.data import suites
from rlhf_jax.data.rejects import Place
from rlhf_jax.evaluate import clustered_rate, trinomial_interval, wilson_interval
from rlhf_jax.pretrained import Pretrained
from rlhf_jax.sampling.texts import TextAnswers


class Quiet:
    """A run that is not listened to."""

    first = True

    def __init__(self, folder):
        self.dir = folder

    def say(self, _): ...


@pytest.fixture(scope="module")
def tokenizer(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "model" / "stories260K-hf")


def stand_in(name, tokenizer=None):
    """A model whose answers are given."""
    return Pretrained(SimpleNamespace(max_length=64), None, tokenizer, name)


def give(monkeypatch, **answers):
    monkeypatch.setattr(evaluate, "respond", lambda cfg, model, prompts, side=0: answers[model.name])


def answered(texts, ended):
    """Answers whose ids are the letters of their texts."""
    return TextAnswers(texts, np.array(ended), [([1], [ord(c) for c in text]) for text in texts])


def rates(metrics, **expected):
    """Each a share of so many, with the interval of that many."""
    for name, (part, whole) in expected.items():
        found = tuple(metrics[name + end] for end in ("", "_low", "_high", "_n"))
        assert found == pytest.approx((*wilson_interval(part, whole), whole)), name


def found(metrics, name):
    """A rate with its interval."""
    return pytest.approx(tuple(metrics[name + end] for end in ("", "_low", "_high")))


def test_ifeval_counts_prompts_and_instructions_strictly_and_loosely(monkeypatch, tmp_path):
    both = ["punctuation:no_comma", "detectable_format:title"]
    rows = [suites.Instruction("Say.", both, [{}, {}])] * 3 + [suites.Instruction("Say.", both[:1], [{}])]
    # Both; both but for the first line; neither; the only one.
    texts = ["<<A>> b.", "Sure, this:\n<<A>> b.", "A, b.", "A."]
    give(monkeypatch, ours=answered(texts, [True, False, True, True]))
    metrics = evaluate.evaluate_ifeval(evaluate.Config(), stand_in("ours"), rows, Quiet(tmp_path))
    rates(
        metrics, ifeval_prompt_strict=(2, 4), ifeval_prompt_loose=(3, 4), ifeval_ended=(3, 4)
    )  # fmt: skip
    # Instructions of one prompt are not independent.
    assert clustered_rate([2, 1, 0, 1], [2, 2, 2, 1]) == found(metrics, "ifeval_instruction_strict")
    assert clustered_rate([2, 2, 0, 1], [2, 2, 2, 1]) == found(metrics, "ifeval_instruction_loose")
    assert metrics["ifeval_instruction_loose_n"] == 7


def test_gsm8k_counts_strictly_and_leniently(monkeypatch, tmp_path):
    rows = [suites.MathProblem("2 + 3?", "#### 5")] * 3
    give(monkeypatch, ours=answered(["#### 5", "It is 5", "#### 4 or 5"], [True, False, False]))
    metrics = evaluate.evaluate_gsm8k(evaluate.Config(), stand_in("ours"), rows, Quiet(tmp_path))
    rates(metrics, gsm8k_strict=(1, 3), gsm8k_lenient=(2, 3), gsm8k_ended=(1, 3))


def test_the_evaluated_model_wins_where_its_answer_scores_higher(monkeypatch, tmp_path, tokenizer):
    give(monkeypatch, ours=answered(["a b c", "a b", "a b", "a"], [True] * 4), theirs=answered(["a"] * 4, [True] * 4))
    monkeypatch.setattr(
        evaluate, "document_rewards", lambda model, pairs, batch_size: np.array([len(r) for _, r in pairs])
    )
    monkeypatch.setattr(judging, "letters", lambda *_, **__: lambda questions: [1, 1, 0, 0])
    models = evaluate.Models(*(stand_in(name, tokenizer) for name in ("ours", "theirs", "reward", "judge")))
    metrics = evaluate.evaluate_win_rate(evaluate.Config(prompts="FILE"), models, ["Who?"] * 4, Quiet(tmp_path))
    # Three are longer and one is a tie; a judge who always says the same has a place, and no winner.
    assert trinomial_interval(3, 1, 0) == found(metrics, "win_rate_reward_model")
    assert trinomial_interval(0, 4, 0) == found(metrics, "win_rate_judge")
    assert clustered_rate([2, 2, 0, 0], [2] * 4) == found(metrics, "judge_takes_first")
    rates(metrics, judge_consistent=(0, 4))


def test_an_answer_without_an_end_scores_as_in_ppo_and_ids_are_read_as_they_were_sampled(
    monkeypatch, tmp_path, tokenizer
):
    ours, theirs = (
        answered(["abcdef", "ab", "ab"], [False, True, False]),
        answered(["a", "a", "a"], [True, True, False]),
    )
    give(monkeypatch, ours=ours, theirs=theirs)
    seen = []

    def lengths(model, documents, batch_size):
        seen.extend(documents)
        return np.array([len(answer) for _, answer in documents])

    monkeypatch.setattr(evaluate, "document_rewards", lengths)
    models = evaluate.Models(*(stand_in(name, tokenizer) for name in ("ours", "theirs", "reward")), None)
    cfg = evaluate.Config(prompts="FILE", no_end_score=-1.0)
    metrics = evaluate.evaluate_win_rate(cfg, models, ["Who?"] * 3, Quiet(tmp_path))
    # The longest does not end and loses; neither of the last two ends, whatever its length.
    assert trinomial_interval(1, 1, 1) == found(metrics, "win_rate_reward_model")
    assert seen == [*ours.documents, *theirs.documents]


def test_both_sides_of_a_comparison_sample_with_keys_of_their_own(monkeypatch):
    keys = []
    monkeypatch.setattr(evaluate, "answer_texts", lambda model, prompts, key, **_: keys.append(key))
    for side in (0, 1):
        evaluate.respond(evaluate.Config(), stand_in("ours"), ["Who?"], side)
    assert keys[0] != keys[1]


def test_pairs_that_do_not_fit_leave_the_others_in_their_subsets(monkeypatch, tmp_path, tokenizer):
    chosen = ["a b c", "word " * 80, "a", "a", "a"]
    pairs = [suites.pair(Place("FILE", line), "Who?", text, "a b") for line, text in enumerate(chosen, 1)]
    found = suites.PreferenceSet(pairs, ["x", "z", "y", "x", "y"], [])
    margins = np.array([2.0, -2.0, 0.5, 3.0])
    monkeypatch.setattr(evaluate, "document_rewards", lambda model, pairs, batch_size: np.append(margins, np.zeros(4)))
    models = evaluate.Models(None, None, stand_in("reward", tokenizer), None)
    metrics = evaluate.evaluate_preferences(evaluate.Config(), models, "FILE", found, Quiet(tmp_path))
    rates(metrics, FILE_accuracy=(3, 4), FILE_length_baseline=(1, 4))
    rates(metrics, **{"FILE/x_accuracy": (2, 2), "FILE/x_length_baseline": (1, 2), "FILE/y_accuracy": (1, 2)})
    assert "FILE/z_accuracy" not in metrics
    # The second and the fourth turned round: predicted σ(2), σ(2), σ(0.5), σ(−3), and it was so, not, so, not.
    error = (2 * (0.880797 - 0.5) + (1 - 0.622459) + 0.047426) / 4
    np.testing.assert_allclose(metrics["FILE_calibration_error"], error, rtol=1e-5)
