"""Templates that marks do not follow, templates without an end of turn, and the date that templates are told."""

import gzip
import json

import pytest
from transformers import AutoTokenizer

from rlhf_jax import clock
from rlhf_jax.data import chat
from rlhf_jax.data.encode import encode, encode_row
from rlhf_jax.data.formats import Demonstration, Prompt, normalise
from rlhf_jax.data.rejects import BadRow, Place

PLACE = Place("f", 1)
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
SAME = {
    "indices": "{% for i in range(messages | length) %}{% set m = messages[i] %}" + TURN + "{% endfor %}" + ASKED,
    "rebuilt": (
        "{% set ns = namespace(all=[]) %}{% for m in messages %}"
        "{% set ns.all = ns.all + [{'role': m.role, 'content': m.content}] %}{% endfor %}"
        "{% for m in ns.all %}" + TURN + "{% endfor %}" + ASKED
    ),
    "mapped": (
        "{% for pair in messages | map(attribute='role') | list | batch(1) %}{% set m = messages[loop.index0] %}"
        + TURN + "{% endfor %}" + ASKED
    ),
    "captured": "{% set all %}{% for m in messages %}" + TURN + "{% endfor %}{% endset %}{{ all | trim }}\n" + ASKED,
    "measured": (
        "{% set all %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{% if all | length > 200 %}"
        "{{ raise_exception('too long') }}{% endif %}{% for m in messages %}" + TURN + "{% endfor %}" + ASKED
    ),
    "macro": (
        "{% macro turn(m) %}" + TURN + "{% endmacro %}{% for i in range(messages | length) %}{{ turn(messages[i]) }}"
        "{% endfor %}" + ASKED
    ),
    "in_pairs": (
        "{% for n, m in [[0, 1]] if false %}{% endfor %}{% for m in messages | batch(2) %}{% for i in [0, 1] %}"
        "{% if i < m | length %}<|im_start|>{{ m[i].role }}\n{{ m[i].content }}<|im_end|>\n{% endif %}"
        "{% endfor %}{% endfor %}" + ASKED
    ),
    "continued": (
        "{% for m in messages %}{% if m.role == 'user' %}" + TURN + "{% continue %}{% endif %}" + TURN + "{% endfor %}"
        + ASKED
    ),
    "ended_early": (
        "{% for m in messages %}" + TURN + "{% if loop.last %}{% break %}{% endif %}{% endfor %}" + ASKED
    ),
    "listed_first": (
        "{% for m in messages %}{% if m.role == 'nobody' %}{{ m.content }}{% endif %}{% endfor %}"
        "{% for i in range(messages | length) %}{% set m = messages[i] %}" + TURN + "{% endfor %}" + ASKED
    ),
}  # fmt: skip
"""Templates that write what PLAIN does, otherwise."""


def turns(*texts):
    return tuple({"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts))


CONVERSATIONS = [
    turns("q", "a"), turns("q", "a", "r", "b"), turns("same", "same", "same", "same"), turns("0", "0", "A", "A"),
    turns("q", "  return 1\n", "<|im_start|>", "two\n\n"), turns("assistant", "user", "assistant", "user", "q", "a"),
]  # fmt: skip


@pytest.fixture
def tokenizer(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "tokenizer" / "minimind")


@pytest.mark.parametrize("name", SAME)
def test_however_a_template_walks_the_messages_what_is_learned_is_the_same(tokenizer, name):
    rows = [Demonstration(conversation[:1], conversation[1:], PLACE) for conversation in CONVERSATIONS]
    rows += [Prompt(conversation[:-1], PLACE) for conversation in CONVERSATIONS]
    tokenizer.chat_template = PLAIN
    expected = [encode(row, tokenizer, 400) for row in rows]
    tokenizer.chat_template = SAME[name]
    assert [encode(row, tokenizer, 400) for row in rows] == expected


@pytest.fixture(scope="module")
def templates(shared_data):
    with gzip.open(shared_data / "chat" / "chat_templates.jsonl.gz", "rt", encoding="utf-8") as file:
        return list(map(json.loads, file))


def test_comparison_finds_what_marks_find(templates, monkeypatch):
    """In all templates, answers are where the marks say: with thoughts, calls and several turns, too."""
    thought = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"x": 1}}}]}
    result = {"role": "tool", "content": "3"}
    conversations = [
        *CONVERSATIONS, (*turns("q"), thought), (*turns("q"), thought, *turns("r"), thought),
        (*turns("q"), call, result, *turns("", "so")[1:]), (*turns("q", "a", "r"), call),
    ]  # fmt: skip
    compared = 0
    for template in templates:
        special = {"bos_token": template["bos_token"], "eos_token": template["eos_token"]}
        for conversation in conversations:
            found = []
            for marked in (True, False):
                monkeypatch.setattr(chat, "_is_marked", lambda *_, marked=marked: marked)
                try:
                    found.append(chat.template_spans(template["template"], conversation, special))
                except BadRow as error:
                    found.append(str(error))
            assert found[0] == found[1], template["name"]
            compared += not isinstance(found[0], str)
    assert compared > 120


GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SIGNS = ["<|user|>", "<|assistant|>", "<|tool|>", "[gMASK]", "<sop>"]


def test_without_an_end_of_turn_the_next_turns_sign_ends_an_answer(tokenizer):
    tokenizer.chat_template = GLM
    tokenizer.add_special_tokens({"additional_special_tokens": SIGNS})
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    row = Demonstration(
        turns("q"), (*turns("", "a", "r")[1:], call, {"role": "tool", "content": "3"}, *turns("", "b")[1:]), PLACE
    )
    document, _, notes = encode_row(row, tokenizer, 400)
    learned = [tokenizer.decode(ids) for ids in document[1::2]]
    assert learned == ["a<|user|>", "add<|tool|>", "b<|im_end|>"] and notes == ()
    ids = [i for part in document for i in part]
    conversation = [dict(turn) for turn in (*row.prompt, *row.response)]
    assert ids[:-1] == tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False)


def test_space_at_the_end_of_an_answer_that_nothing_ends_is_its_own(tokenizer):
    tokenizer.chat_template = GLM
    tokenizer.add_special_tokens({"additional_special_tokens": SIGNS})
    document, _ = encode(Demonstration(turns("q"), turns("", "a\n", "r", "b\n\n")[1:], PLACE), tokenizer, 400)
    assert [tokenizer.decode(ids) for ids in document[1::2]] == ["a\n<|user|>", "b\n\n<|im_end|>"]


def test_a_template_that_ends_answers_with_nothing_is_named(tokenizer, shared_data):
    row = Demonstration(turns("q"), turns("", "a", "r", "b")[1:], PLACE)
    tokenizer.chat_template = GLM  # whose signs are only characters to this tokenizer
    plain = AutoTokenizer.from_pretrained(shared_data / "model" / "stories260K-hf")
    for each in (tokenizer, plain):
        [note] = encode_row(row, each, 400).notes
        assert note.startswith("an answer before the last ends without a sign") and "chat template" in note
        one = Demonstration(turns("q"), turns("", "a")[1:], PLACE)
        assert encode_row(one, each, 400).notes == ()
        # Where only the last is learned, nothing is missing.
        assert encode_row(row._replace(learned=(False, False, True)), each, 400).notes == ()


DATED = "{{ strftime_now('%d %b %Y') }}" + PLAIN


def test_the_date_is_that_which_was_kept(tokenizer):
    tokenizer.chat_template = DATED
    clock.keep("2024-07-26T10:00:00")
    try:
        ids, _ = encode(Prompt(turns("q"), PLACE), tokenizer, 400)
    finally:
        clock.release()
    assert tokenizer.decode(ids).startswith("26 Jul 2024<|im_start|>user")
    today = tokenizer.apply_chat_template(list(map(dict, turns("q"))), add_generation_prompt=True, return_dict=False)
    assert encode(Prompt(turns("q"), PLACE), tokenizer, 400)[0] == today


def test_reasoning_has_the_names_that_transformers_gives_it(tokenizer):
    tokenizer.chat_template = PLAIN.replace(
        "{{ m.content }}", "{{ m.thinking }}|{{ m.reasoning_content }}|{{ m.content }}"
    )
    for fields in ({"reasoning": "x"}, {"thinking": "x"}, {"thinking": "x", "reasoning_content": "y"}):
        row = {"messages": [*turns("q"), {"role": "assistant", "content": "a", **fields}]}
        document, _ = encode(normalise("messages", row, PLACE), tokenizer, 400)
        theirs = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        assert tokenizer.decode([i for part in document for i in part]) == theirs.rstrip()
