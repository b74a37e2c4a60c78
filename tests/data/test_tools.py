"""Tools and their calls: the forms in which they come, and what Arrow puts into them."""

import json

import datasets
import pytest
from transformers import AutoTokenizer

from rlhf_jax.data.encode import encode_rows
from rlhf_jax.data.formats import normalise
from rlhf_jax.data.rejects import BadRow, Place, Rejects
from rlhf_jax.data.rows import Read, read_rows

PLACE = Place("f", 1)
ADD = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Oslo"]}}},
    },
}
RESULT = {"role": "tool", "content": "3"}
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def calling(name, arguments):
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def said(row):
    return normalise("messages", row, PLACE)


@pytest.fixture
def tokenizer(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "tokenizer" / "minimind")


@pytest.mark.parametrize("nothing", [None, "", " ", "[]", [], "null", {}])
@pytest.mark.parametrize("column", ["tools", "functions"])
def test_no_tools(column, nothing):
    assert said({"messages": [USER, ANSWER], column: nothing}).tools is None


@pytest.mark.parametrize(
    "tools",
    [[ADD, WEATHER], json.dumps([ADD, WEATHER]), [json.dumps(ADD), WEATHER], [json.dumps(ADD), json.dumps(WEATHER)]],
)
def test_tools_in_every_form(tools):
    assert said({"messages": [USER, ANSWER], "tools": tools}).tools == (ADD, WEATHER)


def test_a_tool_alone_and_functions_of_older_files():
    for tools in (ADD, json.dumps(ADD)):
        assert said({"messages": [USER, ANSWER], "tools": tools}).tools == (ADD,)
    for functions in ([ADD["function"]], json.dumps([ADD["function"]])):
        assert said({"messages": [USER, ANSWER], "functions": functions}).tools == (ADD,)


@pytest.mark.parametrize("tools", [3, "add", "[3]", [[ADD]], "[", True])
def test_what_is_no_list_of_tools_is_refused(tools):
    with pytest.raises(BadRow, match="field 'tools' is not a list of objects"):
        said({"messages": [USER, ANSWER], "tools": tools})


CALL = {"function": {"name": "add", "arguments": {"x": 1}}}
TYPED = {"type": "function", **CALL}
FORMS = {
    "objects": ({"role": "assistant", "content": "", "tool_calls": [CALL]}, CALL),
    "json": ({"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])}, CALL),
    "one": ({"role": "assistant", "tool_calls": CALL}, CALL),
    "texts": ({"role": "assistant", "tool_calls": [json.dumps(CALL)]}, CALL),
    "older": ({"role": "assistant", "content": None, "function_call": CALL["function"]}, TYPED),
    "role": ({"role": "function_call", "content": json.dumps(CALL["function"])}, TYPED),
    "roles": ({"from": "tool_call", "value": json.dumps([CALL])}, CALL),
}


@pytest.mark.parametrize("message, call", FORMS.values(), ids=FORMS)
def test_calls_in_every_form(message, call, tokenizer):
    read = said({"messages": [USER, message]})
    assert read.response == ({"role": "assistant", "content": "", "tool_calls": [call]},)
    bare = {"role": "assistant", "content": "a", "tool_calls": "[]"}
    assert said({"messages": [USER, bare]}).response == (ANSWER,)


def test_the_sharegpt_roles_of_calls_and_their_results():
    turns = [
        ("human", "q"),
        ("function_call", '{"name": "add", "arguments": {"x": 1}}'),
        ("observation", "3"),
        ("gpt", "a"),
    ]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns], "tools": "[]"}
    read = normalise("sharegpt", row, PLACE)
    assert [turn["role"] for turn in read.response] == ["assistant", "tool", "assistant"]
    assert read.response[0]["tool_calls"] == [TYPED]
    for words in ("add it", "3", "{}", "[]", '{"arguments": {}}', '{"function": "add"}'):
        with pytest.raises(BadRow, match="message 2 of 'messages', a function call,"):
            said({"messages": [USER, {"role": "function_call", "content": words}]})


@pytest.mark.parametrize("template", ["tojson", "tested", "joined"])
def test_arguments_as_text_and_as_objects_are_the_same(tokenizer, template):
    """Whether a template writes them as JSON, asks for their type, or puts texts together."""
    shown = {
        "tojson": "{{ c.function.arguments | tojson }}",
        "tested": "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",
        "joined": "{{ '' + c.function.arguments }}",
    }[template]
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}" + shown + "{% endfor %}<|im_end|>\n{% endfor %}"
    )
    ids = []
    for arguments in ({"x": 1}, '{"x": 1}'):
        rejects = Rejects()
        read = read_object({"messages": [USER, calling("add", arguments)]})
        [(_, document)] = encode_rows([read], tokenizer, 400, rejects)
        ids.append(document)
        assert tokenizer.decode(document[1]).count('add{"x": 1}') == 1
    assert ids[0] == ids[1]


def read_object(row):
    return Read(0, said(row), row)


ARROW = [
    {
        "messages": [USER, calling("weather", {"city": "Oslo"}), RESULT | {"name": "weather"}, ANSWER],
        "tools": [WEATHER],
    },
    {"messages": [USER, calling("add", {"x": 1, "y": {"z": 2}}), RESULT, ANSWER], "tools": [ADD]},
    {"messages": [USER, ANSWER], "tools": None},
]


def ids_of(source, tokenizer):
    rejects = Rejects()
    return [ids for _, ids in encode_rows(read_rows(str(source), "messages", rejects), tokenizer, 2000, rejects)]


@pytest.mark.parametrize("form", ["parquet", "saved", "to_json"])
def test_rows_out_of_arrow_have_the_ids_of_the_same_rows_as_jsonl(tmp_path, shared_data, form):
    """Arrow gives each object the keys of all others, null; a jsonl file that was written from there has them, too.

    The order of an object's keys is Arrow's, and cannot be had back: it is the same in these rows.
    """
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizer" / "minimind")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ARROW))
    padded = datasets.Dataset.from_list(ARROW)
    assert "None" in str(padded[0]["messages"])
    path = tmp_path / {"parquet": "x.parquet", "saved": "saved", "to_json": "x.jsonl"}[form]
    {"parquet": padded.to_parquet, "saved": padded.save_to_disk, "to_json": padded.to_json}[form](path)
    expected = ids_of(tmp_path / "rows.jsonl", tokenizer)
    assert ids_of(path, tokenizer) == expected
    text = tokenizer.decode([i for document in expected for part in document for i in part])
    assert '{"city": "Oslo"}' in text and "null" not in text


def test_calls_without_tools_lose_their_gaps_too(tmp_path, tokenizer):
    rows = [{"messages": row["messages"]} for row in ARROW]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for name in ("x.parquet", "saved"):
        assert ids_of(tmp_path / name, tokenizer) == ids_of(tmp_path / "rows.jsonl", tokenizer)


def test_a_null_that_a_jsonl_row_means_is_kept():
    """A default of null in a schema, and a parameter that is given as null."""
    tool = {"function": {"name": "add", "parameters": {"properties": {"x": {"default": None}, "y": None}}}}
    row = {"messages": [USER, calling("add", {"x": None, "y": None}), ANSWER], "tools": [tool]}
    read = said(row)
    assert read.tools == ({"function": {"name": "add", "parameters": {"properties": {"x": {"default": None}}}}},)
    assert read.response[0]["tool_calls"][0]["function"]["arguments"] == {"x": None}
    # Without its tools nobody can tell.
    alone = said({"messages": row["messages"]})
    assert alone.response[0]["tool_calls"][0]["function"]["arguments"] == {"x": None, "y": None}
