"""A constitution is read from a file, and answers are revised by it."""

import json
import re

import numpy as np
import pytest

from rlhf_jax.constitution import SHIPPED, Principle, read_constitution, transcript
from rlhf_jax.data.conversations import message
from rlhf_jax.errors import UserError
from rlhf_jax.revision import (
    ENDLESS,
    Said,
    Step,
    asked_in,
    chain_row,
    draw_principles,
    make_reviser,
    revise_answers,
    texts_of,
)
from rlhf_jax.tasks.task import PromptRow

ASKED = {
    "prompt": ["\n\nCritiqueRequest: What?\n\nCritique:"], "edit_request": "\n\nRevisionRequest: Again.\n\nRevision:"
}  # fmt: skip
ONE = {"critique_revision": {"a": ASKED}, "rl_preference_principles": ["Choose. Options:"]}
PRINCIPLES = (Principle("a", "What?", "Again."), Principle("b", "Where?", "Once more."))


def written(tmp_path, value):
    file = tmp_path / "constitution.json"
    file.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return file


def test_the_papers_own_and_ours(shared_data):
    for path, count, questions, examples in (
        (shared_data / "constitution" / "constitutional_ai.json", 16, 16, 5), (SHIPPED, 6, 5, 2),
    ):  # fmt: skip
        found = read_constitution(path)
        assert (len(found.principles), len(found.questions), len(found.examples)) == (count, questions, examples)
        for text in [*found.questions, *(text for some in found.principles for text in some)]:
            assert text == text.strip() and text
            assert not re.search(r"Request:|Critique:|Revision:|Options:", text)
        for turns in found.examples:
            assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2) and len(turns) >= 6
    assert "rl_few_shot" in read_constitution(shared_data / "constitution" / "constitutional_ai.json").notes[0]


def test_its_parts(tmp_path):
    found = read_constitution(written(tmp_path, ONE))
    assert found == ((PRINCIPLES[0],), ("Choose.",), (), ())
    turns = ("Human: q", "Assistant: a", "CritiqueRequest: c?", "Critique: c", "RevisionRequest: r?", "Revision: r")
    shown = transcript("".join(f"\n\n{turn}" for turn in (*turns, "Human:")))
    assert [(turn["role"][0], turn["content"]) for turn in shown] == [
        ("u", "q"), ("a", "a"), ("u", "c?"), ("a", "c"), ("u", "r?"), ("a", "r"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is a JSON object"),
        ({"critique_revision": {}}, "critique_revision is missing"),
        ({"critique_revision": {"a": {"prompt": ["x"]}}}, "critique_revision.a has no text 'edit_request'"),
        ({"critique_revision": {"a": {"prompt": ["x", "y"], "edit_request": "z"}}}, "has no text 'prompt'"),
        ({"rl_preference_principles": []}, "rl_preference_principles is missing"),
        ({"rl_preference_principles": [1]}, "are lists of texts"),
        ({"critique_revision_few_shot": ["\n\nHuman: q\n\nAssistant: a"]}, "example of critique and revision"),
        ({"critique_revision_few_shot": ["x\n\nHuman: q\n\nRevision: a"]}, "example of critique and revision"),
    ],
)  # fmt: skip
def test_a_constitution_that_is_none(tmp_path, changes, message):
    file = written(tmp_path, changes if isinstance(changes, str) else ONE | changes)
    with pytest.raises(UserError, match=re.escape(message)):
        read_constitution(file)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_constitution(tmp_path / "none.json")


def test_a_chain_has_each_revision_of_the_last_one():
    asked = []

    def revise(prompts, answers, principles, rows, number):
        asked.append((rows, number))
        pairs = zip(answers, principles, strict=True)
        texts = [(answer, Said(missing="no") if "x" in answer else Said(answer + p.name), p) for answer, p in pairs]
        return [Step(principle, Said(f"{answer}?"), revision) for answer, revision, principle in texts]

    prompts = [(message("user", "q"),)] * 3
    drawn = np.array([[0, 1, 1], [1, 0, 1], [0, 0, 0]])
    whole, broken, missing = revise_answers(
        revise, prompts, [Said("s"), Said("x"), Said(missing="empty")], PRINCIPLES, range(5, 8), drawn
    )
    assert asked == [([5, 6], 0), ([5], 1), ([5], 2)]  # without those that have ended
    assert [step.revision.text for step in whole.steps] == ["sa", "sab", "sabb"] and not whole.unlearned
    assert len(broken.steps) == 1 and broken.unlearned == "no" and missing.steps == () and missing.unlearned == "empty"
    tools = [{"type": "function", "function": {"name": "f"}}]
    asked_of = PromptRow("q", {"tools": tools, "functions": None, "answer": 3}).asked()
    row = chain_row(whole, asked_of, 7)
    assert asked_in(row) == asked_of == {"prompt": "q", "tools": tools}
    assert texts_of(json.loads(json.dumps(row))) == ["s", "sa", "sab", "sabb"] and row["row"] == 7
    assert [step["critique"] for step in row["revisions"]] == ["s?", "sa?", "sab?"]


def test_only_the_last_text_must_end():
    def chain(*ended):
        answer, *others = (Said("t", ended=end) for end in ended)
        steps = tuple(Step(PRINCIPLES[0], *others[at : at + 2]) for at in range(0, len(others), 2))
        (found,) = revise_answers(
            lambda *a: [], [(message("user", "q"),)], [answer], PRINCIPLES, [0], np.zeros((1, 0), int)
        )
        return found._replace(steps=steps)

    assert chain(False, False, True).unlearned == ""
    assert chain(True, True, False).unlearned == chain(False).unlearned == ENDLESS


def test_a_model_is_asked_for_a_critique_and_then_for_a_revision_in_one_conversation():
    heard = []

    def reply(conversations, rows, number):
        heard.append((number, conversations, list(rows)))
        return [Said(missing="no") if "mute" in str(some) else Said(f"said {number}") for some in conversations]

    example = (message("user", "eq"), message("assistant", "ea"))
    revise = make_reviser(reply, [example])
    steps = revise([(message("user", "q"),), (message("user", "mute"),)], ["a", "b"], PRINCIPLES, [7, 9], 4)
    (first, critiques, asked), (second, revisions, again) = heard
    assert (asked, again) == ([7, 9], [7])
    assert (first, second) == (8, 9) and len(critiques) == 2 and len(revisions) == 1  # the mute one is not asked again
    words = [(turn["role"][0], turn["content"]) for turn in revisions[0]]
    assert words == [
        ("u", "eq"), ("a", "ea"), ("u", "q"), ("a", "a"), ("u", "What?"), ("a", "said 8"), ("u", "Again."),
    ]  # fmt: skip
    assert [turn["content"] for turn in critiques[0]] == ["eq", "ea", "q", "a", "What?"]
    assert steps[0] == (PRINCIPLES[0], Said("said 8"), Said("said 9"))
    assert steps[1].critique.missing == steps[1].revision.missing == "no"


def test_the_systems_message_stays_first():
    heard = []

    def reply(conversations, rows, number):
        heard.extend(conversations)
        return [Said("said")] * len(conversations)

    example = (message("user", "eq"), message("assistant", "ea"))
    make_reviser(reply, [example])([(message("system", "s"), message("user", "q"))], ["a"], PRINCIPLES[:1], [0], 0)
    assert [turn["role"] for turn in heard[0]] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [turn["content"] for turn in heard[0]] == ["s", "eq", "ea", "q", "a", "What?"]


def test_principles_are_drawn_by_the_row_alone():
    whole = draw_principles(3, range(200), 4, 5)
    np.testing.assert_array_equal(draw_principles(3, [7, 5], 4, 5), whole[[7, 5]])
    assert whole.shape == (200, 4) and set(whole.ravel().tolist()) == {0, 1, 2, 3, 4}
    assert np.abs(np.bincount(whole.ravel()) / 160 - 1).max() < 0.25
    assert (draw_principles(4, range(200), 4, 5) != whole).any()
