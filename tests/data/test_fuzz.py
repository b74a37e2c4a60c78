"""Any bytes, any rows: no crash without a message, and every row is used or counted."""

import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rlhf_jax.data.encode import encode, encode_rows
from rlhf_jax.data.formats import COLUMNS, FORMATS, Prompt, normalise
from rlhf_jax.data.rejects import BadRow, Place, Rejects
from rlhf_jax.data.rows import find_format, read_rows
from rlhf_jax.data.tokens import size
from rlhf_jax.errors import UserError

LIMIT = 48
KINDS = sorted({form.kind for form in FORMATS.values()})
# The same examples in every run with the same modules loaded, of which Hypothesis takes constants. Function-scoped
# folders are written anew for each.
FUZZ = settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

surrogates = st.characters(categories=["Cs"])
odd = st.sampled_from(
    ["", " ", "\0", "</s>", "<|im_end|>", "<|im_start|>", "\ufdd0", "{{ x }}", "\n\nHuman: a\n\nAssistant: b", 
     "é" * 80, "\n\nHuman:", "\n\nAssistant:", "<think>", "</think>", "\u2028", "\r", "<|user|>", "[gMASK]<sop>",
     "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n", "<s>[INST] a [/INST] b</s>",
     "<|im_start|>assistant\n", "a</s>", "a<|im_end|>\n", "<start_of_turn>user\na", "    a\n"]
)  # fmt: skip
text = st.text(max_size=8) | odd | st.text(surrogates | st.characters(), max_size=4)
number = st.integers() | st.floats() | st.just(10**400)
scalar = st.none() | st.booleans() | number | text
anything = st.recursive(scalar, lambda x: st.lists(x, max_size=3) | st.dictionaries(text, x, max_size=3), max_leaves=6)
role = st.sampled_from(
    ["user", "assistant", "system", "tool", "human", "gpt", "function_call", "observation", "cat"]
) | anything  # fmt: skip
call = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": text, "arguments": anything})})
flag = st.sampled_from([0, 1, True, False, None, 0.5, "0"])
flags = {name: flag for name in ("weight", "train", "loss_mask", "masked", "mask")}
turn = st.fixed_dictionaries(
    {"role": role, "content": text | anything},
    optional={
        "tool_calls": st.lists(call, max_size=2) | anything | st.just("[]"),
        "reasoning_content": scalar,
        "thinking": scalar,
        "name": scalar,
        "function_call": call | anything,
        **flags,
    },
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
    "label": st.booleans(), "margin": st.floats(0, 9), "probability": st.floats(0, 1),
    "tools": st.none() | st.lists(call, max_size=2) | st.sampled_from(["", "[]", '[{"name": "add"}]', "[3]"]),
    "functions": st.none() | st.just([{"name": "add"}]),
    "history": st.none() | st.lists(st.tuples(word, word), max_size=2),
    **{name: st.none() | word for name in ("system", "system_prompt", "system_message")},
}  # fmt: skip
BESIDE = {"images": anything, "weight": number, "chat_template_kwargs": anything, "id": scalar, "label": anything}
value = text | turns | good_turns | st.lists(text | turns, max_size=3) | st.lists(number, max_size=3) | anything


@st.composite
def plausible(draw, name):
    """A row as one might be, in which at times one field is anything."""
    form = FORMATS[name]
    columns = {column: draw(PLAUSIBLE.get(column, word)) for column in form.columns}
    columns |= {column: draw(PLAUSIBLE.get(column, word)) for column in form.optional if draw(st.integers(0, 3)) == 0}
    for column in (column for column in BESIDE if draw(st.integers(0, 19)) == 0):
        columns[column] = draw(BESIDE[column])
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


ENDLESS = (
    "[gMASK]<sop>{% for i in range(messages | length) %}<|{{ messages[i].role }}|>\n{{ messages[i].content }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""A template as GLM's, without an end of turn, that loops over numbers."""
TWO_ROLES = (
    "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}"
    "<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"stories": None, "minimind": None, "endless": ENDLESS, "two roles": TWO_ROLES}
CASES: Counter = Counter()


@pytest.fixture(scope="module", params=TEMPLATES)
def tokenizer(request, shared_data):
    folder = "model/stories260K-hf" if request.param == "stories" else "tokenizer/minimind"
    found = AutoTokenizer.from_pretrained(shared_data / folder)
    if TEMPLATES[request.param]:
        found.chat_template = TEMPLATES[request.param]
        found.add_special_tokens({"additional_special_tokens": ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>"]})
    return found


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
    CASES.update(used=len(used), left_out=len(entries), noted=sum(rejects.notes().values()))
    CASES.update({f"because: {reason[:48]}": count for reason, count in rejects.counts().items()})
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
        CASES.update(rows=len(rows))
        assert one_line(path, form, tokenizer) == (counted > 0)


@FUZZ
@given(data=st.data(), name=st.sampled_from(sorted(FORMATS)))
def test_rows_of_a_format(tmp_path, tokenizer, data, name):
    """Rows as they might be, in their own format: most are used."""
    rows = data.draw(st.lists(plausible(name), min_size=1, max_size=6))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    used, counted = used_and_counted(path, name, tokenizer)
    assert used + counted == len(rows)
    assert one_line(path, name, tokenizer) == (counted > 0)
    CASES.update(rows=len(rows))


@FUZZ
@given(
    marks=st.lists(st.sampled_from([None, 0, 1]), min_size=1, max_size=4),
    name=st.sampled_from(["weight", "train", "loss_mask"]), system=st.booleans(),
)  # fmt: skip
def test_any_flags(tokenizer, marks, name, system):
    """Each answer's own word is learned exactly when its flag says so, and with its end; or the row is refused."""
    turns = [{"role": "system", "content": "be kind"}] * system
    for n, mark in enumerate(marks):
        turns += [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"w{n}", name: mark}]
    CASES.update(flagged=1)
    try:
        row = normalise("messages", {"messages": turns}, Place("f", 1))
        document, _ = encode(row, tokenizer, 400)
    except BadRow as error:
        nothing = all(mark == 0 for mark in marks)
        assert (
            str(error).startswith("nothing is to be learned") if nothing else "does not show message 1" in str(error)
        )
        return
    learned = [tokenizer.decode(ids) for ids in document[1::2]]
    wanted = [n for n, mark in enumerate(marks) if mark != 0]
    assert len(learned) == len(wanted)
    for n, words in zip(wanted, learned, strict=True):
        assert f"w{n}" in words and "q" not in words
        if tokenizer.chat_template or n == wanted[-1]:  # its stop sign, too
            assert words.endswith((tokenizer.eos_token, "<|user|>"))


keys = st.text("abcxyz", min_size=1, max_size=2)
arguments = st.dictionaries(
    keys, st.integers(-9, 9) | st.dictionaries(keys, st.integers(-9, 9), min_size=1, max_size=2), max_size=3
)


@FUZZ
@given(calls=st.lists(st.tuples(st.sampled_from(["add", "find"]), arguments), min_size=1, max_size=4))
def test_any_gaps_of_arrow(tmp_path, shared_data, calls):
    """Rows of calls with any arguments have the ids of the same rows as jsonl, in Arrow's order of keys."""
    minimind = AutoTokenizer.from_pretrained(shared_data / "tokenizer" / "minimind")
    rows = []
    for name, given_arguments in calls:
        ordered = {
            k: dict(sorted(v.items())) if isinstance(v, dict) else v for k, v in sorted(given_arguments.items())
        }
        call = {"function": {"name": name, "arguments": ordered or {"a": 1}}}
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "a", "tool_calls": [call]},
                ]
            }
        )
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        table = pyarrow.Table.from_pylist(rows, schema=arrow_schema(rows))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):  # a key of two types, which Arrow cannot hold
        return
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    CASES.update(padded=len(rows))
    ids = []
    for path in (tmp_path / "x.jsonl", tmp_path / "x.parquet"):
        rejects = Rejects()
        ids.append([i for _, i in encode_rows(read_rows(str(path), "messages", rejects), minimind, 400, rejects)])
    assert ids[0] == ids[1]


def arrow_schema(rows):
    """The schema of the rows with all keys in order."""
    found = pyarrow.Table.from_pylist(rows).schema

    def sorted_type(kind):
        if pyarrow.types.is_struct(kind):
            fields = [pyarrow.field(f.name, sorted_type(f.type)) for f in kind]
            return pyarrow.struct(sorted(fields, key=lambda f: f.name))
        return pyarrow.list_(sorted_type(kind.value_type)) if pyarrow.types.is_list(kind) else kind

    return pyarrow.schema([(field.name, sorted_type(field.type)) for field in found])


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


def test_many_cases_were_tried():
    """Every row was used or counted, and both happened often; how often depends on the modules that are loaded."""
    print("\n".join(f"{count:6} {name}" for name, count in CASES.most_common()))
    assert CASES["used"] + CASES["left_out"] >= CASES["rows"] > 3000
    assert CASES["used"] > 150 and CASES["noted"] > 40 and CASES["flagged"] > 40 and CASES["padded"] > 25
