"""Text that is rendered already: its special tokens are read, or it is refused; never learned as characters unsaid."""

import gzip
import json

import pytest
from transformers import AutoTokenizer

from rlhf_jax.data.encode import SPELLED, encode_row
from rlhf_jax.data.formats import normalise
from rlhf_jax.data.rejects import BadRow, Place

PLACE = Place("f", 1)
CHATML = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
OTHERS = {
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>",
    "gemma": "<bos><start_of_turn>user\nq<end_of_turn>\n",
    "phi3": "<|user|>\nq<|end|>\n<|assistant|>\n",
    "llama2": "<s>[INST] q [/INST] a </s>",
    "deepseek": "<｜begin▁of▁sentence｜><｜User｜>q<｜Assistant｜>",
    "command": "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>q",
    "gpt_oss": "<|start|>user<|message|>q<|end|>",
}


@pytest.fixture
def minimind(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "tokenizer" / "minimind")


@pytest.fixture
def stories(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "model" / "stories260K-hf")


def encoded(tokenizer, form, row):
    return encode_row(normalise(form, row, PLACE), tokenizer, 400)


def test_a_rendered_text_has_the_ids_of_its_conversation(minimind):
    conversation = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    text = minimind.apply_chat_template(conversation, tokenize=False)
    (given, learned), _, notes = encoded(minimind, "text", {"text": text})
    theirs = minimind.apply_chat_template(conversation, tokenize=True, return_dict=False)
    assert given == [] and notes == ()
    assert learned == theirs[: len(learned)] and learned[-1] == minimind.eos_token_id
    assert learned.count(minimind.eos_token_id) == 2 and minimind.decode(theirs[len(learned) :]).strip() == ""


@pytest.mark.parametrize("name", OTHERS)
def test_a_text_of_another_template_is_refused(minimind, name):
    for text in (OTHERS[name], "Here is one:\n" + OTHERS[name]):
        with pytest.raises(
            BadRow, match="the text is rendered by another chat template: the tokenizer does not know '"
        ):
            encoded(minimind, "text", {"text": text})


@pytest.mark.parametrize("name", [*OTHERS, "chatml"])
@pytest.mark.parametrize("which", ["minimind", "stories"])
def test_rendered_messages_are_refused(request, which, name):
    tokenizer, text = request.getfixturevalue(which), OTHERS.get(name, CHATML)
    message, answer = {"role": "user", "content": text}, {"role": "assistant", "content": "a"}
    rows = [
        ("prompts", {"prompt": text}), ("prompts", {"prompt": [message]}), ("prompts", {"prompt": " " + text}),
        ("prompt_completion", {"prompt": text, "completion": "a"}),
        ("prompt_completion", {"prompt": "q", "completion": text}),
        ("messages", {"messages": [message, answer]}), ("alpaca", {"instruction": text, "output": "a"}),
        ("preference", {"prompt": text, "chosen": "a", "rejected": "b"}),
        ("preference", {"prompt": "q", "chosen": text, "rejected": "b"}),
        ("unpaired", {"prompt": text, "completion": "a", "label": True}),
        ("prompts", {"prompt": "q", "system": text}),
    ]  # fmt: skip
    for form, row in rows:
        with pytest.raises(BadRow, match="is rendered by a chat template already, it begins with '"):
            encoded(tokenizer, form, row)


def test_the_templates_own_signs_are_known(minimind, shared_data):
    """A prompt as any of the templates writes it is refused by a tokenizer that has this template."""
    with gzip.open(shared_data / "chat" / "chat_templates.jsonl.gz", "rt", encoding="utf-8") as file:
        templates = list(map(json.loads, file))
    odd = (
        "{% for m in messages %}<<{{ m.role }}>> {{ m.content }} <<end>>\n{% endfor %}"
        "{{ '<<assistant>>' if add_generation_prompt }}"
    )
    for template in [*(t["template"] for t in templates), odd]:
        minimind.chat_template = template
        conversation = [{"role": "user", "content": "q"}]
        text = minimind.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        with pytest.raises(BadRow, match="rendered by a chat template already"):
            encoded(minimind, "prompts", {"prompt": text})
        # As a text it is what the tokenizer makes of it.
        (given, learned), _, _ = encoded(minimind, "text", {"text": text})
        assert [*given, *learned][:-1] == minimind(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("which", ["minimind", "stories"])
def test_an_end_that_a_writer_put_behind_an_answer_is_the_end(request, which):
    tokenizer = request.getfixturevalue(which)
    eos = tokenizer.eos_token
    rows = {
        "prompt_completion": ({"prompt": "q", "completion": "a"}, ("completion",)),
        "preference": ({"prompt": "q", "chosen": "a", "rejected": "b"}, ("chosen", "rejected")),
        "alpaca": ({"instruction": "q", "output": "a"}, ("output",)),
        "unpaired": ({"prompt": "q", "completion": "a", "label": True}, ("completion",)),
    }
    for form, (row, fields) in rows.items():
        plain = encoded(tokenizer, form, row)
        ended = encoded(tokenizer, form, row | {field: row[field] + eos for field in fields})
        assert ended.ids == plain.ids
        assert ended.notes == ("an answer ends in the sign of its end, which is learned once",)
        spaced = encoded(tokenizer, form, row | {field: row[field] + eos + "\n" for field in fields})
        assert spaced.ids == plain.ids
    # A user who writes it, and one in the middle of an answer, write characters; this is said.
    for row in ({"prompt": "q" + eos, "completion": "a"}, {"prompt": "q", "completion": f"a{eos}b"}):
        ids, _, notes = encoded(tokenizer, "prompt_completion", row)
        assert ids[1].count(tokenizer.eos_token_id) == 1 and notes == (SPELLED,)


def test_a_bos_and_an_eos_at_the_ends_of_a_text_are_those(stories):
    expected = encoded(stories, "text", {"text": "One two."}).ids
    for text in ("<s>One two.", "One two.</s>", "<s>One two.</s>\n"):
        ids, _, notes = encoded(stories, "text", {"text": text})
        assert ids == expected and notes == ()
    (bos, ids), _, notes = encoded(stories, "text", {"text": "One </s> two."})
    assert bos == [1] and ids.count(2) == 1 and notes == (SPELLED,)
    with pytest.raises(BadRow, match="empty text"):
        encoded(stories, "text", {"text": "<s></s>"})
