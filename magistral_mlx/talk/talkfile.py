"""The file that a conversation is kept in: a text, tensors, and a seal over both.

One `.safetensors` file: one rename makes it, and no half of it can be lost. In its `__metadata__`, which
holds strings:

    magistral_mlx   the version of this format
    conversation    the text
    sha256          of the text and of all the tensors' bytes

Knows when a file is whole, of this kind and of this version. Does not know what the text and the tensors mean
(`saving`). Arrays are touched by `run`, which does a job on the thread that owns them.
"""

import hashlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Protocol, TypeVar

import mlx.core as mx

from magistral_mlx.disk.journal import flush, flush_directory
from magistral_mlx.disk.tensorfile import NAMES, Entry, plan_file, read_whole_header, to_bytes
from magistral_mlx.errors import CheckpointError, ClosedError, ConversationError, MagistralError

VERSION = 2
_READS = ("1", "2")  # 1 had no tool calls
_MARK = "magistral_mlx"
T = TypeVar("T")


class Run(Protocol):
    """Does a job on the thread that owns the arrays."""

    def __call__(self, job: Callable[[], T]) -> T: ...


def write(path: Path, text: str, arrays: dict[str, mx.array], run: Run) -> None:
    """A file that is there whole or not at all. Takes the arrays out one by one: few are in memory."""
    shapes = {name: (NAMES[array.dtype], tuple(array.shape)) for name, array in arrays.items()}
    digest = hashlib.sha256(text.encode())

    def head() -> bytes:
        metadata = {_MARK: str(VERSION), "conversation": text, "sha256": digest.hexdigest()}
        return plan_file(path, shapes, metadata)[0]

    with _becoming(path) as file:
        file.write(head())
        for name in shapes:
            data = run(partial(_bytes, arrays, name))
            digest.update(data)
            file.write(data)
        file.seek(0)
        file.write(head())  # as long as before: now the digest is that of the bytes


@dataclass(frozen=True, kw_only=True)
class TalkFile:
    """A file of this kind and version, of which nothing is believed yet."""

    entries: Mapping[str, Entry]
    text: str
    sha256: str

    def read(self, run: Run, *, keep: bool) -> dict[str, mx.array]:
        """Check that every bit is as it was written; the tensors, if they are to be kept."""
        digest = hashlib.sha256(self.text.encode())
        arrays: dict[str, mx.array] = {}

        def one(name: str, entry: Entry) -> None:
            array = entry.read()
            mx.eval(array)
            digest.update(to_bytes(array))
            if keep:
                arrays[name] = array

        in_order = sorted(self.entries.items(), key=lambda item: (item[1].offset, item[1].nbytes))
        for name, entry in in_order:
            run(partial(one, name, entry))
        expect(digest.hexdigest() == self.sha256, "its bytes")
        return arrays


def open_talk(path: Path) -> TalkFile:
    """Its header, checked."""
    try:
        entries, metadata = read_whole_header(path)
    except CheckpointError as error:
        raise ConversationError(f"expected a saved conversation: {error}") from error
    _check_version(path, metadata)
    with damage(path):
        return TalkFile(entries=entries, text=metadata["conversation"], sha256=metadata["sha256"])


@contextmanager
def damage(path: Path) -> Generator[None, None, None]:
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


def expect(holds: bool, what: str) -> None:
    """For use inside of `damage`."""
    if not holds:
        raise ValueError(f"{what} cannot be as found")


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
