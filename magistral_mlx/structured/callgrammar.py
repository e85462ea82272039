"""Tool calls as a grammar, for answers that have to be calls, or may be one beside a schema.

Writes the forms that `toolcalls` reads, in llguidance's Lark, with arguments by each function's own schema.
Does not know phases (`constraint`) or who asks for a call (`tools`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from magistral_mlx.text.tokenizer import Tokenizer

from .grammar import LEAD, Grammar, json_rule

MOST = 8
"""Calls in a reply that is held to a grammar: one that may call on and on need not come to an end."""

_COMBINED = {"allOf", "anyOf", "oneOf", "$ref", "patternProperties", "additionalProperties"}


def with_calls(
    grammar: Grammar | None,
    tokenizer: Tokenizer,
    *,
    offered: Sequence[Mapping[str, Any]],
    forced: Sequence[Mapping[str, Any]],
) -> Grammar | None:
    """What an answer is held to; None: it is free.

    grammar: what it is, if it is no call.
    offered, forced: the tools that may be called, and those of which one has to be.
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
        calls = f'calls: {marker["[TOOL_CALLS]"]} "[" call (", " call){{0,{MOST - 1}}} "]"'
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
    return "\n".join([f"calls: call{{1,{MOST}}}", call, *each, *arguments])


def _closed(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Without arguments that the function does not name, where its schema does not say."""
    if not parameters or ("properties" in parameters and not _COMBINED & parameters.keys()):
        return {"type": "object", "properties": {}, **parameters, "additionalProperties": False}
    return {**parameters}
