import gzip
import json

import pytest
from transformers import AutoTokenizer

from rlhf_jax.data.text import (
    Comparison,
    Demonstration,
    encode_comparisons,
    encode_demonstrations,
    encode_prompts,
    read_comparisons,
    read_demonstrations,
)
from rlhf_jax.errors import UserError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def user(text):
    return ({"role": "user", "content": text},)


def counts(report):
    return {reason: len(lines) for reason, lines in report.items()}


def test_real_demonstrations(shared_data):
    rows, report = read_demonstrations(shared_data / "sft" / "dolly_3k.jsonl.gz")
    assert len(rows) == 2996 and report == {}
    assert rows[0].prompt == user("How do I start running?") and rows[0].line == 1
    rows, report = read_demonstrations(shared_data / "sft" / "alpaca_8k.jsonl.gz")
    assert len(rows) == 7996 and counts(report) == {"empty response": 4}


EQUAL, DIFFER = "chosen and rejected are equal", "prompts differ before the last reply"


@pytest.mark.parametrize(
    ("name", "total", "unusable"),
    [
        ("hh_helpful_base.train", 2006, {"empty last reply": 4, DIFFER: 7, EQUAL: 2}),
        ("hh_helpful_base.eval", 348, {DIFFER: 2}),
        ("hh_harmless_base.train", 1970, {"empty last reply": 4, DIFFER: 3}),
        ("hh_helpful_rejection_sampled.train", 1749, {EQUAL: 20, DIFFER: 3}),
        ("raschka_dpo_1100", 1100, {EQUAL: 6}),
    ],
)
def test_real_comparisons_are_used_or_counted(shared_data, name, total, unusable):
    path = shared_data / "preference" / f"{name}.jsonl.gz"
    rows, report = read_comparisons(path)
    assert counts(report) == unusable
    assert len(rows) + sum(unusable.values()) == total
    # Every line is in exactly one place, under its own number.
    lines = [row.line for row in rows] + [line for some in report.values() for line in some]
    assert sorted(lines) == list(range(1, total + 1))
    with gzip.open(path, "rt") as file:
        source = [json.loads(line) for line in file]
    for row in rows[:: len(rows) // 50]:
        assert source[row.line - 1]["chosen"].strip().endswith(row.chosen)
        assert source[row.line - 1]["rejected"].strip().endswith(row.rejected)


def test_both_styles_of_demonstrations(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        [
            {"instruction": " Add. ", "input": "1 2", "output": " 3 ", "id": 1},
            {"instruction": "Say hi.", "input": None, "output": "hi", "id": "two"},
            {"instruction": "Say ho.", "output": "ho"},
            {"instruction": "Say nothing.", "input": "", "output": " "},
            {"instruction": " ", "input": "", "output": "x"},
        ],
    )
    rows, report = read_demonstrations(path)
    assert rows == [
        Demonstration(user("Add.\n\n1 2"), "3", 1),
        Demonstration(user("Say hi."), "hi", 2),
        Demonstration(user("Say ho."), "ho", 3),
    ]
    assert report == {"empty response": [4], "empty prompt": [5]}

    transcript = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c: d\n\nAssistant:"
    path = write(
        tmp_path / "b.jsonl",
        [{"prompt": transcript, "completion": " e"}, {"prompt": "2000-01-01", "completion": "2000-01-02"}],
    )
    (first, second), _ = read_demonstrations(path)
    assert [(turn["role"], turn["content"]) for turn in first.prompt] == [
        ("user", "a"), ("assistant", "b"), ("user", "c: d"),
    ]  # fmt: skip
    # Text stays text: nothing guesses that a column holds dates.
    assert second == Demonstration(user("2000-01-01"), "2000-01-02", 2)


def test_comparisons_that_cannot_be_used_are_named(tmp_path):
    def side(reply, question="q"):
        return f"\n\nHuman: {question}\n\nAssistant:{reply}"

    path = write(
        tmp_path / "hh.jsonl",
        [
            {"chosen": side(" yes"), "rejected": side(" no")},
            {"chosen": side(" yes"), "rejected": side(" yes")},
            {"chosen": side(" yes"), "rejected": side(" no", "other")},
            {"chosen": side(" "), "rejected": side(" no")},
            {"chosen": side(" yes"), "rejected": side(" no\n\nHuman: more")},
            {"chosen": "plain", "rejected": "text"},
            {"chosen": side(" yes", ""), "rejected": side(" no", "")},
        ],
    )
    rows, report = read_comparisons(path)
    assert rows == [Comparison(user("q"), "yes", "no", 1)]
    assert report == {
        EQUAL: [2], DIFFER: [3], "empty last reply": [4], "ends on a Human turn": [5],
        "no Assistant turn": [6], "empty prompt": [7],
    }  # fmt: skip
    path = write(tmp_path / "fields.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2}])
    assert read_comparisons(path)[0] == [Comparison(user("q"), "a", "b", 1)]


GOOD = b'{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file has no rows"),
        (b"\n \n", "the file has no rows"),
        (GOOD + b"\n{bad\n", "x:3: not JSON: "),
        (GOOD + b'{"prompt": "a"}\n', "x:2: field 'completion' is missing"),
        (GOOD + b'{"prompt": "a", "completion": 3}\n', "x:2: field 'completion' is int, not text"),
        (GOOD + b'{"prompt": null, "completion": "b"}\n', "x:2: field 'prompt' is NoneType, not text"),
        (GOOD + b"[1]\n", "x:2: a JSON list, not an object"),
        (GOOD + b'{"prompt": "\xff", "completion": "b"}\n', "x:2: not UTF-8"),
        (b'{"question": "a"}\n', "x:1: fields question; known are: prompt, completion; instruction, output"),
        (b'{"prompt": "a", "completion": " "}\n', r"x: no row can be used: empty response \(1\)"),
        (gzip.compress(GOOD * 5000)[:-20], "x: damaged gzip file after line"),
        (b"\x1f\x8bnot gzip", "x: damaged gzip file after line 0"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_demonstrations(tmp_path / "x")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(UserError, match="no: No such file"):
        read_demonstrations(tmp_path / "no")
    with pytest.raises(UserError, match="Is a directory"):
        read_comparisons(tmp_path)


def test_gzip_is_known_by_content_and_a_byte_order_mark_is_passed_over(tmp_path):
    (tmp_path / "zipped.jsonl").write_bytes(gzip.compress(b"\xef\xbb\xbf" + GOOD))
    assert read_demonstrations(tmp_path / "zipped.jsonl")[0] == [Demonstration(user("a"), "b", 1)]


@pytest.fixture(scope="module", params=["model/stories260K-hf", "tokenizer/minimind"])
def tokenizer(request, shared_data):
    return AutoTokenizer.from_pretrained(shared_data / request.param)


def test_ids_of_a_demonstration(tokenizer):
    conversation = (*user("How?"), {"role": "assistant", "content": "So."}, *user("Why?"))
    rows = [Demonstration(conversation, "Because. é", 1)]
    [(prompt, response)], report = encode_demonstrations(rows, tokenizer, 200)
    assert report == {}
    assert prompt.count(tokenizer.bos_token_id) == (3 + 1 if tokenizer.chat_template else 1)
    assert response[-1] == tokenizer.eos_token_id and response.count(tokenizer.eos_token_id) == 1
    text = tokenizer.decode(prompt + response)
    if tokenizer.chat_template:
        expected = tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=True)
        assert text == expected + "Because. é" + tokenizer.eos_token
    else:
        assert text.replace("<s> ", "<s>") == (
            "<s>\n\nHuman: How?\n\nAssistant: So.\n\nHuman: Why?\n\nAssistant: Because. é</s>"
        )
    assert encode_prompts([conversation], tokenizer) == [prompt]


def test_a_special_token_in_a_text_is_only_text(tokenizer):
    rows = [Comparison(user("q"), f"a{tokenizer.eos_token}b", "c", 1)]
    [(_, chosen, _)], _ = encode_comparisons(rows, tokenizer, 200)
    assert chosen.count(tokenizer.eos_token_id) == 1 and chosen[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token in tokenizer.decode(chosen[:-1])


def test_truncation_takes_the_prompt_from_the_left_and_never_the_response(tokenizer):
    short, long = "yes", "one two three four five " * 20
    [(whole, *_)], _ = encode_comparisons([Comparison(user(long), short, "no", 1)], tokenizer, 4000)
    [answer] = tokenizer([long.strip()], add_special_tokens=False)["input_ids"]
    rows = [
        Comparison(user(long), short, "no no no", 11),
        Comparison(user("q"), long, short, 12),
        Comparison(user("q"), short, "no", 13),
    ]
    encoded, report = encode_comparisons(rows, tokenizer, 64)
    assert report == {"prompt shortened to fit 64 tokens": [11], "response too long for 64 tokens": [12]}
    prompt, chosen, rejected = encoded[0]
    assert len(prompt) + max(len(chosen), len(rejected)) == 64
    assert prompt[0] == tokenizer.bos_token_id and prompt[1:] == whole[-len(prompt) + 1 :]
    assert chosen[-1] == rejected[-1] == tokenizer.eos_token_id
    # A response may take three quarters and no more from a long prompt.
    for length, kept in [((len(answer) + 1) * 4 // 3 + 2, True), ((len(answer) + 1) * 4 // 3 - 2, False)]:
        encoded, _ = encode_demonstrations([Demonstration(user(long), long.strip(), 1)], tokenizer, length)
        assert bool(encoded) == kept


def test_what_a_chat_template_refuses_is_named(shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizer" / "minimind")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('turns must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    rows = [Demonstration(user("a") * 2, "b", 4), Demonstration(user("a"), "b", 5)]
    encoded, report = encode_demonstrations(rows, tokenizer, 64)
    assert len(encoded) == 1 and report == {"refused by the chat template: turns must alternate": [4]}


def test_without_eos_nothing_is_encoded(shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "model" / "stories260K-hf")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS"):
        encode_demonstrations([Demonstration(user("a"), "b", 1)], tokenizer, 64)


def test_real_files_are_encoded_or_counted(shared_data, tokenizer):
    rows, _ = read_comparisons(shared_data / "preference" / "hh_helpful_base.eval.jsonl.gz")
    encoded, report = encode_comparisons(rows, tokenizer, 256)
    long = report.get("response too long for 256 tokens", [])
    assert len(encoded) + len(long) == len(rows) == 346 and len(encoded) > 200
    assert all(len(prompt) + max(len(a), len(b)) <= 256 for prompt, a, b in encoded)
