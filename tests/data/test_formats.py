"""Rows in the forms that people have: recognised from their columns, brought into shape, or refused with a reason."""

import gzip
import json

import pytest

from rlhf_jax.data.formats import FORMATS, Comparison, Demonstration, Prompt, Text, Unpaired, normalise, recognise
from rlhf_jax.data.rejects import BadRow, Place, Rejects
from rlhf_jax.data.rows import find_format, parse_columns, read_rows
from rlhf_jax.errors import UserError

PLACE = Place("f", 1)
HELLO = {"role": "user", "content": "hello"}
HI, HO = ({"role": "assistant", "content": text} for text in ("hi", "ho"))
SYSTEM = {"role": "system", "content": "be kind"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def side(reply, question="q"):
    return f"\n\nHuman: {question}\n\nAssistant:{reply}"


GOOD = {
    "messages": (
        {"messages": [SYSTEM, HELLO, HI, HELLO, HO]}, Demonstration((SYSTEM, HELLO), (HI, HELLO, HO), PLACE),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]},
        Demonstration((HELLO,), (HI,), PLACE),
    ),
    "prompt_completion": ({"prompt": "hello", "completion": "hi"}, Demonstration((HELLO,), (HI,), PLACE)),
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "hi"},
        Demonstration(({"role": "user", "content": "Add.\n\n1 2"},), (HI,), PLACE),
    ),
    "text": ({"text": " as it stands "}, Text(" as it stands ", PLACE)),
    "preference": (
        {"prompt": [HELLO], "chosen": "hi", "rejected": [HELLO, HO], "margin": 2},
        Comparison((HELLO,), ((HI,), (HO,)), (0, 1), PLACE, 2.0),
    ),
    "instruction_preference": (
        {"instruction": "hello", "input": None, "chosen": "hi", "rejected": "ho"},
        Comparison((HELLO,), ((HI,), (HO,)), (0, 1), PLACE),
    ),
    "transcripts": (
        {"chosen": side(" hi", "hello"), "rejected": side(" ho", "hello")},
        Comparison((HELLO,), ((HI,), (HO,)), (0, 1), PLACE),
    ),
    "ranking": (
        {"prompt": "hello", "responses": ["hi", "ho", [HI]], "ranks": [1, 7, 1]},
        Comparison((HELLO,), ((HI,), (HO,), (HI,)), (0, 1, 0), PLACE),
    ),
    "scored": (
        {"prompt": "hello", "responses": ["hi", "ho"], "scores": [0.5, 3]},
        Comparison((HELLO,), ((HI,), (HO,)), (1, 0), PLACE),
    ),
    "prompts": ({"prompt": [SYSTEM, HELLO]}, Prompt((SYSTEM, HELLO), PLACE)),
    "questions": ({"question": "hello"}, Prompt((HELLO,), PLACE)),
    "problems": ({"problem": "hello"}, Prompt((HELLO,), PLACE)),
    "instructions": (
        {"instruction": "hello", "input": "x"},
        Prompt(({"role": "user", "content": "hello\n\nx"},), PLACE),
    ),
    "unpaired": ({"prompt": "hello", "completion": "hi", "label": False}, Unpaired((HELLO,), (HI,), False, PLACE)),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_recognised_and_read(name):
    row, expected = GOOD[name]
    assert recognise(set(row) | {"id"}, FORMATS[name].kind) == name
    assert normalise(name, row, PLACE) == expected


def test_both_sides_may_be_whole_message_lists():
    row = {"chosen": [HELLO, HI, HELLO, HI], "rejected": [HELLO, HI, HELLO, HO]}
    assert normalise("transcripts", row, PLACE).prompt == (HELLO, HI, HELLO)
    spaced = {"prompt": "hello ", "chosen": [{"role": "user", "content": "hello "}, HI], "rejected": [HO]}
    assert normalise("preference", spaced, PLACE).responses == ((HI,), (HO,))


def test_a_transcript_as_prompt_becomes_its_turns():
    row = {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c: d\n\nAssistant:", "completion": " e"}
    prompt = normalise("prompt_completion", row, PLACE).prompt
    assert [(t["role"], t["content"]) for t in prompt] == [("user", "a"), ("assistant", "b"), ("user", "c: d")]


SPACED = "    return 1\n"


@pytest.mark.parametrize(
    ("name", "row", "found"),
    [
        ("prompt_completion", {"prompt": SPACED, "completion": SPACED}, (SPACED, SPACED)),
        ("alpaca", {"instruction": SPACED, "output": SPACED}, (SPACED, SPACED)),
        ("alpaca", {"instruction": " a ", "input": SPACED, "output": SPACED}, (" a \n\n" + SPACED, SPACED)),
        ("preference", {"prompt": SPACED, "chosen": SPACED, "rejected": SPACED.strip()}, (SPACED, SPACED, "return 1")),
        ("preference", {"prompt": " a", "chosen": "b", "rejected": "b\n"}, (" a", "b", "b\n")),
        ("transcripts", {"chosen": side(" " + SPACED, " a "), "rejected": side(" b", " a ")}, (" a ", SPACED, "b")),
        ("ranking", {"prompt": "a", "responses": [SPACED, "return 1"], "ranks": [0, 1]}, ("a", SPACED, "return 1")),
        ("unpaired", {"prompt": SPACED, "completion": SPACED, "label": True}, (SPACED, SPACED)),
        ("prompts", {"prompt": SPACED}, (SPACED,)),
        ("prompts", {"prompt": "q", "system": SPACED}, (SPACED, "q")),
        ("messages", {"messages": [HELLO | {"content": SPACED}, HI | {"content": SPACED}]}, (SPACED, SPACED)),
    ],
)
def test_space_is_kept_as_it_is(name, row, found):
    read = normalise(name, row, PLACE)
    answers = getattr(read, "responses", None) or [getattr(read, "response", ())]
    assert tuple(turn["content"] for part in (read.prompt, *answers) for turn in part) == found


def test_tools_reasoning_and_calls_are_kept():
    tools = [{"type": "function", "function": {"name": "add"}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "3"}], "reasoning_content": "1 + 2"}
    row = {"messages": [HELLO, call, {"role": "function", "content": "3"}, answer], "tools": tools}
    read = normalise("messages", row, PLACE)
    assert read.tools == tuple(tools)
    assert read.response[0]["tool_calls"] == call["tool_calls"] and read.response[0]["content"] == ""
    assert read.response[1]["role"] == "tool"
    assert read.response[2] == {"role": "assistant", "content": "3", "reasoning_content": "1 + 2"}


BAD = [
    ("messages", {"messages": [HELLO]}, "ends without an answer"),
    ("messages", {"messages": [HI]}, "empty prompt"),
    ("messages", {"messages": []}, "field 'messages' has no messages"),
    ("messages", {"messages": [HELLO, 3]}, "message 2 of 'messages' is int, not an object"),
    ("messages", {"messages": [HELLO, {"role": "cat", "content": "x"}]}, "no known role: 'cat'"),
    ("messages", {"messages": [HELLO, {"role": "assistant"}]}, "message 2 of 'messages' has no content"),
    ("messages", {"messages": [HELLO, {"role": "assistant", "content": 3}]}, "content that is int, not text"),
    ("messages", {"messages": [HELLO, {"role": "assistant", "content": [{"type": "image"}]}]}, "not text"),
    ("messages", {"messages": [HELLO, {"role": "assistant", "content": " "}]}, "empty answer"),
    ("messages", {"messages": [HELLO, HI], "tools": 3}, "field 'tools' is not a list of objects"),
    ("prompt_completion", {"prompt": "a"}, "field 'completion' is missing"),
    ("prompt_completion", {"prompt": "a", "completion": 3}, "field 'completion' is int, not text"),
    ("prompt_completion", {"prompt": None, "completion": "b"}, "field 'prompt' is null, not text"),
    ("prompt_completion", {"prompt": "a", "completion": " "}, "empty answer"),
    ("prompt_completion", {"prompt": " ", "completion": "b"}, "empty prompt"),
    ("prompt_completion", {"prompt": "a", "completion": "\ud800"}, "completion: a lone surrogate"),
    ("prompt_completion", {"prompt": "a", "completion": "\0"}, "completion: a NUL"),
    ("prompt_completion", {"prompt": side(" b") + "", "completion": "c"}, "the prompt ends with the assistant"),
    ("prompt_completion", {"prompt": "Assistant:", "completion": "b"}, "field 'prompt' has no messages"),
    ("sharegpt", {"conversations": "\n\nAssistant:"}, "empty answer"),
    ("alpaca", {"instruction": " ", "input": "", "output": "x"}, "empty prompt"),
    ("text", {"text": " "}, "empty text"),
    ("transcripts", {"chosen": side(" yes"), "rejected": side(" yes")}, "equal answers"),
    ("transcripts", {"chosen": side(" yes"), "rejected": side(" no", "other")}, "prompts differ"),
    ("transcripts", {"chosen": side(" "), "rejected": side(" no")}, "empty answer"),
    ("transcripts", {"chosen": side(" y"), "rejected": side(" n\n\nHuman: more")}, "ends without an answer"),
    ("transcripts", {"chosen": "plain", "rejected": "text"}, "no Assistant turn"),
    ("transcripts", {"chosen": "a" + side(" y"), "rejected": "a" + side(" n")}, "words before the first turn"),
    ("transcripts", {"chosen": side(" y", ""), "rejected": side(" n", "")}, "empty prompt"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "2"}, "'margin' holds str, not a number"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 10**400}, "not finite"),
    (
        "preference",
        {"prompt": "q", "chosen": "a", "rejected": "b", "probability": "1"},
        "'probability' holds str, not",
    ),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "probability": True}, "'probability' holds bool"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "probability": float("nan")}, "not finite"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "probability": 1.01}, "is not between 0 and 1"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b", "probability": -0.01}, "is not between 0 and 1"),
    (
        "preference",
        {"prompt": "q", "chosen": "a", "rejected": "b", "probability": 0.4, "margin": 1},
        "and a margin is",
    ),
    ("preference", {"prompt": "q", "chosen": [HELLO, HI], "rejected": "b"}, "does not begin and end with the assis"),
    ("ranking", {"prompt": "q", "responses": ["a"], "ranks": [0]}, "fewer than two answers"),
    ("ranking", {"prompt": "q", "responses": ["a", "b"], "ranks": [0]}, "not lists of equal length"),
    ("ranking", {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 1]}, "every answer has the same rank"),
    ("ranking", {"prompt": "q", "responses": ["a", "a"], "ranks": [0, 1]}, "equal answers"),
    ("scored", {"prompt": "q", "responses": ["a", "b"], "scores": [0, float("nan")]}, "not finite"),
    ("scored", {"prompt": "q", "responses": ["a", "b"], "scores": [0, True]}, "holds bool, not a number"),
    ("unpaired", {"prompt": "q", "completion": "a", "label": 1}, "field 'label' is int, not true or false"),
]


@pytest.mark.parametrize(("name", "row", "reason"), BAD)
def test_a_row_that_cannot_be_used_says_why(name, row, reason):
    with pytest.raises(BadRow) as caught:
        normalise(name, row, PLACE)
    assert reason in str(caught.value)


@pytest.mark.parametrize("name", ["preference", "instruction_preference", "transcripts"])
def test_a_pair_whose_label_is_below_one_half_is_turned_round(name):
    row = {field: value for field, value in GOOD[name][0].items() if field != "margin"}
    turned = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
    without = normalise(name, row, PLACE)
    assert without.probability is None and normalise(name, row | {"probability": None}, PLACE) == without
    for probability in (0.5, 0.75, 1):
        assert normalise(name, row | {"probability": probability}, PLACE) == without._replace(probability=probability)
    for probability in (0, 0.25):
        found = normalise(name, turned | {"probability": probability}, PLACE)
        assert found == without._replace(probability=1 - probability, turned=True)


def test_nothing_is_guessed(tmp_path):
    # A label makes a completion something else, two forms at once are nobody's guess, and unknown columns are named.
    assert recognise({"prompt", "completion", "label"}, "demonstrations") is None
    both = write(tmp_path / "both", [{"prompt": "a", "completion": "b", "messages": [HELLO, HI]}])
    with pytest.raises(
        UserError, match=r"both:1: columns .* could be messages or prompt_completion: say which by --dem"
    ):
        find_format(both, "demonstrations")
    assert find_format(both, "demonstrations", format="messages") == "messages"
    unknown = write(tmp_path / "unknown", [{"question": "a", "answer": "b"}])
    with pytest.raises(UserError, match="unknown:1: fields answer, question; known demonstrations are: messages"):
        find_format(unknown, "demonstrations")
    odd = write(tmp_path / "odd", [{"a\nb": "a", "c" * 900: 1}])
    with pytest.raises(UserError, match="odd:1: fields a b, ccc") as caught:
        find_format(odd, "demonstrations")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900
    columns = ("prompt=question", "completion=answer")
    assert find_format(unknown, "demonstrations", columns=columns) == "prompt_completion"
    [read] = read_rows(unknown, "prompt_completion", Rejects(), columns=columns)
    assert read.row.prompt == ({"role": "user", "content": "a"},) and read.fields == {"question": "a", "answer": "b"}
    with pytest.raises(UserError, match="'preference' is no format of demonstrations"):
        find_format(unknown, "demonstrations", format="preference")
    for wrong in ("prompt", "prompt=", "query=prompt"):
        with pytest.raises(UserError, match="is not OURS=THEIRS"):
            parse_columns([wrong])
    with pytest.raises(UserError, match=r"unknown:1: field 'reply' is missing"):
        list(read_rows(unknown, "prompt_completion", Rejects(), columns=("prompt=question", "completion=reply")))


def test_columns_that_are_swapped(tmp_path):
    path = write(tmp_path / "x", [{"chosen": "b", "rejected": "a", "prompt": "q"}])
    [read] = read_rows(path, "preference", Rejects(), columns=("chosen=rejected", "rejected=chosen"))
    assert [answer[0]["content"] for answer in read.row.responses] == ["a", "b"]


def test_real_demonstrations(shared_data):
    for name, used, left_out in [("dolly_3k", 2996, {}), ("alpaca_8k", 7996, {"empty answer": 4})]:
        path, rejects = str(shared_data / "sft" / f"{name}.jsonl.gz"), Rejects("skip")
        assert find_format(path, "demonstrations") == "alpaca"
        rows = list(read_rows(path, "alpaca", rejects))
        assert len(rows) == used and rejects.counts() == left_out
        assert rows[0].row.place.line == 1 and rows[0].number == 0


@pytest.mark.parametrize(
    ("name", "form", "total", "unusable"),
    [
        ("hh_helpful_base.train", "transcripts", 2006, {"empty answer": 4, "prompts differ": 7, "equal answers": 2}),
        ("hh_helpful_base.eval", "transcripts", 348, {"prompts differ": 2}),
        ("hh_harmless_base.train", "transcripts", 1970, {"empty answer": 4, "prompts differ": 3}),
        ("hh_helpful_rejection_sampled.train", "transcripts", 1749, {"equal answers": 20, "prompts differ": 3}),
        ("raschka_dpo_1100", "instruction_preference", 1100, {"equal answers": 6}),
    ],
)
def test_real_comparisons_are_used_or_counted(shared_data, tmp_path, name, form, total, unusable):
    path, rejects = shared_data / "preference" / f"{name}.jsonl.gz", Rejects("skip")
    assert find_format(str(path), "comparisons") == form
    rows = [read.row for read in read_rows(str(path), form, rejects)]
    assert rejects.counts() == unusable and len(rows) + sum(unusable.values()) == total
    # Every line is in exactly one place, under its own number.
    rejects.write_to(tmp_path / "rejected.jsonl")
    left_out = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert sorted([row.place.line for row in rows] + [entry["line"] for entry in left_out]) == [*range(1, total + 1)]
    with gzip.open(path, "rt") as file:
        source = [json.loads(line) for line in file]
    for row in rows[:: len(rows) // 50]:
        for field, (answer,) in zip(("chosen", "rejected"), row.responses, strict=True):
            assert source[row.place.line - 1][field].strip().endswith(answer["content"])
