"""Any bytes, any rows: no crash without a message, and every row is used or counted."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rlhf_jax.data.encode import encode_rows
from rlhf_jax.data.formats import COLUMNS, FORMATS, Prompt
from rlhf_jax.data.rejects import Rejects
from rlhf_jax.data.rows import find_format, read_rows
from rlhf_jax.data.tokens import size
from rlhf_jax.errors import UserError

LIMIT = 48
KINDS = sorted({form.kind for form in FORMATS.values()})
# The same examples in every run; function-scoped folders are written anew for each.
FUZZ = settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

surrogates = st.characters(categories=["Cs"])
odd = st.sampled_from(
    ["", " ", "\0", "</s>", "<|im_end|>", "<|im_start|>", "\ufdd0", "{{ x }}", "\n\nHuman: a\n\nAssistant: b", 
     "é" * 80, "\n\nHuman:", "\n\nAssistant:", "<think>", "</think>", "\u2028", "\r"]
)  # fmt: skip
text = st.text(max_size=8) | odd | st.text(surrogates | st.characters(), max_size=4)
number = st.integers() | st.floats() | st.just(10**400)
scalar = st.none() | st.booleans() | number | text
anything = st.recursive(scalar, lambda x: st.lists(x, max_size=3) | st.dictionaries(text, x, max_size=3), max_leaves=6)
role = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "cat"]) | anything
call = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": text, "arguments": anything})})
turn = st.fixed_dictionaries(
    {"role": role, "content": text | anything},
    optional={"tool_calls": st.lists(call, max_size=2) | anything, "reasoning_content": scalar, "name": scalar},
)
turns = st.lists(turn, max_size=4)
word = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8) | odd
asked = word.map(lambda t: [{"role": "user", "content": t}])
said = word.map(lambda t: [{"role": "assistant", "content": t}])
good_turns = st.lists(word, min_size=1, max_size=3).map(
    lambda texts: [{"role": r, "content": f"{r[0]} {t}"} for t in texts for r in ("user", "assistant")]
)
PLAUSIBLE = {
    "messages": good_turns, "conversations": good_turns, "prompt": word | asked, "completion": word | said,
    "chosen": word | said, "rejected": word | said, "responses": st.lists(word, min_size=2, max_size=3, unique=True),
    "ranks": st.permutations([0, 1]) | st.permutations([0, 1, 2]),
    "scores": st.lists(st.floats(), min_size=2, max_size=3),
    "label": st.booleans(), "margin": st.floats(0, 9), "tools": st.none() | st.lists(call, max_size=2),
}  # fmt: skip
value = text | turns | good_turns | st.lists(text | turns, max_size=3) | st.lists(number, max_size=3) | anything


@st.composite
def plausible(draw, name):
    """A row as one might be, in which at times one field is anything."""
    form = FORMATS[name]
    columns = {column: draw(PLAUSIBLE.get(column, word)) for column in form.columns}
    columns |= {column: draw(PLAUSIBLE.get(column, word)) for column in form.optional if draw(st.booleans())}
    if name == "transcripts" and draw(st.booleans()):
        question = draw(word)
        for side in ("chosen", "rejected"):
            columns[side] = f"\n\nHuman: {question}\n\nAssistant: {draw(word)}"
    if draw(st.integers(0, 2)) == 0:
        columns[draw(st.sampled_from(sorted(columns)))] = draw(value)
    return columns


row = st.one_of([plausible(name) for name in FORMATS]) | st.dictionaries(
    st.sampled_from(sorted(COLUMNS)) | text, value, max_size=4
)


@pytest.fixture(scope="module", params=["model/stories260K-hf", "tokenizer/minimind"])
def tokenizer(request, shared_data):
    return AutoTokenizer.from_pretrained(shared_data / request.param)


def used_and_counted(path, form, tokenizer):
    """How many rows became ids, and how many were rejected; each is in exactly one place."""
    rejects = Rejects("skip")
    used = list(encode_rows(read_rows(str(path), form, rejects), tokenizer, LIMIT, rejects))
    left_out = path.parent / "rejected.jsonl"
    left_out.unlink(missing_ok=True)
    rejects.write_to(left_out)
    entries = [json.loads(line) for line in left_out.read_text().splitlines()] if left_out.exists() else []
    assert len(entries) == sum(rejects.counts().values())
    assert all(entry["reason"] and "\n" not in entry["reason"] for entry in entries)
    places = [read.row.place.line for read, _ in used] + [entry["line"] for entry in entries]
    assert len(set(places)) == len(places)
    for read, ids in used:
        check(read.row, ids, tokenizer)
    return len(used), len(entries)


def check(row, ids, tokenizer):
    """What comes through is fit to train on: it fits, and an EOS ends what is learned."""
    if isinstance(row, Prompt):
        assert 0 < len(ids) <= LIMIT
        return
    if hasattr(ids, "responses"):
        documents = [(ids.prompt, response) for response in ids.responses]
    elif hasattr(ids, "response"):
        documents = [(ids.prompt, ids.response)]
    else:
        documents = [ids]
    for document in documents:
        assert 0 < size(document) <= LIMIT and len(document) % 2 == 0
        assert document[-1][-1] == tokenizer.eos_token_id
        assert all(isinstance(token, int) and 0 <= token < len(tokenizer) for part in document for token in part)


def one_line(path, form, tokenizer):
    """By default the first bad row stops the run, with one line that names it."""
    rejects = Rejects()
    try:
        for _ in encode_rows(read_rows(str(path), form, rejects), tokenizer, LIMIT, rejects):
            pass
    except UserError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        return True
    return False


@FUZZ
@given(rows=st.lists(row, min_size=1, max_size=5))
def test_any_rows_in_any_format(tmp_path, tokenizer, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    for kind in KINDS:
        try:
            find_format(str(path), kind)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
    for form in FORMATS:
        used, counted = used_and_counted(path, form, tokenizer)
        assert used + counted == len(rows)
        assert one_line(path, form, tokenizer) == (counted > 0)


@FUZZ
@given(
    lines=st.lists(st.binary(max_size=30) | row.map(lambda r: json.dumps(r).encode()), max_size=6),
    cut=st.integers(0, 9),
)
def test_any_bytes(tmp_path, tokenizer, lines, cut):
    path = tmp_path / "bytes.jsonl"
    content = b"\n".join(lines)
    path.write_bytes(content[: len(content) - cut])
    try:
        used, counted = used_and_counted(path, "prompt_completion", tokenizer)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        assert (
            path.read_bytes()[:2] == b"\x1f\x8b" or not path.read_bytes().strip() or path.read_bytes()[:4] == b"PAR1"
        )
    else:
        assert used + counted == sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
