"""What a chat template leaves out is counted, or makes a bad row."""

import pytest
from transformers import AutoTokenizer

from rlhf_jax.data.encode import encode_row, encode_rows
from rlhf_jax.data.formats import normalise
from rlhf_jax.data.rejects import BadRow, Place, Rejects
from rlhf_jax.data.rows import Read

PLACE = Place("f", 1)
TWO_ROLES = (
    "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER, SYSTEM = {"role": "user", "content": "q"}, {"role": "system", "content": "be kind"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = {"function": {"name": "add", "arguments": {"x": 1}}}


def answer(text, **fields):
    return {"role": "assistant", "content": text, **fields}


@pytest.fixture
def tokenizer(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "tokenizer" / "minimind")


@pytest.fixture
def plain(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "model" / "stories260K-hf")


def notes(tokenizer, row, form="messages"):
    return encode_row(normalise(form, row, PLACE), tokenizer, 2000).notes


LAST_THOUGHT = TWO_ROLES.replace(
    "{{ m.content }}",
    "{% if loop.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content.split('</think>')[-1] }}",
)
REASONING = "not shown by the chat template: reasoning"


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_that_are_left_out_are_counted(tokenizer, field):
    row = {"messages": [USER, answer("a", **{field: "so"}), USER, answer("b", **{field: "it is"})]}
    inline = {"messages": [USER, answer("<think>so</think>a"), USER, answer("b")]}
    assert notes(tokenizer, row) == notes(tokenizer, inline) == ()  # this one shows them all
    tokenizer.chat_template = LAST_THOUGHT
    assert notes(tokenizer, row) == notes(tokenizer, inline) == (REASONING,)
    assert notes(tokenizer, {"messages": [USER, answer("b", **{field: "it is"})]}) == ()
    tokenizer.chat_template = TWO_ROLES
    assert notes(tokenizer, {"messages": [USER, answer("b", **{field: "it is"})]}) == (REASONING,)
    pair = {"prompt": [USER], "chosen": [answer("a", **{field: "so"})], "rejected": "b"}
    assert notes(tokenizer, pair, "preference") == (REASONING,)


def test_short_words_that_stand_elsewhere_too_do_not_hide_a_loss(tokenizer):
    tokenizer.chat_template = TWO_ROLES
    row = {"messages": [USER, answer("a is so", reasoning_content="so")]}
    assert notes(tokenizer, row) == (REASONING,)
    with pytest.raises(BadRow, match="does not show message 1, of the system"):
        notes(tokenizer, {"messages": [SYSTEM | {"content": "q"}, USER, answer("q")]})


@pytest.mark.parametrize("form", ["messages", "prompts", "preference", "unpaired"])
def test_a_message_that_a_template_has_no_branch_for_is_a_bad_row(tokenizer, form):
    rows = {
        "messages": {"messages": [USER, answer("a")]}, "prompts": {"prompt": "q"},
        "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
        "unpaired": {"prompt": "q", "completion": "a", "label": False},
    }  # fmt: skip
    row = rows[form] | {"system": "be kind"}
    assert notes(tokenizer, row, form) == ()
    tokenizer.chat_template = TWO_ROLES
    with pytest.raises(BadRow, match="the chat template does not show message 1, of the system"):
        notes(tokenizer, row, form)
    assert notes(tokenizer, rows[form], form) == ()


def test_results_calls_and_tools_that_are_left_out(tokenizer, plain):
    row = {"messages": [USER, answer("", tool_calls=[CALL]), {"role": "tool", "content": "3"}, answer("so")]}
    tools = {"messages": [USER, answer("a")], "tools": [TOOL]}
    assert notes(tokenizer, row | {"tools": [TOOL]}) == notes(tokenizer, tools) == ()
    tokenizer.chat_template = TWO_ROLES
    assert notes(tokenizer, tools) == ("not shown by the chat template: tools",)
    assert notes(plain, tools) == ("not shown by the chat template: tools",)
    # Also where every word of the messages is known to be shown.
    words = {"role": "user", "content": "What is the weather like today?"}
    long = {"messages": [words, answer("It is as fine as it was yesterday.")], "tools": [TOOL]}
    assert notes(plain, long) == ("not shown by the chat template: tools",)
    with pytest.raises(BadRow, match="does not show the tool calls of message 2"):
        notes(tokenizer, row)
    context = {"prompt": [USER, *row["messages"][1:3]], "completion": "so"}
    with pytest.raises(BadRow, match="does not show the tool calls of message 2"):
        notes(tokenizer, context, "prompt_completion")
    called = [words, answer("I look at the sky for you.", tool_calls=[CALL]), {"role": "tool", "content": "3"}]
    compared = {"prompt": called, "chosen": "It is fine there.", "rejected": "It is not so fine."}
    with pytest.raises(BadRow, match="does not show the tool calls of message 2"):
        notes(tokenizer, compared, "preference")
    result = {"messages": [USER, {"role": "tool", "content": "3"}, answer("so")]}
    with pytest.raises(BadRow, match="does not show message 2, of the tool"):
        notes(tokenizer, result)


def test_fields_that_are_left_out_are_counted(tokenizer):
    row = {"messages": [{**USER, "name": "Ann", "mood": "fine"}, answer("a", tool_calls=[CALL])]}
    assert notes(tokenizer, row) == (
        "not shown by the chat template: 'mood' of messages", "not shown by the chat template: names of speakers",
    )  # fmt: skip
    # A template that shows calls instead of the words beside them.
    tokenizer.chat_template = TWO_ROLES.replace(
        "{{ m.content }}",
        "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}",
    )
    assert "words beside a call" in str(
        notes(tokenizer, {"messages": [USER, answer("let me see", tool_calls=[CALL])]})
    )


def test_they_are_counted_in_the_run(tokenizer):
    tokenizer.chat_template = TWO_ROLES
    rows = [{"messages": [USER, answer("a", thinking="so")]}, {"messages": [SYSTEM, USER, answer("a")]}]
    rows.append({"messages": [USER, answer("a")]})
    rejects = Rejects("skip")
    reads = [Read(n, normalise("messages", row, Place("f", n + 1)), row) for n, row in enumerate(rows)]
    assert len(list(encode_rows(reads, tokenizer, 400, rejects))) == 2
    assert rejects.notes() == {REASONING: 1}
    assert rejects.counts() == {"the chat template does not show message 1, of the system": 1}
