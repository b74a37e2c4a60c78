"""Tools and calls of them, in the forms in which files have them: objects, JSON text, lists of either."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.data.columns import given
from rlhf_jax.data.rejects import BadRow

Tools = tuple[dict[str, Any], ...] | None

VALUES = ("default", "const", "example", "examples", "enum")
"""Keywords of a JSON schema that hold values, not schemas."""


def read_tools(row: Mapping[str, Any]) -> Tools:
    """The tools of a row: those in its column "tools", and in "functions", whose entries are functions alone.

    An empty column is no tools. Null keywords of a schema are what Arrow fills gaps with, and are left out.
    Raises BadRow for what is no list of objects.
    """
    tools = _objects(given(row, "tools"), "field 'tools'")
    functions = _objects(given(row, "functions"), "field 'functions'")
    tools += [one if "function" in one else {"type": "function", "function": one} for one in functions]
    return tuple(_with_parameters(tool) for tool in tools) or None


def read_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls of a message. Raises BadRow for what is no list of objects."""
    return _objects(None if value in ("", [], {}) else value, f"'tool_calls' of {where}")


def spoken_calls(content: str, where: str) -> list[dict[str, Any]]:
    """The calls that the words of a message are: {"name", "arguments"}, or several, as JSON.

    Raises BadRow for words that are not.
    """
    calls = _objects(content, f"{where}, a function call,")
    for call in calls:
        if not isinstance(call.get("function", call), dict) or not call.get("function", call).get("name"):
            raise BadRow(f"{where}, a function call, has no name")
    if not calls:
        raise BadRow(f"{where}, a function call, is empty")
    return [called(call) for call in calls]


def called(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call in the form that chat templates read, from one that is a function's name and its arguments."""
    return dict(call) if "function" in call else {"type": "function", "function": {"arguments": {}, **call}}


def without_unknown(calls: Sequence[dict[str, Any]], tools: Tools) -> list[dict[str, Any]]:
    """Calls without null fields, and null arguments that their tool does not have: with those Arrow fills gaps."""
    known = {}
    for tool in tools or ():
        function = tool.get("function", tool)
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            known[function["name"]] = _properties(function)
    found = []
    for call in calls:
        call = {name: value for name, value in call.items() if value is not None}
        function = call.get("function", call)
        properties = known.get(function.get("name")) if isinstance(function, dict) and _named(function) else None
        if properties is not None and isinstance(function.get("arguments"), dict):
            arguments = {k: v for k, v in function["arguments"].items() if v is not None or k in properties}
            changed = {**function, "arguments": arguments}
            call = {**call, "function": changed} if "function" in call else changed
        found.append(call)
    return found


def with_arguments(conversation: Sequence[dict[str, Any]], *, as_text: bool) -> list[dict[str, Any]]:
    """The conversation with every call's arguments as an object, or as JSON text.

    Text that is no JSON object stays as it is.
    """
    return [
        {**turn, "tool_calls": [_with_arguments(call, as_text) for call in turn["tool_calls"]]}
        if turn.get("tool_calls")
        else turn
        for turn in conversation
    ]


def _with_arguments(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict) or "arguments" not in function:
        return call
    arguments = function["arguments"]
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        parsed = _parsed(arguments) if arguments.strip() else {}
        arguments = parsed if isinstance(parsed, dict) else arguments
    changed = {**function, "arguments": arguments}
    return {**call, "function": changed} if "function" in call else changed


def _objects(value: Any, what: str) -> list[dict[str, Any]]:
    """A list of objects, from JSON text, one object, or a list of objects and of JSON texts."""
    if isinstance(value, str):
        value = _parsed(value)
    if value is None:
        return []
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise BadRow(f"{what} is not a list of objects")
    value = [_parsed(one) if isinstance(one, str) else one for one in value]
    if not all(isinstance(one, dict) for one in value):
        raise BadRow(f"{what} is not a list of objects")
    return value


def _parsed(text: str) -> Any:
    """The JSON value of a text; the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _named(function: Mapping[str, Any]) -> bool:
    return isinstance(function.get("name"), str)


def _properties(function: Mapping[str, Any]) -> set[str] | None:
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return set(properties) if isinstance(properties, dict) else None


def _with_parameters(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function", tool)
    if not isinstance(function, dict) or "parameters" not in function:
        return tool
    changed = {**function, "parameters": _without_gaps(function["parameters"])}
    return {**tool, "function": changed} if "function" in tool else changed


def _without_gaps(schema: Any) -> Any:
    """A JSON schema without null keywords. Only a value that it names may be null."""
    if isinstance(schema, list):
        return [_without_gaps(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: value if name in VALUES else _without_gaps(value)
        for name, value in schema.items()
        if value is not None or name in VALUES
    }
