import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_jax.errors import UserError
from rlhf_jax.evaluate import judged_win_rate
from rlhf_jax.pretrained import load_policy
from rlhf_jax.rewards.judge import both_orders, comparison, letter_judge


def longer(prompts, first, second):
    lengths = np.array([[len(a), len(b)] for a, b in zip(first, second, strict=True)])
    return (1 + np.sign(lengths[:, 0] - lengths[:, 1])) / 2


def test_a_judge_of_length_is_consistent():
    verdicts = both_orders(longer, ["?"] * 3, ["aa", "a", "a"], ["a", "a", "aa"])
    np.testing.assert_array_equal(verdicts.shown_first, [1.0, 0.5, 0.0])
    np.testing.assert_array_equal(verdicts.shown_second, [1.0, 0.5, 0.0])
    rates = judged_win_rate(*verdicts)
    assert rates.win.rate == 0.5 and rates.consistent.rate == 1.0 and rates.first_shown.rate == 0.5


def test_a_judge_who_takes_the_first_finds_no_winner():
    rates = judged_win_rate(*both_orders(lambda p, a, b: [1] * len(p), ["?"] * 4, ["a"] * 4, ["b"] * 4))
    assert rates.win.rate == 0.5 and rates.consistent.rate == 0.0 and rates.first_shown.rate == 1.0


@pytest.mark.parametrize("verdicts", [[1.0], [0.5, np.nan], [0.5, 2.0], [[0.5, 0.5]]])
def test_a_judge_who_says_something_else_is_refused(verdicts):
    with pytest.raises(ValueError, match="answer 2 prompts"):
        both_orders(lambda p, a, b: verdicts, ["?"] * 2, ["a"] * 2, ["b"] * 2)


def test_the_question_shows_both_in_order():
    text = comparison("Why?", "Because one.", "Because two.")
    assert text.index("Why?") < text.index("Because one.") < text.index("Response B") < text.index("Because two.")


def torch_logprob(model, prompt, response):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0].double()
    scores = torch.log_softmax(logits, -1)
    at = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return sum(float(scores[t, token]) for t, token in zip(at, response, strict=True))


def test_a_language_model_judges_by_a_or_b(shared_data):
    folder = str(shared_data / "model" / "stories260K-hf")
    model, theirs = load_policy(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts, first, second = ["Who?", "Tell a story."], ["Lily.", "Once upon a time"], ["The dog and the cat.", "No."]
    found = letter_judge(model, batch_size=3, max_length=512)(prompts, first, second)
    for row, verdict in enumerate(found):
        text = f"\n\nHuman: {comparison(prompts[row], first[row], second[row])}\n\nAssistant:"
        ids = [1, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]
        a, b = (
            torch_logprob(theirs, ids, model.tokenizer(letter, add_special_tokens=False)["input_ids"])
            for letter in "AB"
        )
        np.testing.assert_allclose(verdict, 1 / (1 + np.exp(b - a)), rtol=1e-3)
    with pytest.raises(UserError, match="cannot be asked about answer 1: prompt too long for 64 tokens"):
        letter_judge(model, batch_size=3, max_length=64)(prompts, first, second)
