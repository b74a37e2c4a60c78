"""Flags of messages: which answers are learned."""

import json

import pytest
from transformers import AutoTokenizer

from rlhf_jax.data.encode import encode, encode_rows
from rlhf_jax.data.formats import normalise
from rlhf_jax.data.rejects import BadRow, Place, Rejects
from rlhf_jax.data.rows import read_rows
from rlhf_jax.data.tokens import pad_sequences

PLACE = Place("f", 1)
USER, SYSTEM = {"role": "user", "content": "q"}, {"role": "system", "content": "s"}


def answer(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def learned(tokenizer, row, form="messages", length=400):
    """The words that are learned, from the batch's mask, and the whole text."""
    document, _ = encode(normalise(form, row, PLACE), tokenizer, length)
    tokens = pad_sequences([document], length=length, pad_id=0)
    text = tokenizer.decode([i for part in document for i in part])
    return tokenizer.decode(tokens.targets[tokens.mask].tolist()), text


@pytest.fixture(scope="module", params=["model/stories260K-hf", "tokenizer/minimind"])
def tokenizer(request, shared_data):
    return AutoTokenizer.from_pretrained(shared_data / request.param)


OFF = {
    "weight": 0, "train": False, "training": False, "trainable": 0, "loss_mask": 0, "loss": False, "learn": 0,
    "masked": True,
}  # fmt: skip


@pytest.mark.parametrize("name", OFF)
def test_an_answer_that_is_marked_is_not_learned(tokenizer, name):
    off, on = {name: OFF[name]}, {name: type(OFF[name])(not OFF[name])}
    plain = {"messages": [USER, answer("one"), USER, answer("two")]}
    first = {"messages": [USER, answer("one", **off), USER, answer("two", **on)]}
    words, text = learned(tokenizer, first)
    assert "two" in words and "one" not in words and text == learned(tokenizer, plain)[1]
    assert "one" in learned(tokenizer, plain)[0] and "two" in learned(tokenizer, plain)[0]
    # The last one marked: what comes after the last that is learned is not needed.
    last = {"messages": [USER, answer("one", **on), USER, answer("two", **off)]}
    words, text = learned(tokenizer, last)
    assert "one" in words and "two" not in words and "two" not in text and words.count(tokenizer.eos_token) == 1
    one = learned(tokenizer, {"messages": [USER, answer("one")]})
    assert (words, text) == one
    with pytest.raises(BadRow, match="nothing is to be learned"):
        learned(tokenizer, {"messages": [USER, answer("one", **off)]})


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ({"weight": 0.5}, "'weight' '0.5': a message is learned or it is not"),
        ({"weight": "0"}, "'weight' '0': a message is learned or it is not"),
        ({"weight": 0, "train": True}, "flags that contradict each other: weight, train"),
        ({"masked": False, "train": False}, "flags that contradict each other"),
        ({"mask": 1}, "'mask', which cannot be used"),
        ({"train_detail": []}, "'train_detail', which cannot be used"),
        ({"loss_scale": 0.3}, "'loss_scale', which cannot be used"),
    ],
)
def test_a_flag_that_is_not_clear_is_refused(flag, reason):
    with pytest.raises(BadRow, match=f"message 2 of 'messages' has {reason}"):
        normalise("messages", {"messages": [USER, answer("a", **flag)]}, PLACE)
    kept = normalise("messages", {"messages": [USER, answer("a", weight=1.0, train=None, masked=0)]}, PLACE)
    assert kept.response == (answer("a"),) and kept.learned is None


def test_flags_in_the_other_formats(tokenizer):
    turns = [("human", "q", {}), ("gpt", "one", {"weight": 0}), ("human", "q", {}), ("gpt", "two", {})]
    sharegpt = {"conversations": [{"from": who, "value": text, **flag} for who, text, flag in turns], "system": "s"}
    words, _ = learned(tokenizer, sharegpt, "sharegpt")
    assert "two" in words and "one" not in words
    answers = {"prompt": [USER], "completion": [answer("one", weight=0), USER, answer("two")]}
    words, _ = learned(tokenizer, answers, "prompt_completion")
    assert "two" in words and "one" not in words
    off = [answer("a", weight=0)]
    for form, row, field in (
        ("preference", {"prompt": "q", "chosen": off, "rejected": "b"}, "chosen"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": [USER, *off]}, "rejected"),
        ("transcripts", {"chosen": [USER, *off], "rejected": [USER, answer("b")]}, "chosen"),
        ("ranking", {"prompt": "q", "responses": ["b", off], "ranks": [0, 1]}, "response"),
        ("unpaired", {"prompt": "q", "completion": off, "label": True}, "completion"),
    ):
        with pytest.raises(BadRow, match=f"'{field}' is marked by 0|does not begin and end"):
            normalise(form, row, PLACE)


def test_a_flag_on_what_others_say_is_counted(tmp_path, tokenizer):
    rows = [
        {"messages": [{**USER, "weight": 1}, answer("a", weight=1)]},
        {"messages": [{**USER, "weight": 0}, answer("a")]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rejects = Rejects()
    assert len(list(encode_rows(read_rows(str(path), "messages", rejects), tokenizer, 400, rejects))) == 2
    assert rejects.notes() == {"columns not read: messages[].weight of others than the assistant": 1}


def test_flags_stay_with_their_messages_when_turns_are_dropped(tokenizer):
    long = "word " * 40
    turns = [SYSTEM, {**USER, "content": long}, answer("zero"), USER, answer("one", weight=0), USER, answer("two")]
    row = normalise("messages", {"messages": turns}, PLACE)
    whole, dropped = encode(row, tokenizer, 400)
    assert dropped == 0 and len(whole) == 4
    document, dropped = encode(row, tokenizer, 100)
    words = tokenizer.decode([i for part in document[1::2] for i in part])
    assert dropped == 2 and "two" in words and "one" not in words and "zero" not in words
