"""The types that `schema` may have, and the values that answers are parsed to."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator
from typing_extensions import TypedDict  # on Python 3.11 Pydantic takes no other

from magistral_mlx import AnswerError, Regex, SchemaError
from magistral_mlx.structured.shape import from_json, shape_of, to_json


class Sum(BaseModel):
    a: int
    b: int = 0


class Even(BaseModel):
    n: int

    @field_validator("n")
    @classmethod
    def even(cls, n: int) -> int:
        if n % 2:
            raise ValueError("odd")
        return n


@dataclass
class Point:
    x: int


class Named(TypedDict):
    name: str


@pytest.mark.parametrize(
    ("schema", "answer", "value"),
    [
        (Sum, '{"a": 1}', Sum(a=1, b=0)),
        (list[int], "[1, 2]", [1, 2]),
        (Point, '{"x": 1}', Point(1)),
        (Named, '{"name": "a"}', {"name": "a"}),
        (Literal["yes", "no"], '"yes"', "yes"),
        ({"type": "object"}, '{"a": [null]}', {"a": [None]}),
        (Regex(r"\d+"), "007", "007"),
    ],
)
def test_answers_are_parsed_to_their_type(schema: Any, answer: str, value: object):
    assert shape_of(schema).read(answer) == value


@pytest.mark.parametrize("answer", ['{"n": 3}', "{", '{"n": "x"}', ""])
def test_answer_that_its_type_refuses_raises(answer: str):
    with pytest.raises(AnswerError) as raised:
        shape_of(Even).read(answer)
    assert raised.value.answer == answer


@pytest.mark.parametrize("deep", ["[" * 200_000, "1" * 5000])
def test_json_that_python_cannot_parse_raises(deep: str):
    with pytest.raises(AnswerError):
        shape_of({}).read(deep)


def test_types_forbid_extra_keys_by_default():
    """Keys that Pydantic would drop are not allowed."""

    class Open(BaseModel):
        model_config = ConfigDict(extra="allow")
        inner: Sum

    schema = to_json(Open)["json"]
    assert schema["additionalProperties"] is True
    assert schema["$defs"]["Sum"]["additionalProperties"] is False
    assert to_json(Point)["json"]["additionalProperties"] is False
    assert to_json(Named)["json"]["additionalProperties"] is False


@pytest.mark.parametrize("schema", [3, "a", [int], print])
def test_invalid_schemas_are_refused(schema: Any):
    with pytest.raises(SchemaError):
        shape_of(schema)


@pytest.mark.parametrize("schema", [Regex("a+"), {"type": "integer"}])
def test_schema_is_restored_from_json(schema: Any):
    assert from_json(to_json(schema)) == schema


def test_type_is_restored_as_its_json_schema():
    class Bounded(BaseModel):
        n: int = Field(ge=0, le=9)

    found = from_json(to_json(Bounded))
    assert isinstance(found, dict)
    assert found["properties"]["n"]["maximum"] == 9
