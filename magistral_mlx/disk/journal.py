"""The state of an unfinished conversion: a work directory beside the target, with a log of finished tensors.

    .NAME.partial/            beside the directory NAME that is to be made
        journal.jsonl         the conversion's fingerprint, a line for each finished tensor, one for the end
        out/                  becomes NAME, by one rename

A line is written only after the tensor's bytes and their directories have been flushed to disk, so it is true
after any crash; an incomplete last line is dropped. Knows files and the order of writes. Does not know what
is converted.
"""

import fcntl
import json
import os
import shutil
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from magistral_mlx.errors import ConversionError

_FINISHED = {"finished": True}


class Journal:
    """Locked by one conversion at a time. done: tensor → its recorded value, earlier runs included.

    fingerprint: what must be unchanged for a run to resume an earlier one, by name.
    """

    def __init__(self, target: Path, fingerprint: dict[str, Any]) -> None:
        self.target = target
        self.work = work_directory(target)
        self.out = self.work / "out"
        self.done: dict[str, float | None] = {}
        self.fingerprint = fingerprint
        self._path = self.work / "journal.jsonl"
        self._log: FileIO

    @property
    def published(self) -> bool:
        """Whether the target is complete already: made by a run that was killed after its rename."""
        if self.out.exists() or not (self.target.is_dir() and self._path.exists()):
            return False
        return self._path.read_bytes().endswith(_line(_FINISHED))

    def __enter__(self) -> Self:
        """Resume a conversion with the same fingerprint, or start one."""
        self.work.mkdir(parents=True, exist_ok=True)
        self._log = self._path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._log.close()
            raise ConversionError(f"another conversion to {self.target} is running; wait for it") from error
        try:
            self._resume()
            if not self.published:
                self.out.mkdir(exist_ok=True)
            flush_directory(self.work)
        except BaseException:
            self._log.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()

    def record(self, name: str, value: float | None) -> None:
        """Record that tensor `name` is finished, with its error. Its bytes must have been flushed."""
        self._append({"tensor": name, "value": value})
        self.done[name] = value

    def publish(self) -> None:
        """Rename the output to the target (all or nothing), then remove the work directory."""
        if not self.published:
            self._append(_FINISHED)
            fault("rename")
            self.out.rename(self.target)
            flush_directory(self.target.parent)
            fault("renamed")
        shutil.rmtree(self.work, ignore_errors=True)  # failing to clean up is no failure

    def _resume(self) -> None:
        self._log.seek(0)
        *lines, rest = self._log.read().split(b"\n")
        if rest:  # an incomplete line
            self._log.truncate(sum(len(line) + 1 for line in lines))
        if not lines:
            self._append(self.fingerprint)
            return
        if (was := self._parsed(lines[0])) != self.fingerprint:
            raise ConversionError(
                f"an earlier conversion to {self.target} was not finished, and since then "
                f"{_difference(was, self.fingerprint)}; resume it with the same source and arguments, or "
                f"remove {self.work} to start over"
            )
        for line in lines[1:]:
            match self._parsed(line):
                case {"tensor": str(name), "value": float() | None as value}:
                    self.done[name] = value
                case {"finished": True}:
                    pass
                case _:
                    raise self._damaged(line)

    def _append(self, line: dict[str, Any]) -> None:
        data = _line(line)
        while data:  # one write may take only some of it
            data = data[self._log.write(data) :]
        flush(self._log.fileno())
        fault("journal")

    def _parsed(self, line: bytes) -> dict[str, Any]:
        with suppress(ValueError, RecursionError):
            parsed: object = json.loads(line)
            if isinstance(parsed, dict):
                return cast("dict[str, Any]", parsed)
        raise self._damaged(line)

    def _damaged(self, line: bytes) -> ConversionError:
        return ConversionError(
            f"{self._path}, of an unfinished conversion, is damaged: found {line[:80]!r}; "
            f"remove {self.work} to start over"
        )


def work_directory(target: Path) -> Path:
    return target.parent / f".{target.name}.partial"


def flush(fd: int) -> None:
    """Flush to the disk itself: on macOS, fsync stops at the drive's cache, F_FULLFSYNC does not."""
    full = getattr(fcntl, "F_FULLFSYNC", None)  # Linux has none
    if full is not None:
        with suppress(OSError):  # some file systems (network, FAT) refuse it
            fcntl.fcntl(fd, full)
            return
    os.fsync(fd)


def flush_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        flush(fd)
    finally:
        os.close(fd)


def fault(point: str) -> None:
    """A hook where tests simulate a crash."""


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _difference(was: dict[str, Any], now: dict[str, Any]) -> str:
    """The differences between two fingerprints, for an error message."""
    return ", ".join(
        f"the {name} was {was.get(name, 'not there')}, is {now.get(name, 'not there')}"
        for name in was | now
        if was.get(name) != now.get(name)
    )
