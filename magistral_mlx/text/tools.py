"""Validates what callers pass about tools: function definitions, and the calls in a message history.

Knows OpenAI's formats, and that Mistral's ids of calls are 9 letters and digits. Does not know how either is
written in a prompt (mistral_common does), or how a model writes a call (`toolcalls`).
"""

import json
import re
import string
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, TypeAlias, cast

from magistral_mlx.checks import check_text
from magistral_mlx.errors import PromptError
from magistral_mlx.events import ToolCall

Tools: TypeAlias = Sequence[Mapping[str, Any]]
"""`{"type": "function", "function": {"name", "description", "parameters"}}`, or the inner mapping alone."""

FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_ID = re.compile(r"[a-zA-Z0-9]{9}")
_DIGITS = string.digits + string.ascii_letters


def read_tools(tools: object) -> list[dict[str, Any]]:
    """The definitions in the first of these forms, as plain JSON; PromptError says which is wrong and why."""
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise PromptError(f"Expected tools to be a list of definitions, found a {type(tools).__name__}.")
    found = [_definition(tool, f"tools[{at}]") for at, tool in enumerate(cast("Sequence[object]", tools))]
    names = [tool["function"]["name"] for tool in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PromptError(f"Expected each tool to have a name of its own, found {twice} twice. Rename one.")
    return found


def offered(tools: object, choice: object) -> list[dict[str, Any]]:
    """The definitions that go into the prompt, given a `tool_choice`."""
    found = read_tools(tools)
    names = [tool["function"]["name"] for tool in found]
    if choice not in ("auto", "none", *(["required", *names] if names else [])):
        raise PromptError(
            f"Expected tool_choice to be auto, none, required or the name of a tool, found {choice!r} "
            f"and the tools {names}."
        )
    return found if choice != "none" else []


def forced(tools: object, choice: object) -> list[dict[str, Any]]:
    """The definitions of which one must be called; empty: the model may answer."""
    definitions = offered(tools, choice)
    if choice == "auto":  # a tool may have that name
        return []
    return [tool for tool in definitions if choice in ("required", tool["function"]["name"])]


def call_id(text: str) -> str:
    """`text` if it is an id in Mistral's format; otherwise one derived from it, always the same."""
    if _ID.fullmatch(text):
        return text
    number = int.from_bytes(sha256(text.encode()).digest())
    return "".join(_DIGITS[number // 62**place % 62] for place in range(9))


def is_object(arguments: str) -> bool:
    """Whether a text is a JSON object, as the arguments of a call must be."""
    try:
        return isinstance(json.loads(arguments, parse_constant=_refuse), dict)
    except (ValueError, RecursionError):
        return False


def read_calls(calls: object, where: str) -> tuple[ToolCall, ...]:
    """The `tool_calls` of an assistant's message, with ids in Mistral's format."""
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise PromptError(f"Expected {where} to be a list of calls, found a {type(calls).__name__}.")
    listed = enumerate(cast("Sequence[object]", calls))
    return tuple(_call(call, f"{where}[{at}]") for at, call in listed)


def _definition(tool: object, where: str) -> dict[str, Any]:
    fields = _mapping(tool, where)
    if "function" in fields:
        _check_type(fields, where)
        fields = _mapping(fields["function"], f"{where}'s function")
    parameters = _mapping(fields.get("parameters") or {}, f"{where}'s parameters")
    if parameters and parameters.get("type") != "object":
        found = parameters.get("type")
        raise PromptError(
            f"Expected {where}'s parameters to be a JSON schema of type object, found {found!r}. Wrap it: "
            '{"type": "object", "properties": {…}}.'
        )
    function = {
        "name": _name(fields, where),
        "description": check_text(
            fields.get("description") or "", f"{where}'s description", may_be_blank=True
        ),
        "parameters": parameters,
    }
    return {"type": "function", "function": json.loads(_json(function, where))}


def _call(call: object, where: str) -> ToolCall:
    fields = _mapping(call, where)
    _check_type(fields, where)
    function = _mapping(fields.get("function"), f"{where}'s function")
    arguments = function.get("arguments") or "{}"
    if not isinstance(arguments, str):
        arguments = _json(_mapping(arguments, f"{where}'s arguments"), f"{where}'s arguments")
    return ToolCall(
        id=call_id(check_text(fields.get("id"), f"{where}'s id")),
        name=_name(function, where),
        arguments=check_text(arguments, f"{where}'s arguments"),
    )


def _json(value: object, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"Expected {where} to be plain JSON: {error}.") from None


def _mapping(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise PromptError(f"Expected {where} to be a mapping, found a {type(value).__name__}.")
    return {**cast("Mapping[str, Any]", value)}


def _check_type(fields: Mapping[str, Any], where: str) -> None:
    if (kind := fields.get("type", "function")) != "function":
        raise PromptError(f"Expected {where} to be of the type function, found {kind!r}. It is the only one.")


def _name(fields: Mapping[str, Any], where: str) -> str:
    name = fields.get("name")
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        raise PromptError(
            f"Expected {where}'s name to be 1 to 64 letters, digits, - and _, found {name!r:.100}. Rename it."
        )
    return name


def _refuse(constant: str) -> None:
    raise ValueError(constant)  # NaN and Infinity are Python's, not JSON's
