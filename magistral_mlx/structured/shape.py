"""A user's schema → a grammar for the answer's text, and a parser of that text.

Knows JSON, Pydantic and the types that `schema` may have. Does not know ids: `grammar` masks them, and
`constraint` decides when.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from magistral_mlx.errors import AnswerError, SchemaError

from .grammar import Grammar, Regex

Schema: TypeAlias = Mapping[str, Any] | Regex | type[Any]
"""A JSON schema; a `Regex`; or a Pydantic model, or another type that Pydantic knows (`list[int]`)."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """grammar: that the text follows. value: parses the text; raises ValueError if it does not match."""

    grammar: Grammar
    value: Callable[[str], Any]

    def read(self, answer: str) -> Any:
        """The value of a complete answer; raises `AnswerError`."""
        try:
            return self.value(answer)
        except (ValueError, RecursionError) as error:  # also what Pydantic and json raise
            raise AnswerError(f"the answer is not what the schema asks for: {error}", answer) from error


def shape_of(schema: Schema) -> Shape:
    """The shape of whatever a user may pass as `schema`."""
    if isinstance(schema, Regex):
        return Shape(grammar=Grammar.from_regex(schema.pattern), value=str)
    if isinstance(schema, Mapping):
        return Shape(grammar=Grammar.from_schema(schema), value=json.loads)
    return _typed(schema)


def to_json(schema: Schema) -> dict[str, Any]:
    """The schema for a file. A type is reduced to its JSON schema."""
    if isinstance(schema, Regex):
        return {"regex": schema.pattern}
    return {"json": dict(schema) if isinstance(schema, Mapping) else _typed_schema(schema)[1]}


def from_json(found: Mapping[str, Any]) -> Schema:
    """The schema that `to_json` wrote."""
    return Regex(found["regex"]) if "regex" in found else found["json"]


def _typed(kind: type[Any]) -> Shape:
    adapter, schema = _typed_schema(kind)
    return Shape(grammar=Grammar.from_schema(schema), value=adapter.validate_json)


def _typed_schema(kind: type[Any]) -> tuple[Any, dict[str, Any]]:
    from pydantic import PydanticUserError, TypeAdapter  # noqa: PLC0415 -- a third of a second
    from pydantic.json_schema import GenerateJsonSchema  # noqa: PLC0415

    class Closed(GenerateJsonSchema):
        """Forbids keys that the type does not have: the model would write them, and Pydantic drop them."""

        def model_schema(self, schema: Any) -> dict[str, Any]:
            return {"additionalProperties": False, **super().model_schema(schema)}

        def dataclass_schema(self, schema: Any) -> dict[str, Any]:
            return {"additionalProperties": False, **super().dataclass_schema(schema)}

        def typed_dict_schema(self, schema: Any) -> dict[str, Any]:
            return {"additionalProperties": False, **super().typed_dict_schema(schema)}

    try:
        adapter: Any = TypeAdapter(kind)
        return adapter, adapter.json_schema(schema_generator=Closed)
    except PydanticUserError as error:
        raise SchemaError(
            "Expected a JSON schema, a Regex or a type that Pydantic can describe as JSON, found "
            f"{kind!r}: {error.message}"
        ) from error
