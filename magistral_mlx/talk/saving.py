"""A conversation as one file: its messages, options, and KV cache.

The file's text is JSON: package, model (a fingerprint), options, turns, cache (its length and kind). Tensors:

    turns.0.prompt_ids  turns.0.token_ids   U32: the first reply's ids
    cache.ids                               U32 (T,): the ids in the cache
    cache.0.keys        cache.0.values      (1, K, T, D) in the model's dtype: the first layer's cache, or
    cache.0.keys.codes .scales .biases      the same in 8 bits

Nothing in a file is trusted before it is checked against the loaded model. Knows what is saved, and which
thread may touch arrays; not the file format (`talkfile`), nor how a conversation continues (`conversation`).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import UnionType
from typing import (
    Any,
    Literal,
    Protocol,
    TypeAlias,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import mlx.core as mx

from magistral_mlx.config import ModelConfig
from magistral_mlx.decoder.cache import QuantizedKVCache, state_layout
from magistral_mlx.decoder.prefix import Prefix
from magistral_mlx.decoder.sampling import Sampling
from magistral_mlx.disk.tensorfile import NAMES, Entry
from magistral_mlx.errors import ConversationError
from magistral_mlx.events import FinishReason, Stats, ToolCall
from magistral_mlx.structured.shape import from_json, to_json
from magistral_mlx.text.tools import read_tools

from . import talkfile
from .options import Options
from .reply import Reply
from .talkfile import damage, expect

T = TypeVar("T")
UserInput: TypeAlias = str | Sequence[Mapping[str, Any]]
"""A question, or the results of tool calls: messages of the role tool."""
_Turn: TypeAlias = tuple[UserInput, Reply]


class HostModel(Protocol):
    """The model of a conversation that is saved, or that loads one."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def dtype(self) -> mx.Dtype: ...
    def fingerprint(self) -> dict[str, Any]: ...
    def run(self, job: Callable[[], T]) -> T: ...
    def new_prefix(self, kv_bits: int | None = None, *, quantize_after: int | None = None) -> Prefix: ...


@dataclass(frozen=True, kw_only=True)
class Saved:
    """The content of a file: options, turns, and the KV cache if it was saved."""

    options: Options
    turns: tuple[_Turn, ...]
    prefix: Prefix | None


def save(path: Path, saved: Saved, model: HostModel) -> None:
    """Write the file atomically. Besides the cache, memory holds a copy of one array at a time."""
    text = json.dumps(_as_json(saved, model.fingerprint()), ensure_ascii=False)
    talkfile.write(path, text, model.run(partial(_arrays, saved)), model.run)


def load(path: Path, model: HostModel, *, any_model: bool = False) -> Saved:
    """Check a file and load it. any_model: one of another model gives messages, without ids and cache."""
    file = talkfile.open_talk(path)
    with damage(path):
        found = json.loads(file.text)
        was: dict[str, Any] = {**found["model"]}
        options, cache = _options(found["options"]), found["cache"]
        turns = tuple((turn["message"], _reply(turn)) for turn in found["turns"])
        expect(all(map(_is_input, (message for message, _ in turns))), "turns")
    differences = _differences(was, model.fingerprint())
    if differences and not any_model:
        raise ConversationError(
            f"{path} was saved with another model: {differences}; load it with that one, or with "
            "any_model=True, which takes over its messages only"
        )
    with damage(path):
        if not differences:
            _check_layout(file.entries, len(turns), cache, model)
        arrays = file.read(model.run, keep=not differences)
        if differences:
            return Saved(options=options, turns=turns, prefix=None)
        ids = model.run(partial(_take_ids, arrays, model.config.vocab_size))
        prefix = _prefix(ids["cache.ids"], arrays, cache, model) if cache else None
    numbered = (
        replace(reply, prompt_ids=ids[f"turns.{n}.prompt_ids"], token_ids=ids[f"turns.{n}.token_ids"])
        for n, (_, reply) in enumerate(turns)
    )
    messages = (message for message, _ in turns)
    return Saved(options=options, turns=tuple(zip(messages, numbered, strict=True)), prefix=prefix)


# ------------------------------------------------------------------ writing


def _as_json(saved: Saved, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {**saved.options}
    if "sampling" in saved.options:
        options["sampling"] = asdict(saved.options["sampling"])
    if tools := saved.options.get("tools"):
        options["tools"] = read_tools(tools)  # plain JSON
    if schema := saved.options.get("schema"):
        options["schema"] = to_json(schema)
    return {
        "package": version("magistral_mlx"),
        "model": fingerprint,
        "options": options,
        "turns": [
            {
                "message": message,
                "thinking": reply.thinking,
                "answer": reply.answer,
                "finish_reason": reply.finish_reason,
                "seed": reply.seed,
                "tool_calls": [asdict(call) for call in reply.tool_calls],
                "stats": asdict(reply.stats),
            }
            for message, reply in saved.turns
        ],
        "cache": _cache_info(saved.prefix),
    }


def _cache_info(prefix: Prefix | None) -> dict[str, Any] | None:
    """A cache's length and quantization; None: it is empty."""
    if prefix is None or not prefix.length:
        return None
    first = prefix.caches[0]
    packs = isinstance(first, QuantizedKVCache)
    return {
        "positions": prefix.length,
        "kv_bits": first.bits if packs else None,
        "quantize_after": first.after if packs else 0,
    }


def _arrays(saved: Saved) -> dict[str, mx.array]:
    """Every tensor, not yet evaluated."""
    ids: dict[str, tuple[int, ...]] = {}
    for n, (_, reply) in enumerate(saved.turns):
        ids[f"turns.{n}.prompt_ids"], ids[f"turns.{n}.token_ids"] = reply.prompt_ids, reply.token_ids
    arrays: dict[str, mx.array] = {}
    if saved.prefix and (length := saved.prefix.length):
        ids["cache.ids"] = tuple(saved.prefix.ids[:length])
        for n, cache in enumerate(saved.prefix.caches):
            arrays |= {f"cache.{n}.{name}": array for name, array in cache.state(length).items()}
    return {name: mx.array(of, dtype=mx.uint32) for name, of in ids.items()} | arrays


# ------------------------------------------------------------------ reading


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The differences of two fingerprints as text; empty: there are none."""
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    if names == ["weights"]:
        return "its weights differ, as those of a fine-tune do"
    return ", ".join(
        f"{name} was {was.get(name)!r}, is {now.get(name)!r}"[:120] for name in names if name != "weights"
    )


def _options(found: dict[str, Any]) -> Options:
    hints = get_type_hints(Options)
    options = {**found}
    if "sampling" in options:
        options["sampling"] = Sampling(**options["sampling"])
    if options.get("schema"):
        options["schema"] = from_json(options["schema"])
    for name, value in options.items():
        expect(name in hints and _fits(value, hints[name]), f"option {name}")
    return cast("Options", options)


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of a type; for such types as `Options` has."""
    if (origin := get_origin(hint)) is Literal:
        return value in get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, kind) for kind in get_args(hint))
    return isinstance(value, origin or hint)


def _is_input(value: object) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, list) and all(isinstance(result, dict) for result in cast("list[object]", value))


def _reply(turn: dict[str, Any]) -> Reply:
    """A reply from its JSON, without ids: these are tensors."""
    stats = Stats(**turn["stats"])
    expect(all(type(n) in (int, float) and n >= 0 for n in asdict(stats).values()), "statistics of a reply")
    expect(turn["finish_reason"] in get_args(FinishReason), "finish reason")
    expect(type(turn["seed"]) is int, "seed")
    expect(isinstance(turn["thinking"], str) and isinstance(turn["answer"], str), "text of a reply")
    calls = tuple(ToolCall(**call) for call in turn.get("tool_calls", ()))
    expect(all(isinstance(text, str) for call in calls for text in asdict(call).values()), "tool calls")
    return Reply(
        thinking=turn["thinking"],
        answer=turn["answer"],
        prompt_ids=(),
        token_ids=(),
        finish_reason=turn["finish_reason"],
        seed=turn["seed"],
        stats=stats,
        tool_calls=calls,
    )


def _check_layout(
    entries: Mapping[str, Entry], turns: int, cache: Mapping[str, Any] | None, model: HostModel
) -> None:
    """Check that the tensors are exactly those that the JSON and the model's shape require."""
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for n in range(turns):
        for name in (f"turns.{n}.prompt_ids", f"turns.{n}.token_ids"):
            expected[name] = ("U32", entries[name].shape[:1] or (0,))
    if cache is not None:
        expected["cache.ids"] = ("U32", (cache["positions"],))
        config, positions = model.config, cache["positions"]
        expect(type(positions) is int and positions > 0, "length of the cache")
        for n in range(config.n_layers):
            quantized = cache["kv_bits"] is not None and f"cache.{n}.keys" not in entries
            layout = state_layout(
                config.n_kv_heads, config.head_dim, positions, model.dtype, quantized=quantized
            )
            expected |= {
                f"cache.{n}.{name}": (NAMES[dtype], shape) for name, (dtype, shape) in layout.items()
            }
    expect(entries.keys() == expected.keys(), f"tensors {sorted(entries.keys() ^ expected.keys())[:4]}")
    for name, (dtype, shape) in expected.items():
        entry = entries[name]
        expect((entry.dtype, entry.shape) == (dtype, shape), f"{name}: {entry.dtype} {list(entry.shape)}")


def _take_ids(arrays: dict[str, mx.array], vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Remove the tensors of ids from `arrays`; returns them as numbers."""
    names = [name for name in arrays if name.endswith("ids")]
    ids = {name: tuple(cast("list[int]", arrays.pop(name).tolist())) for name in names}
    expect(all(max(of, default=0) < vocab_size for of in ids.values()), "ids, beyond the vocabulary")
    return ids


def _prefix(
    ids: tuple[int, ...], arrays: Mapping[str, mx.array], kind: Mapping[str, Any], model: HostModel
) -> Prefix:
    after = kind["quantize_after"]
    expect(type(after) is int and after >= 0, "quantize_after")
    prefix = model.new_prefix(kind["kv_bits"], quantize_after=after)
    prefix.ids = list(ids)
    for n, cache in enumerate(prefix.caches):
        stem = f"cache.{n}."
        cache.restore({name.removeprefix(stem): of for name, of in arrays.items() if name.startswith(stem)})
    return prefix
