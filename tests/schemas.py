"""Random JSON schemas, each with the length of the longest text that it allows."""

from collections.abc import Callable
from random import Random
from typing import Any

GAP = 33
"""Bytes of white space, at most, between two parts of JSON."""
CHARACTER = 6
"""Bytes of one character of a string, at most: `\\u0000`."""
NAMES = ["a", "b b", "é", "한", 'q"', "x\\y", "n\n", "total", "<think>", "</think>"]
VALUES: list[Any] = [None, True, 1, -2.5, "", "한글", "</think>", [1, "a"], {"k": []}, "<think>"]

Drawn = tuple[dict[str, Any], int]


def schema(draw: Random, depth: int = 3) -> Drawn:
    """A schema that bounds every string, number and array, and the bytes of the longest text allowed."""
    flat: list[Callable[[Random], Drawn]] = [_string, _pattern, _enum, _integer, _date, _simple]
    deep: list[Callable[[Random, int], Drawn]] = [_array, _tuple, _object, _object, _either]
    if depth and draw.random() < 0.7:
        return draw.choice(deep)(draw, depth - 1)
    return draw.choice(flat)(draw)


def _string(draw: Random) -> Drawn:
    most = draw.randint(0, 6)
    return {"type": "string", "minLength": draw.randint(0, most), "maxLength": most}, 2 + CHARACTER * most


def _pattern(draw: Random) -> Drawn:
    pattern, most = draw.choice([("^[a-f]{2,4}$", 4), ("^(yes|no|한)$", 3), (r"^\d{3}-\d{4}$", 8)])
    return {"type": "string", "pattern": pattern}, 2 + CHARACTER * most


def _enum(draw: Random) -> Drawn:
    chosen = draw.sample(VALUES, draw.randint(1, 4))
    return {"enum": chosen} if len(chosen) > 1 else {"const": chosen[0]}, 100 + 6 * GAP


def _integer(draw: Random) -> Drawn:
    least = draw.randint(-999, 999)
    return {"type": "integer", "minimum": least, "maximum": least + draw.randint(0, 2000)}, 6


def _date(draw: Random) -> Drawn:
    return {"type": "string", "format": draw.choice(["date", "uuid"])}, 40


def _simple(draw: Random) -> Drawn:
    return {"type": draw.choice(["boolean", "null"])}, 5


def _array(draw: Random, depth: int) -> Drawn:
    items, longest = schema(draw, depth)
    most = draw.randint(0, 3)
    return (
        {"type": "array", "items": items, "minItems": draw.randint(0, most), "maxItems": most},
        2 + 2 * GAP + most * (longest + 1 + 2 * GAP),
    )


def _tuple(draw: Random, depth: int) -> Drawn:
    parts = [schema(draw, depth) for _ in range(draw.randint(1, 3))]
    size = len(parts)
    bounds = {"items": False, "minItems": size, "maxItems": size}
    longest = 2 + 2 * GAP + sum(longest + 1 + 2 * GAP for _, longest in parts)
    return {"type": "array", "prefixItems": [part for part, _ in parts], **bounds}, longest


def _object(draw: Random, depth: int) -> Drawn:
    names = draw.sample(NAMES, draw.randint(0, 4))
    parts = {name: schema(draw, depth) for name in names}
    required = [name for name in names if draw.random() < 0.7]
    found = {
        "type": "object",
        "properties": {name: part for name, (part, _) in parts.items()},
        "required": required,
        "additionalProperties": False,
    }
    return found, 2 + 2 * GAP + sum(20 + longest + 4 * GAP for _, longest in parts.values())


def _either(draw: Random, depth: int) -> Drawn:
    parts = [schema(draw, depth) for _ in range(2)]
    return {"anyOf": [part for part, _ in parts]}, max(longest for _, longest in parts)
