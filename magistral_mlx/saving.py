"""A conversation as one file: what was said, and what the model has read of it.

One `.safetensors` file: one rename makes it, and no half of it can be lost. Tensors:

    turns.0.prompt_ids  turns.0.token_ids   U32: the first reply's ids
    cache.ids                               U32 (T,): what was read
    cache.0.keys        cache.0.values      (1, K, T, D) in the model's dtype: the first layer's cache, or
    cache.0.keys.codes .scales .biases      the same in 8 bits

and in its `__metadata__`, which holds strings:

    magistral_mlx   the version of this format
    conversation    JSON: package, model (a fingerprint), options, turns, cache (its length and kind)
    sha256          of that JSON and of all the tensors' bytes

Nothing in a file is believed before it was compared with the model at hand. Knows files, and which thread may
touch arrays; not how a conversation goes on.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import UnionType
from typing import (
    IO,
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

from .cache import QuantizedKVCache, state_layout
from .config import ModelConfig
from .errors import CheckpointError, ClosedError, ConversationError, MagistralError
from .events import FinishReason, Stats, ToolCall
from .journal import flush, flush_directory
from .options import Options
from .prefix import Prefix
from .sampling import Sampling
from .stream import Reply
from .tensorfile import NAMES, Entry, plan_file, read_whole_header, to_bytes
from .tools import read_tools

VERSION = 2
_READS = ("1", "2")  # 1 had no tool calls
_MARK = "magistral_mlx"
T = TypeVar("T")
Said: TypeAlias = str | Sequence[Mapping[str, Any]]
"""A question, or the results of tool calls: messages of the role tool."""
_Turn: TypeAlias = tuple[Said, Reply]


class Home(Protocol):
    """The model that a conversation was held with, or goes on with."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def dtype(self) -> mx.Dtype: ...
    def fingerprint(self) -> dict[str, Any]: ...
    def run(self, job: Callable[[], T]) -> T: ...
    def new_prefix(self, kv_bits: int | None = None, *, quantize_after: int = 0) -> Prefix: ...


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a file holds of a conversation: questions, their replies, and what was read, if it was kept."""

    options: Options
    turns: tuple[_Turn, ...]
    prefix: Prefix | None


def save(path: Path, saved: Saved, model: Home) -> None:
    """Write a file that is there whole or not at all. Beside the cache, memory holds one of its arrays."""
    text = json.dumps(_described(saved, model.fingerprint()), ensure_ascii=False)
    arrays = model.run(partial(_arrays, saved))
    shapes = {name: (NAMES[array.dtype], tuple(array.shape)) for name, array in arrays.items()}
    digest = hashlib.sha256(text.encode())

    def head() -> bytes:
        metadata = {_MARK: str(VERSION), "conversation": text, "sha256": digest.hexdigest()}
        return plan_file(path, shapes, metadata)[0]

    with _becoming(path) as file:
        file.write(head())
        for name in shapes:
            data = model.run(partial(_bytes, arrays, name))
            digest.update(data)
            file.write(data)
        file.seek(0)
        file.write(head())  # as long as before: now the digest is that of the bytes


def load(path: Path, model: Home, *, any_model: bool = False) -> Saved:
    """Check everything, then read. From another model, if that is wanted, comes what was said and no id."""
    try:
        entries, metadata = read_whole_header(path)
    except CheckpointError as error:
        raise ConversationError(f"this is no whole saved conversation: {error}") from error
    _check_version(path, metadata)
    with _damage(path):
        text = metadata["conversation"]
        found = json.loads(text)
        was: dict[str, Any] = {**found["model"]}
        options, cache = _options(found["options"]), found["cache"]
        turns = tuple((turn["said"], _reply(turn)) for turn in found["turns"])
        _expect(all(map(_is_said, (said for said, _ in turns))), "turns")
    differences = _differences(was, model.fingerprint())
    if differences and not any_model:
        raise ConversationError(
            f"{path} was saved with another model: {differences}; load it with that one, or with "
            "any_model=True for what was said, to be read again by this one"
        )
    with _damage(path):
        if not differences:
            _check_layout(entries, len(turns), cache, model)
        arrays = _read(entries, text, metadata["sha256"], model, keep=not differences)
        if differences:
            return Saved(options=options, turns=turns, prefix=None)
        ids = model.run(partial(_take_ids, arrays, model.config.vocab_size))
        prefix = _prefix(ids["cache.ids"], arrays, cache, model) if cache else None
    numbered = (
        (said, replace(reply, prompt_ids=ids[f"turns.{n}.prompt_ids"], token_ids=ids[f"turns.{n}.token_ids"]))
        for n, (said, reply) in enumerate(turns)
    )
    return Saved(options=options, turns=tuple(numbered), prefix=prefix)


# ------------------------------------------------------------------ what is written


def _described(saved: Saved, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {**saved.options}
    if "sampling" in saved.options:
        options["sampling"] = asdict(saved.options["sampling"])
    if "tools" in saved.options:
        options["tools"] = read_tools(saved.options["tools"])  # plain JSON
    return {
        "package": version("magistral_mlx"),
        "model": fingerprint,
        "options": options,
        "turns": [
            {
                "said": said,
                "thinking": reply.thinking,
                "answer": reply.answer,
                "finish_reason": reply.finish_reason,
                "seed": reply.seed,
                "tool_calls": [asdict(call) for call in reply.tool_calls],
                "stats": asdict(reply.stats),
            }
            for said, reply in saved.turns
        ],
        "cache": _kind(saved.prefix),
    }


def _kind(prefix: Prefix | None) -> dict[str, Any] | None:
    """How long a cache is and how it goes on; None where nothing was read."""
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
    """Every tensor, not yet computed."""
    ids: dict[str, tuple[int, ...]] = {}
    for n, (_, reply) in enumerate(saved.turns):
        ids[f"turns.{n}.prompt_ids"], ids[f"turns.{n}.token_ids"] = reply.prompt_ids, reply.token_ids
    arrays: dict[str, mx.array] = {}
    if saved.prefix and (length := saved.prefix.length):
        ids["cache.ids"] = tuple(saved.prefix.ids[:length])
        for n, cache in enumerate(saved.prefix.caches):
            arrays |= {f"cache.{n}.{name}": array for name, array in cache.state(length).items()}
    return {name: mx.array(of, dtype=mx.uint32) for name, of in ids.items()} | arrays


def _bytes(arrays: dict[str, mx.array], name: str) -> memoryview:
    """One array's bytes; the array is forgotten."""
    return to_bytes(arrays.pop(name))


@contextmanager
def _becoming(path: Path) -> Generator[IO[bytes], None, None]:
    """A file beside `path` that takes its place, flushed, by one rename; after an error there is none."""
    try:
        _check_replaceable(path)
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                yield file
                file.flush()
                flush(file.fileno())
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink()
                raise
        flush_directory(path.parent)
    except OSError as error:
        raise ConversationError(f"{path} cannot be written: {error.strerror}") from error


def _check_replaceable(path: Path) -> None:
    if not path.exists():
        return
    with suppress(CheckpointError):
        if _MARK in read_whole_header(path)[1]:
            return
    raise ConversationError(f"{path} exists and is no saved conversation; choose another name")


# ------------------------------------------------------------------ what is read


@contextmanager
def _damage(path: Path) -> Generator[None, None, None]:
    """Whatever does not hold inside is said of this file."""
    try:
        yield
    except (ConversationError, ClosedError):
        raise
    except (
        OSError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
        MagistralError,
    ) as error:
        raise ConversationError(
            f"{path} was damaged or changed since it was saved ({type(error).__name__}: {error}); "
            "use another copy"
        ) from error


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{what} cannot be as found")


def _check_version(path: Path, metadata: Mapping[str, str]) -> None:
    found = metadata.get(_MARK)
    if found is None:
        raise ConversationError(
            f"{path} is no saved conversation, but a safetensors file of another kind; "
            "expected one that Conversation.save wrote"
        )
    if found not in _READS:
        raise ConversationError(
            f"{path} was saved by a newer magistral_mlx: it is of format {found[:20]}, this one reads "
            f"{VERSION}; update magistral_mlx"
        )


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In words, what is not as it was."""
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    if names == ["weights"]:
        return "its weights are others, such as a fine-tune's"
    return ", ".join(
        f"{name} was {was.get(name)!r}, is {now.get(name)!r}"[:120] for name in names if name != "weights"
    )


def _options(found: dict[str, Any]) -> Options:
    hints = get_type_hints(Options)
    options = {**found}
    if "sampling" in options:
        options["sampling"] = Sampling(**options["sampling"])
    for name, value in options.items():
        _expect(name in hints and _fits(value, hints[name]), f"the option {name}")
    return cast("Options", options)


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of a type, as far as the options' types go."""
    if (origin := get_origin(hint)) is Literal:
        return value in get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, kind) for kind in get_args(hint))
    return isinstance(value, origin or hint)


def _is_said(said: object) -> bool:
    if isinstance(said, str):
        return True
    return isinstance(said, list) and all(isinstance(result, dict) for result in cast("list[object]", said))


def _reply(turn: dict[str, Any]) -> Reply:
    """A reply as the JSON tells it; its ids are tensors."""
    stats = Stats(**turn["stats"])
    _expect(all(type(n) in (int, float) and n >= 0 for n in asdict(stats).values()), "a reply's statistics")
    _expect(turn["finish_reason"] in get_args(FinishReason), "a finish reason")
    _expect(type(turn["seed"]) is int, "a seed")
    _expect(isinstance(turn["thinking"], str) and isinstance(turn["answer"], str), "a reply")
    calls = tuple(ToolCall(**call) for call in turn.get("tool_calls", ()))
    _expect(all(isinstance(text, str) for call in calls for text in asdict(call).values()), "tool calls")
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
    entries: Mapping[str, Entry], turns: int, cache: Mapping[str, Any] | None, model: Home
) -> None:
    """The tensors are those that the JSON and the model's shape call for, to the last one."""
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for n in range(turns):
        for name in (f"turns.{n}.prompt_ids", f"turns.{n}.token_ids"):
            expected[name] = ("U32", entries[name].shape[:1] or (0,))
    if cache is not None:
        expected["cache.ids"] = ("U32", (cache["positions"],))
        config, positions = model.config, cache["positions"]
        _expect(type(positions) is int and positions > 0, "the cache's length")
        for n in range(config.n_layers):
            packed = cache["kv_bits"] is not None and f"cache.{n}.keys" not in entries
            layout = state_layout(config.n_kv_heads, config.head_dim, positions, model.dtype, packed=packed)
            expected |= {
                f"cache.{n}.{name}": (NAMES[dtype], shape) for name, (dtype, shape) in layout.items()
            }
    _expect(entries.keys() == expected.keys(), f"tensors {sorted(entries.keys() ^ expected.keys())[:4]}")
    for name, (dtype, shape) in expected.items():
        entry = entries[name]
        _expect((entry.dtype, entry.shape) == (dtype, shape), f"{name}, {entry.dtype} {list(entry.shape)},")


def _read(
    entries: Mapping[str, Entry], text: str, sha256: str, model: Home, *, keep: bool
) -> dict[str, mx.array]:
    """Every tensor, if they are to be kept: as they were saved, to the last bit."""
    digest = hashlib.sha256(text.encode())
    arrays: dict[str, mx.array] = {}

    def one(name: str, entry: Entry) -> None:
        array = entry.read()
        mx.eval(array)
        digest.update(to_bytes(array))
        if keep:
            arrays[name] = array

    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        model.run(partial(one, name, entry))
    _expect(digest.hexdigest() == sha256, "its bytes")
    return arrays


def _take_ids(arrays: dict[str, mx.array], vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Ids leave the arrays and become numbers."""
    names = [name for name in arrays if name.endswith("ids")]
    ids = {name: tuple(cast("list[int]", arrays.pop(name).tolist())) for name in names}
    _expect(all(max(of, default=0) < vocab_size for of in ids.values()), "ids beyond the vocabulary")
    return ids


def _prefix(
    ids: tuple[int, ...], arrays: Mapping[str, mx.array], kind: Mapping[str, Any], model: Home
) -> Prefix:
    after = kind["quantize_after"]
    _expect(type(after) is int and after >= 0, "quantize_after")
    prefix = model.new_prefix(kind["kv_bits"], quantize_after=after)
    prefix.ids = list(ids)
    for n, cache in enumerate(prefix.caches):
        stem = f"cache.{n}."
        cache.restore({name.removeprefix(stem): of for name, of in arrays.items() if name.startswith(stem)})
    return prefix
