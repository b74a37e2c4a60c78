"""The sample that a run prints: which tokens are given, which are learned."""

import pytest
from transformers import AutoTokenizer

from rlhf_jax.data.encode import encode
from rlhf_jax.data.formats import Demonstration
from rlhf_jax.data.rejects import Place
from rlhf_jax.data.sample import GIVEN, LEARNED, STYLES, marked, piece, sample
from rlhf_jax.data.tokens import pack_sequences


@pytest.fixture(scope="module")
def tokenizer(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "tokenizer" / "minimind")


def conversation(*texts):
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return Demonstration((turns[0],), tuple(turns[1:]), Place("f", 1))


def test_brackets_stand_around_what_is_learned_and_nothing_else(tokenizer):
    documents = [encode(conversation("a", "b", "c", "d"), tokenizer, 200)[0], ([5], [6])]
    shown = sample(pack_sequences(documents, length=200, pad_id=0), tokenizer, colour=False).plain
    learned = [part.split("]]")[0] for part in shown.split("[[")[1:]]
    assert [part.replace("|", "") for part in learned] == ["b<im_end>", "d<im_end>"]
    assert "\\n" in shown and "\n" not in shown


def test_with_colour_the_text_is_the_same_without_brackets(tokenizer):
    text = marked(["a", "b", "c"], [False, True, True], colour=True)
    assert text.plain == "abc"
    assert [span.style for span in text.spans] == [STYLES[False][0], STYLES[True][1], STYLES[True][0]]
    assert marked(["a", "b", "c"], [False, True, True], colour=False).plain == "a[[b|c]]"


def test_a_long_document_is_cut_around_where_learning_begins(tokenizer):
    given, learned = (tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in "xy")
    tokens = pack_sequences([(given * 500, learned * 500)], length=1000, pad_id=0)
    shown = sample(tokens, tokenizer, colour=False).plain
    assert shown.startswith("… x|") and shown.endswith("|y]] …")
    assert (shown.count("x"), shown.count("y")) == (GIVEN, LEARNED)


def test_what_no_terminal_should_be_sent_is_escaped(tokenizer):
    escape = tokenizer("\x1b", add_special_tokens=False)["input_ids"]
    assert "".join(piece(i, tokenizer) for i in escape) == "\\x1b"
