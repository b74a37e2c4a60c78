"""Columns beside those of a format: a system text, a history and tools are used, others are refused or counted."""

import json

import pytest
from transformers import AutoTokenizer

from rlhf_jax.data.encode import encode, encode_rows
from rlhf_jax.data.formats import FORMATS, normalise
from rlhf_jax.data.rejects import BadRow, Place, Rejects
from rlhf_jax.data.rows import read_rows

PLACE = Place("f", 1)
USER, ANSWER, OTHER = {"role": "user", "content": "q"}, *({"role": "assistant", "content": text} for text in "ab")
SYSTEM = {"role": "system", "content": "be kind"}
ROWS = {
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "alpaca": {"instruction": "q", "output": "a"},
    "text": {"text": "q"},
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "instruction_preference": {"instruction": "q", "chosen": "a", "rejected": "b"},
    "transcripts": {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    "ranking": {"prompt": "q", "responses": ["a", "b"], "ranks": [0, 1]},
    "scored": {"prompt": "q", "responses": ["a", "b"], "scores": [1, 0]},
    "prompts": {"prompt": "q"},
    "questions": {"question": "q"},
    "problems": {"problem": "q"},
    "instructions": {"instruction": "q"},
    "unpaired": {"prompt": "q", "completion": "a", "label": True},
}
SPOKEN = sorted(set(FORMATS) - {"text"})


@pytest.fixture(scope="module")
def tokenizer(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "tokenizer" / "minimind")


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("name", SPOKEN)
def test_a_system_text_stands_before_the_prompt(name, column):
    row = ROWS[name] | {column: "be kind"}
    assert normalise(name, row, PLACE).prompt == (SYSTEM, USER)
    for empty in (None, "", " "):
        assert normalise(name, row | {column: empty}, PLACE) == normalise(name, ROWS[name], PLACE)
    with pytest.raises(BadRow, match=f"field '{column}' is int, not text"):
        normalise(name, row | {column: 3}, PLACE)


def test_a_system_text_that_is_there_already():
    row = {"messages": [SYSTEM, USER, ANSWER], "system": "be kind"}
    assert normalise("messages", row, PLACE).prompt == (SYSTEM, USER)
    with pytest.raises(BadRow, match="a system text in column 'system', and another"):
        normalise("messages", row | {"system": "be rude"}, PLACE)
    # Answers that repeat the prompt do so with the system text, or without.
    for before in ([USER], [SYSTEM, USER]):
        row = {"prompt": [USER], "chosen": [*before, ANSWER], "rejected": [*before, OTHER], "system": "be kind"}
        assert normalise("preference", row, PLACE).responses == ((ANSWER,), (OTHER,))


HISTORY = [["q1", "a1"], ["q2", "a2"]]
EARLIER = tuple(
    {"role": role, "content": f"{role[0].replace('u', 'q')}{n}"} for n in "12" for role in ("user", "assistant")
)


@pytest.mark.parametrize("name", sorted(set(SPOKEN) - {"messages", "sharegpt"}))
def test_a_history_stands_before_the_prompt(name):
    row = ROWS[name] | {"history": HISTORY, "system": "be kind"}
    read = normalise(name, row, PLACE)
    if FORMATS[name].kind == "demonstrations":  # its answers are learned, as in LLaMA-Factory
        assert (*read.prompt, *read.response) == (SYSTEM, *EARLIER, USER, ANSWER) and read.learned is None
        assert len(read.prompt) == 2
    else:
        assert read.prompt == (SYSTEM, *EARLIER, USER)
    as_messages = normalise(name, row | {"history": [dict(turn) for turn in EARLIER]}, PLACE)
    assert as_messages == read
    for wrong in ("q1", [["q1"]], [["q1", 3]], [["q1", " "]], [["q1", "a1"], {"role": "user"}], [USER]):
        with pytest.raises(BadRow, match="history"):
            normalise(name, row | {"history": wrong}, PLACE)


def test_a_history_beside_turns_is_refused():
    with pytest.raises(BadRow, match="earlier turns in column 'history', and others in 'messages'"):
        normalise("messages", ROWS["messages"] | {"history": HISTORY}, PLACE)
    for column, value in {"system": "s", "history": HISTORY, "tools": [{"name": "add"}]}.items():
        with pytest.raises(BadRow, match=f"column '{column}' cannot be used in this format"):
            normalise("text", ROWS["text"] | {column: value}, PLACE)


CHANGING = {
    "images": ["x.png"], "image": "x.png", "videos": ["x"], "audio": "x", "chat_template_kwargs": {"thinking": False},
    "documents": [{"text": "x"}],
}  # fmt: skip
WEIGHING = {"weight": 0.5, "weights": [1, 0], "loss_mask": [0, 1], "sample_weight": 0, "mask": "user"}


@pytest.mark.parametrize("name", FORMATS)
def test_a_column_that_means_something_and_is_not_used_is_refused_by_name(name):
    kind = FORMATS[name].kind
    for column, value in {**CHANGING, **({} if kind == "prompts" else WEIGHING)}.items():
        with pytest.raises(BadRow, match=f"column '{column}' cannot be used: "):
            normalise(name, ROWS[name] | {column: value}, PLACE)
        normalise(name, ROWS[name] | {column: None}, PLACE)
    normalise(name, ROWS[name] | {"weight": 1.0}, PLACE)
    if kind == "demonstrations":
        for column in ("label", "kto_tag"):
            with pytest.raises(BadRow, match=f"column '{column}' says whether the answer is good"):
                normalise(name, ROWS[name] | {column: False}, PLACE)
            normalise(name, ROWS[name] | {column: "a topic"}, PLACE)
    if name in ("ranking", "scored"):
        for column in ("margin", "probability"):
            with pytest.raises(BadRow, match=f"column '{column}' cannot be used: it is between two answers"):
                normalise(name, ROWS[name] | {column: 1}, PLACE)


@pytest.mark.parametrize("name", FORMATS)
def test_columns_that_nothing_reads_are_counted_and_said_once(tmp_path, tokenizer, name):
    row = ROWS[name] | {"id": 7, "source": "x", "topic": None, "url": ""}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n" + json.dumps(ROWS[name]) + "\n")
    rejects = Rejects()
    assert len(list(encode_rows(read_rows(str(path), name, rejects), tokenizer, 400, rejects))) == 3
    # Beside a prompt they are for rewards.
    expected = {} if FORMATS[name].kind == "prompts" else {"columns not read: id, source": 2}
    assert {note: n for note, n in rejects.notes().items() if "not read" in note} == expected
    assert sum("columns not read" in line for line in rejects.summary()) == len(expected)


def test_the_system_text_is_in_the_ids(tokenizer):
    row = normalise("sharegpt", ROWS["sharegpt"] | {"system": "be kind"}, PLACE)
    plain = normalise("messages", {"messages": [SYSTEM, USER, ANSWER]}, PLACE)
    assert encode(row, tokenizer, 400) == encode(plain, tokenizer, 400)
