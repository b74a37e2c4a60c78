import copy
import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_jax.data.encode import encode
from rlhf_jax.data.formats import Comparison
from rlhf_jax.data.rejects import Place
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate import judged_win_rate
from rlhf_jax.pretrained import load_policy
from rlhf_jax.rewards import judge
from rlhf_jax.rewards.judge import (
    both_orders,
    comparing,
    comparison,
    grader,
    in_words,
    judge_reward,
    letter_judge,
    letters,
)
from rlhf_jax.rewards.reward import score_texts, trl_forms, weights_of
from rlhf_jax.scoring import document_logprobs, token_choices


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


@pytest.mark.parametrize("verdicts", [[1.0], [0.5, np.inf], [0.5, 2.0], [[0.5, 0.5]]])
def test_a_judge_who_says_something_else_is_refused(verdicts):
    with pytest.raises(ValueError, match="answer 2 prompts"):
        both_orders(lambda p, a, b: verdicts, ["?"] * 2, ["a"] * 2, ["b"] * 2)


def test_a_judge_who_fails_on_a_pair_is_heard_and_makes_no_win_rate():
    verdicts = both_orders(lambda p, a, b: [0.25, np.nan], ["?"] * 2, ["a"] * 2, ["b"] * 2)
    np.testing.assert_array_equal(verdicts.shown_first, [0.25, np.nan])
    np.testing.assert_array_equal(verdicts.shown_second, [0.75, np.nan])
    with pytest.raises(ValueError, match="NaN"):
        judged_win_rate(*verdicts)


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
    with pytest.raises(UserError, match=r"stories260K-hf failed on 2 of 2 .*: prompt too long for 64 tokens"):
        letter_judge(model, batch_size=3, max_length=64)(prompts, first, second)


def in_template(model):
    """The same model with a chat template that ends as an instruct model's does."""
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn['role'] }}:\n{{ turn['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
    )
    return model._replace(tokenizer=tokenizer)


def test_one_pass_tells_both_letters_as_two_documents_did(stories, monkeypatch):
    model = in_template(load_policy(stories))
    questions = ["Is it good?", "Or is it not good, when it is as long as this? " * 3, "Is it?"]
    passes = []
    read = judge.token_choices
    monkeypatch.setattr(judge, "token_choices", lambda *a, **k: passes.append(len(a[1])) or read(*a, **k))
    found = letters(model, batch_size=2, max_length=512)(questions)
    assert passes == [3]  # one document a question
    answers = tuple(({"role": "assistant", "content": letter},) for letter in "AB")
    for question, probability in zip(questions, found, strict=True):
        row = Comparison(({"role": "user", "content": question},), answers, (0, 1), Place("", 0))
        ids, _ = encode(row, model.tokenizer, 512)
        documents = [(ids.prompt, reply[:-1]) for reply in ids.responses]
        a, b = document_logprobs(model, documents, batch_size=2)
        np.testing.assert_allclose(probability, 1 / (1 + np.exp(b - a)), rtol=1e-5)
    assert len(set(np.round(found, 6))) == 3


def test_letters_of_a_model_with_soft_capped_logits(stories):
    model = load_policy(stories)
    model = model._replace(config=dataclasses.replace(model.config, final_softcap=20.0))
    prompts = [[1, 2, 3], [4, 5], [7] * 9]
    found = token_choices(model, prompts, (447, 445), batch_size=2)
    documents = [(prompt, [letter]) for letter in (447, 445) for prompt in prompts]
    a, b = document_logprobs(model, documents, batch_size=2).reshape(2, -1)
    assert (np.abs(found) > 0.01).all()
    np.testing.assert_allclose(found, a - b, rtol=1e-4, atol=1e-6)


def test_questions_that_a_model_cannot_read_fail_alone(stories):
    model = in_template(load_policy(stories))
    ask = letters(model, batch_size=2, max_length=64, max_failed_share=0.5)
    found = ask(["Is it good?", "Is it good? " * 50])
    alone = ask(["Is it good?"])
    assert np.isnan(found[1]) and found[0] == pytest.approx(alone[0])
    with pytest.raises(UserError, match="failed on 2 of 3"):
        ask(["Is it good?", "Is it good? " * 50, "Is it good? " * 60])
    ask = letters(model, batch_size=2, max_length=64, max_failed_share=0.5, total=4)
    assert np.isnan(ask(["Is it good? " * 50])) and np.isnan(ask(["Is it good? " * 50]))  # two of four
    with pytest.raises(UserError, match=r"failed on 3 of 4 questions .at most 50% may.: prompt too long"):
        ask(["Is it good? " * 50])


def asked(question):
    """An `Ask` that says how many letters of a question are "x", of ten."""
    return [text.count("x") / 10 if "fail" not in text else np.nan for text in question]


def test_a_grader_asks_about_one_answer_and_principles_may_differ():
    seen = []
    ask = lambda questions: seen.extend(questions) or asked(questions)  # noqa: E731
    np.testing.assert_allclose(grader(ask, ["Is it short?", "Is it kind?"])(["p", "q"], ["xx", "y"]), [0.2, 0.0])
    assert seen[0].startswith("Is it short?\n\nPrompt:\np\n\nResponse:\nxx\n\n") and seen[1].startswith("Is it kind?")
    assert seen[0].endswith("Answer with A for good or B for bad alone.")
    comparing(ask, ["One?", "Two?"])(["p", "q"], ["1", "2"], ["3", "4"])
    assert seen[2] == comparison("p", "1", "3", "One?") and seen[3] == comparison("q", "2", "4", "Two?")
    with pytest.raises(ValueError):
        grader(ask, ["One?"])(["p", "q"], ["x", "y"])


def test_a_judge_is_a_reward_whose_failures_are_counted():
    reward = judge_reward("judge", grader(asked), 2.0, failed_score=-1.0, max_failed_share=0.4)
    prompts = [[{"role": "user", "content": "Say x."}], "Say y.", "fail"]
    given, answers = trl_forms(prompts, ["xx", "y", "z"])
    found = score_texts([reward], given, answers, {})["judge"]
    np.testing.assert_allclose(found.scores, [0.3, 0.0, -1.0])
    assert found.errors == 1 and found.first_error == "answer 2: the judge gave no verdict"
    assert weights_of([reward]) == {"judge": 2.0} and not reward.traceable
    with pytest.raises(UserError, match=r"judge: it failed on 2 of 3 answers .67%; at most 40% may"):
        score_texts([reward], *trl_forms(["fail", "fail", "x"], ["", "", ""]), {})
    with pytest.raises(ValueError, match="from 0 to 1"):
        score_texts([judge_reward("judge", lambda p, a: [7.0], 1.0)], *trl_forms(["p"], ["a"]), {})


def test_a_conversation_is_read_turn_by_turn():
    turns = [("system", "Be kind."), ("user", "Hi."), ("assistant", "Hello."), ("user", "Why?")]
    chat = [{"role": role, "content": text} for role, text in turns]
    assert in_words(chat) == "System: Be kind.\n\nUser: Hi.\n\nAssistant: Hello.\n\nUser: Why?"
    assert in_words(chat[1:2]) == in_words("Hi.") == "Hi."
