"""Chat templates of 17 model families: rendered as their own code renders them, and which characters are learned."""

import datetime
import gzip
import json

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from rlhf_jax import clock
from rlhf_jax.data import chat
from rlhf_jax.data.rejects import BadRow

NAMES = (
    "qwen2_5", "qwen2_5_training", "qwen3", "qwen3_training", "qwen3_instruct_2507", "llama3", "llama3_training",
    "llama3_1", "llama3_2", "gemma", "gemma_training", "gemma3", "phi3", "phi3_training", "deepseekv3", "cohere",
    "minimind",
)  # fmt: skip


@pytest.fixture(scope="module")
def templates(shared_data):
    with gzip.open(shared_data / "chat" / "chat_templates.jsonl.gz", "rt", encoding="utf-8") as file:
        return {t["name"]: t for t in map(json.loads, file)}


@pytest.fixture(scope="module")
def cases(shared_data):
    with gzip.open(shared_data / "chat" / "chat_template_cases.jsonl.gz", "rt", encoding="utf-8") as file:
        return list(map(json.loads, file))


@pytest.fixture(autouse=True)
def today(monkeypatch):
    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 7, 26)

    monkeypatch.setattr(clock, "datetime", Day)


def special(template):
    return {"bos_token": template["bos_token"], "eos_token": template["eos_token"]}


def test_these_are_all_templates_and_cases(templates, cases):
    assert tuple(templates) == NAMES and len(cases) == 153
    assert {case["template"] for case in cases} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_cases_are_rendered_as_recorded(templates, cases, name):
    template = templates[name]
    for case in (c for c in cases if c["template"] == name):

        def render(case=case):
            return chat.run_template(
                template["template"], case["messages"], special(template),
                add_generation_prompt=case["add_generation_prompt"],
            )  # fmt: skip

        if case["error"]:
            with pytest.raises(BadRow, match=f"refused by the chat template: {case['error'].split(': ')[1][:20]}"):
                render()
        else:
            assert render() == case["rendered"]


def merged(text, spans):
    """Words inside spans: touching ones are one, white space around them does not count."""
    joined = []
    for start, end in sorted(spans):
        if joined and start == joined[-1][1]:
            joined[-1][1] = end
        else:
            joined.append([start, end])
    return [text[start:end].strip() for start, end in joined]


@pytest.mark.parametrize("name", NAMES)
def test_spans_of_the_cases(templates, cases, name):
    """As the template's own {% generation %} marks, where it has them; else what stands between prompt and end."""
    template = templates[name]
    learned = 0
    for case in cases:
        if case["template"] != name or case["error"] or case["add_generation_prompt"]:
            continue
        text, spans = chat.template_spans(template["template"], case["messages"], special(template))
        assert text == case["rendered"]
        if case["assistant_spans"] is not None:
            ours = [text[start:end].strip() for start, end in spans.values()]
            assert ours == merged(text, case["assistant_spans"])
        answers = [n for n, turn in enumerate(case["messages"]) if turn["role"] == "assistant"]
        assert sorted(spans) == answers
        for number in answers:
            start, end = spans[number]
            said = case["messages"][number]["content"].split("</think>")[-1].strip()
            learned += 1
            # The answer and the end of its turn, nothing of the next turn.
            assert said in text[start:end] and text[start:end].count("<|im_end|>") <= 1
            assert len(text[start:end]) > len(said), "the end of the turn is learned"
            # What is given is what the model meets when it generates (templates that open a thought give more).
            try:
                asked = chat.run_template(
                    template["template"], case["messages"][:number], special(template), add_generation_prompt=True
                )
            except BadRow:
                continue
            if number == answers[-1] and "<think>" not in text + asked:
                assert text[:start] == asked
    assert learned >= 2


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "toolword",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        },
    }
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 41}}}
CONVERSATIONS = {
    "multi_turn": [
        {"role": "user", "content": "userone"}, {"role": "assistant", "content": "wordone"},
        {"role": "user", "content": "usertwo"}, {"role": "assistant", "content": "wordtwo <b>&amp;\n\n- x"},
        {"role": "user", "content": "userthree"}, {"role": "assistant", "content": "userthree wordthree"},
    ],
    "same_answers": [
        {"role": "user", "content": "userone"}, {"role": "assistant", "content": "wordone"},
        {"role": "user", "content": "userone"}, {"role": "assistant", "content": "wordone"},
    ],
    "system": [
        {"role": "system", "content": "systemword"}, {"role": "user", "content": "userone"},
        {"role": "assistant", "content": "wordone"},
    ],
    "reasoning": [
        {"role": "user", "content": "userone"},
        {"role": "assistant", "content": "wordone", "reasoning_content": "thoughtone"},
        {"role": "user", "content": "usertwo"},
        {"role": "assistant", "content": "wordtwo", "reasoning_content": "thoughttwo"},
    ],
    "inline_reasoning": [
        {"role": "user", "content": "userone"},
        {"role": "assistant", "content": "<think>\nthoughttwo\n</think>\n\nwordone"},
    ],
    "tool_call": [
        {"role": "user", "content": "userone"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "content": "toolword"},
        {"role": "assistant", "content": "wordone"},
    ],
}  # fmt: skip
# Templates that refuse a conversation, or do not know tools or reasoning.
REFUSED = {
    "system": {"gemma", "gemma_training"},
    "tool_call": {
        "llama3",
        "llama3_training",
        "gemma",
        "gemma_training",
        "gemma3",
        "phi3",
        "phi3_training",
        "cohere",
    },
}


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_conversations_of_every_kind(templates, name, kind):
    template, messages = templates[name], [dict(turn) for turn in CONVERSATIONS[kind]]
    tools = TOOLS if kind == "tool_call" else None
    if name == "deepseekv3" and tools:  # it wants its arguments written out
        messages[1] = messages[1] | {"tool_calls": [{**CALL, "function": {"name": "add", "arguments": '{"a": 41}'}}]}
    try:
        text, spans = chat.template_spans(template["template"], messages, special(template), tools=tools)
    except BadRow as error:
        assert name in REFUSED.get(kind, ()), error
        return
    assert name not in REFUSED.get(kind, ())
    # Another renderer writes the same: the marks changed nothing.
    [[theirs], _] = render_jinja_template(
        conversations=[messages], chat_template=template["template"], tools=tools, **special(template)
    )
    day = datetime.datetime.now().strftime("%d %b %Y")
    assert text == theirs.replace(day, "26 Jul 2024")
    given, at, ordered = "", 0, sorted(spans.items())
    for number, (start, end) in ordered:
        assert at <= start < end
        given += text[at:start]
        at = end
        turn = messages[number]
        content = turn["content"].split("</think>")[-1].strip()
        assert content in text[start:end]
        if turn.get("tool_calls"):
            assert "41" in text[start:end]
        # All of the answer is inside: what it said is nowhere in what is given around it.
        own = [word for word in content.split() if word.startswith("word")]
        assert not any(word in given for word in own)
    given += text[at:]
    learned = "".join(text[start:end] for _, (start, end) in ordered)
    for theirs in ("systemword", "userone", "usertwo", "toolword"):
        assert theirs not in learned and (theirs in given or not any(theirs in t["content"] for t in messages))
    # A thought that the template shows is learned.
    for thought in ("thoughtone", "thoughttwo"):
        assert thought not in given
    assert sorted(spans) == [n for n, turn in enumerate(messages) if turn["role"] == "assistant"]


def test_templates_with_reasoning_show_the_last_thought(templates):
    messages = CONVERSATIONS["reasoning"]
    for name in ("qwen3", "qwen3_training", "minimind"):
        text, spans = chat.template_spans(templates[name]["template"], messages, special(templates[name]))
        assert "thoughttwo" in text[slice(*spans[3])]


def test_an_answer_that_a_template_hides_is_refused():
    template = "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% endif %}{% endfor %}"
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(BadRow, match="does not show message 2, an answer"):
        chat.template_spans(template, conversation, {})
    empty = (
        "{% for m in messages %}[{{ m.content if m.role == 'user' }}]{% endfor %}{{ '[' if add_generation_prompt }}"
    )
    with pytest.raises(BadRow, match="does not show message 2, an answer"):
        chat.template_spans(empty, conversation, {})
    # One that escapes what is said, shows it.
    escaped = "{% for m in messages %}[{{ m.content | tojson }}]{% endfor %}{{ '[' if add_generation_prompt }}"
    text, spans = chat.template_spans(escaped, [conversation[0], conversation[1] | {"content": '"'}], {})
    assert text[slice(*spans[1])] == '"\\""]'


def test_a_template_that_fails_in_any_way_is_a_bad_row():
    for template in ("{{ 1 // 0 }}", "{{ messages[7].content.x }}", "{{ raise_exception('no') }}", "{% for %}"):
        with pytest.raises(BadRow, match="refused by the chat template: "):
            chat.run_template(template, [{"role": "user", "content": "a"}], {})
