"""What an evaluation counts, from answers and scores that are known."""

from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from experiments import evaluate
from rlhf_jax.data import suites
from rlhf_jax.data.rejects import Place
from rlhf_jax.evaluate import wilson_interval
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
    monkeypatch.setattr(evaluate, "respond", lambda cfg, model, prompts: answers[model.name])


def rates(metrics, **expected):
    """Each a share of so many, with the interval of that many."""
    for name, (part, whole) in expected.items():
        found = tuple(metrics[name + end] for end in ("", "_low", "_high", "_n"))
        assert found == (*wilson_interval(part, whole), whole), name


def test_ifeval_counts_prompts_and_instructions_strictly_and_loosely(monkeypatch, tmp_path):
    both = ["punctuation:no_comma", "detectable_format:title"]
    rows = [suites.Instruction("Say.", both, [{}, {}])] * 3 + [suites.Instruction("Say.", both[:1], [{}])]
    # Both; both but for the first line; neither; the only one.
    texts = ["<<A>> b.", "Sure, this:\n<<A>> b.", "A, b.", "A."]
    give(monkeypatch, ours=TextAnswers(texts, np.array([True, False, True, True])))
    metrics = evaluate.evaluate_ifeval(evaluate.Config(), stand_in("ours"), rows, Quiet(tmp_path))
    rates(
        metrics, ifeval_prompt_strict=(2, 4), ifeval_prompt_loose=(3, 4), ifeval_instruction_strict=(4, 7),
        ifeval_instruction_loose=(5, 7), ifeval_ended=(3, 4),
    )  # fmt: skip


def test_gsm8k_counts_strictly_and_leniently(monkeypatch, tmp_path):
    rows = [suites.MathProblem("2 + 3?", "#### 5")] * 3
    give(monkeypatch, ours=TextAnswers(["#### 5", "It is 5", "#### 4 or 5"], np.array([True, False, False])))
    metrics = evaluate.evaluate_gsm8k(evaluate.Config(), stand_in("ours"), rows, Quiet(tmp_path))
    rates(metrics, gsm8k_strict=(1, 3), gsm8k_lenient=(2, 3), gsm8k_ended=(1, 3))


def test_the_evaluated_model_wins_where_its_answer_scores_higher(monkeypatch, tmp_path, tokenizer):
    give(monkeypatch, ours=TextAnswers(["a b c", "a b", "a b", "a"], np.ones(4, bool)),
         theirs=TextAnswers(["a", "a", "a", "a"], np.ones(4, bool)))  # fmt: skip
    monkeypatch.setattr(
        evaluate, "document_rewards", lambda model, pairs, batch_size: np.array([len(r) for _, r in pairs])
    )
    monkeypatch.setattr(evaluate, "letter_judge", lambda *_, **__: lambda prompts, first, second: [1, 1, 0, 0])
    models = evaluate.Models(*(stand_in(name, tokenizer) for name in ("ours", "theirs", "reward", "judge")))
    metrics = evaluate.evaluate_win_rate(evaluate.Config(prompts="FILE"), models, ["Who?"] * 4, Quiet(tmp_path))
    # Three are longer and one is a tie; a judge who always says the same has a place, and no winner.
    rates(metrics, win_rate_reward_model=(3.5, 4), win_rate_judge=(2, 4), judge_consistent=(0, 4))
    rates(metrics, judge_takes_first=(2, 4))


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
