"""Tool calls as a grammar, for answers that must be calls, or may be calls instead of a schema's value.

Writes the formats that `toolcalls` parses, in llguidance's Lark, arguments by each function's schema.
Does not know phases (`constraint`) or which calls are required (`tools`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from magistral_mlx.text.tokenizer import Tokenizer

from .grammar import LEAD, Grammar, json_rule

MAX_CALLS = 8
"""Calls in a constrained reply: without a limit, a model may never stop calling."""

_COMBINING = {"allOf", "anyOf", "oneOf", "$ref", "patternProperties", "additionalProperties"}


def with_calls(
    grammar: Grammar | None,
    tokenizer: Tokenizer,
    *,
    offered: Sequence[Mapping[str, Any]],
    forced: Sequence[Mapping[str, Any]],
) -> Grammar | None:
    """The grammar of an answer that may contain calls; None: the answer is free.

    grammar: of an answer without calls.
    offered, forced: the tools that may be called, and those of which at least one must be.
    """
    if forced:
        return Grammar.from_lark(f"start: LEAD? calls\n{LEAD}\n{_calls(forced, tokenizer)}")
    if grammar and offered:
        either = grammar.lark.replace("start: LEAD? ", "start: LEAD? calls | LEAD? ", 1)
        return Grammar.from_lark(f"{either}\n{_calls(offered, tokenizer)}")
    return grammar


def _calls(tools: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> str:
    marker = {name: f"<[{token}]>" for token, name in tokenizer.call_markers.items()}
    functions = [tool["function"] for tool in tools]
    call = f"call: {' | '.join(f'call_{at}' for at in range(len(functions)))}"
    arguments = [f"args_{at}: {json_rule(_closed(f['parameters']))}" for at, f in enumerate(functions)]
    if tokenizer.version == "v7":
        calls = f'calls: {marker["[TOOL_CALLS]"]} "[" call (", " call){{0,{MAX_CALLS - 1}}} "]"'
        each = [
            f'call_{at}: "{{\\"name\\": \\"{f["name"]}\\", \\"arguments\\": " args_{at} "}}"'
            for at, f in enumerate(functions)
        ]
        return "\n".join([calls, call, *each, *arguments])
    own_id = f"({marker['[CALL_ID]']} /[a-zA-Z0-9]{{9}}/)?" if tokenizer.version == "v11" else ""
    each = [
        f'call_{at}: {marker["[TOOL_CALLS]"]} "{f["name"]}" {own_id} {marker["[ARGS]"]} args_{at}'
        for at, f in enumerate(functions)
    ]
    return "\n".join([f"calls: call{{1,{MAX_CALLS}}}", call, *each, *arguments])


def _closed(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Forbid arguments that the function does not declare, unless its schema decides about them."""
    if not parameters or ("properties" in parameters and not _COMBINING & parameters.keys()):
        return {"type": "object", "properties": {}, **parameters, "additionalProperties": False}
    return {**parameters}
