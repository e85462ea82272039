"""The manifest of a conversion: source, recipe, output, their hashes, and the quantization error.

`mistral/manifest.json` holds SHA-256 and size of every file of source and output, the recipe, the versions
that wrote it, and each matrix's quantization error. It contains no times or paths, so the same conversion
gives the same manifest. Knows files and hashes. Does not know weights.
"""

import hashlib
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from magistral_mlx.errors import ConversionError

from .configfile import read_json

PATH = "mistral/manifest.json"
_CHUNK = 4 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output:
    """A file as it was written. sha256: None if it was converted without verification."""

    name: str
    size: int
    sha256: str | None


def sha256(file: Path, *, stop: Callable[[], bool] = lambda: False) -> str:
    """The hash of a file, read once from front to back; ends early, with a wrong hash, when `stop()`."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with file.open("rb", buffering=0) as stream:
        while (size := stream.readinto(buffer)) and not stop():
            digest.update(view[:size])
    return digest.hexdigest()


def described(file: Path, digest: str | None) -> dict[str, Any]:
    """A file's size, and its hash where there is one."""
    return {"bytes": file.stat().st_size} | ({"sha256": digest} if digest else {})


def read(directory: Path) -> dict[str, Any] | None:
    """The manifest of a directory, if it has one."""
    file = directory / PATH
    return read_json(file) if file.is_file() else None


def wrong_sizes(directory: Path) -> list[str]:
    """Files that are missing or have another size than was written: a quick check, for every load."""
    outputs = _outputs(directory, read(directory) or {})
    return [wrong for output in outputs if (wrong := _wrong_size(directory, output))]


def verify(
    directory: Path, *, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> list[str]:
    """Every file that differs from what was written, by reading them all. Empty: all is well."""
    manifest = read(directory)
    if manifest is None:
        raise ConversionError(
            f"{directory} has no {PATH}, so nothing says what it should hold; only what magistral_mlx "
            "converted can be verified"
        )
    outputs = list(_outputs(directory, manifest))
    found: list[str] = []
    done, total = 0, sum(output.size for output in outputs)
    for output in outputs:
        if wrong := _wrong_size(directory, output) or _wrong_bytes(directory, output):
            found.append(wrong)
        done += output.size
        progress(done, total)
    if not any(output.sha256 for output in outputs):
        found.append(
            "the manifest holds no hashes (it was converted with --no-verify): only sizes were compared"
        )
    return found


def worst(errors: Mapping[str, float], n: int = 3) -> list[tuple[str, float]]:
    """The matrices with the largest quantization error, worst first."""
    return sorted(errors.items(), key=lambda item: -item[1])[:n]


def _wrong_size(directory: Path, output: _Output) -> str | None:
    try:
        size = (directory / output.name).stat().st_size
    except FileNotFoundError:
        return f"{output.name} is missing"
    except OSError as error:
        return f"{output.name} cannot be read: {error.strerror}"
    return f"{output.name} has {size} bytes, was written with {output.size}" if size != output.size else None


def _wrong_bytes(directory: Path, output: _Output) -> str | None:
    if output.sha256 is None:
        return None
    try:
        same = sha256(directory / output.name) == output.sha256
    except OSError as error:
        return f"{output.name} cannot be read: {error.strerror}"
    return None if same else f"{output.name} has other bytes than were written"


def _outputs(directory: Path, manifest: dict[str, Any]) -> Iterator[_Output]:
    """The output files; names outside the directory are refused as damage."""
    outputs = manifest.get("outputs", {})
    if not isinstance(outputs, dict):
        raise _damaged(directory, outputs)
    for name, of in cast("dict[str, Any]", outputs).items():
        match of:
            case {"bytes": int(size), "sha256": str(digest)} if _is_inside(name):
                yield _Output(name=name, size=size, sha256=digest)
            case {"bytes": int(size)} if _is_inside(name) and "sha256" not in of:
                yield _Output(name=name, size=size, sha256=None)
            case _:
                raise _damaged(directory, {name: of})


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _damaged(directory: Path, found: object) -> ConversionError:
    return ConversionError(
        f"{directory / PATH} is damaged: expected outputs inside the directory, each with its bytes, found "
        f"{reprlib.repr(found)}"
    )
