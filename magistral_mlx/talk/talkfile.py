"""The file format of saved conversations: a text, tensors, and a checksum of both.

One `.safetensors` file: written atomically, by one rename, and no part of it can get lost. In its
`__metadata__`, whose values are strings:

    magistral_mlx   the version of this format
    conversation    the text
    sha256          of the text and of all the tensors' bytes

Knows when a file is complete, of this kind and of this version. Does not know what the text and the tensors
mean (`saving`). Arrays are evaluated and read inside `run`, which runs a job on the thread that owns them.
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
_READABLE = ("1", "2")  # 1 had no tool calls
_VERSION_KEY = "magistral_mlx"
T = TypeVar("T")


class Run(Protocol):
    """Runs a job on the thread that owns the arrays."""

    def __call__(self, job: Callable[[], T]) -> T: ...


def write(path: Path, text: str, arrays: dict[str, mx.array], run: Run) -> None:
    """Write a file atomically. Removes the arrays one by one, so that few are in memory."""
    shapes = {name: (NAMES[array.dtype], tuple(array.shape)) for name, array in arrays.items()}
    digest = hashlib.sha256(text.encode())

    def head() -> bytes:
        metadata = {_VERSION_KEY: str(VERSION), "conversation": text, "sha256": digest.hexdigest()}
        return plan_file(path, shapes, metadata)[0]

    with _atomic_write(path) as file:
        file.write(head())
        for name in shapes:
            data = run(partial(_bytes, arrays, name))
            digest.update(data)
            file.write(data)
        file.seek(0)
        file.write(head())  # of the same length, now with the digest of all bytes


@dataclass(frozen=True, kw_only=True)
class TalkFile:
    """A file of this kind and version, whose content is not verified yet."""

    entries: Mapping[str, Entry]
    text: str
    sha256: str

    def read(self, run: Run, *, keep: bool) -> dict[str, mx.array]:
        """Verify the checksum of the whole file. keep: return the tensors; otherwise none."""
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
        expect(digest.hexdigest() == self.sha256, "checksum")
        return arrays


def open_talk(path: Path) -> TalkFile:
    """Read the header, and check the kind and version of the file."""
    try:
        entries, metadata = read_whole_header(path)
    except CheckpointError as error:
        raise ConversationError(f"expected a saved conversation: {error}") from error
    _check_version(path, metadata)
    with damage(path):
        return TalkFile(entries=entries, text=metadata["conversation"], sha256=metadata["sha256"])


@contextmanager
def damage(path: Path) -> Generator[None, None, None]:
    """An error inside becomes a `ConversationError` that says this file is damaged."""
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
    """Check a condition inside `damage`."""
    if not holds:
        raise ValueError(f"invalid {what}")


def _bytes(arrays: dict[str, mx.array], name: str) -> memoryview:
    """Remove one array; returns its bytes."""
    return to_bytes(arrays.pop(name))


@contextmanager
def _atomic_write(path: Path) -> Generator[IO[bytes], None, None]:
    """A temporary file beside `path`, flushed and renamed to it at the end; removed after an error."""
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
        if _VERSION_KEY in read_whole_header(path)[1]:
            return
    raise ConversationError(f"{path} exists and is no saved conversation; choose another name")


def _check_version(path: Path, metadata: Mapping[str, str]) -> None:
    found = metadata.get(_VERSION_KEY)
    if found is None:
        raise ConversationError(
            f"{path} is no saved conversation, but a safetensors file of another kind; "
            "expected one that Conversation.save wrote"
        )
    if found not in _READABLE:
        raise ConversationError(
            f"{path} was saved by a newer magistral_mlx: it is of format {found[:20]}, this one reads "
            f"{VERSION}; update magistral_mlx"
        )
