"""One `.safetensors` file: checked headers, rows read by `preadv`, and headers for files still to be written.

Rows are read one block at a time because `mx.load`, memory maps and `get_slice` all bring in the whole
tensor, and one of Magistral's is 1.3 GB. Knows bytes and offsets. Does not know what a tensor is for.
"""

import json
import math
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from magistral_mlx.errors import CheckpointError

MAX_HEADER = 100_000_000
"""The format's own limit; Magistral's is 40 kB."""

_BITS = {
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_MAX_RANK = 8
# numpy has no bfloat16: its bits are read as uint16, and viewed as bfloat16 in MLX.
_READ: dict[str, tuple[type[np.generic], mx.Dtype]] = {
    "BF16": (np.uint16, mx.bfloat16),
    "F16": (np.float16, mx.float16),
    "F32": (np.float32, mx.float32),
    "U32": (np.uint32, mx.uint32),
    "U8": (np.uint8, mx.uint8),
}
DTYPES = {name: dtype for name, (_, dtype) in _READ.items()}
"""The dtypes of weights, by their safetensors names."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor's place in its file: `nbytes` at `offset` from the file's first byte, row-major."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.shape[0]

    def read(self, start: int = 0, stop: int | None = None) -> mx.array:
        """Rows `start:stop` (along the first axis) as a new array; nothing else is read."""
        return self.decode(self.raw(start, self.shape[0] if stop is None else stop))

    def raw(self, start: int, stop: int) -> NDArray[Any]:
        """The same rows as numpy, bfloat16 as its bits (uint16). May be called from any thread."""
        block = np.empty((stop - start, *self.shape[1:]), _READ[self.dtype][0])
        self._fill(_bytes_of(block), self.offset + start * (self.nbytes // max(self.shape[0], 1)))
        return block

    def decode(self, raw: NDArray[Any]) -> mx.array:
        """The result of `raw` as an MLX array of this tensor's dtype."""
        array, dtype = mx.array(cast("Any", raw)), _READ[self.dtype][1]  # mlx's stubs do not know numpy
        return array.view(dtype) if array.dtype != dtype else array

    def _fill(self, buffer: memoryview, offset: int) -> None:
        try:
            with self.file.open("rb", buffering=0) as file:
                while buffer:
                    got = os.preadv(file.fileno(), [buffer], offset)
                    if not got:
                        raise CheckpointError(
                            f"{self.file} ends inside {self.name}: it was cut off; get it again"
                        )
                    buffer, offset = buffer[got:], offset + got
        except OSError as error:  # its header could be read before
            raise CheckpointError(
                f"{self.file} was there, and cannot be read now: {error.strerror}; put it back where it was"
            ) from error


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of a file by name; a header that does not fit its file is a `CheckpointError`."""
    return read_whole_header(path)[0]


def read_whole_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Tensors as in `read_header`, and the strings of the file's `__metadata__`."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise CheckpointError(
                    f"{path} is no safetensors file, or was cut off: its header claims {length} bytes, "
                    f"the file has {size}; get it again"
                )
            raw: object = json.loads(file.read(length).decode(), object_pairs_hook=_unique_names)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no safetensors file: its header is not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is no safetensors file: its header is not an object")
    described = cast("dict[str, Any]", raw)
    metadata = described.pop("__metadata__", None)
    entries = {name: _entry(path, name, of, 8 + length) for name, of in described.items()}
    _check_layout(path, entries, 8 + length, size)
    return entries, _texts(metadata)


def _texts(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict):
        return {}
    return {name: of for name, of in cast("dict[str, Any]", metadata).items() if isinstance(of, str)}


def _entry(path: Path, name: str, described: Any, base: int) -> Entry:
    try:
        dtype, shape, begin, end = _described(described)
        nbytes = math.prod(shape) * _BITS[dtype] // 8
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the header's entry for {name!r} should be a known dtype, a shape and two offsets, "
            f"found {reprlib.repr(described)}"
        ) from error
    if end - begin != nbytes:
        raise CheckpointError(
            f"{path}: {name} is {dtype} of shape {list(shape)}, {nbytes} bytes, "
            f"but the header gives it bytes {begin} to {end}"
        )
    return Entry(file=path, name=name, dtype=dtype, shape=shape, offset=base + begin, nbytes=nbytes)


def _described(described: Any) -> tuple[str, tuple[int, ...], int, int]:
    shape, (begin, end) = tuple(described["shape"]), described["data_offsets"]
    if len(shape) > _MAX_RANK or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)):
        raise ValueError
    return described["dtype"], shape, begin, end


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses repeated names, of which a JSON reader may keep either one."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} occurs twice")
        found[name] = value
    return found


def _check_layout(path: Path, entries: Mapping[str, Entry], base: int, size: int) -> None:
    """Tensors must fill the file without gaps or overlaps: otherwise it was cut off or tampered with."""
    place = base
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.nbytes)):
        if entry.offset != place:
            raise CheckpointError(f"{path}: {entry.name} overlaps its neighbour or leaves a gap before it")
        place += entry.nbytes
    if place != size:
        raise CheckpointError(
            f"{path} was cut off or has foreign bytes at its end: the header accounts for {place} bytes, "
            f"the file has {size}; get it again"
        )


def plan_file(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> tuple[bytes, dict[str, Entry]]:
    """The header of a file still to be written, and where each tensor (dtype, shape) goes in it."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx", **metadata}}
    place = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * _BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + nbytes]}
        place += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8, as the format recommends
    head = len(text).to_bytes(8, "little") + text
    entries = {
        name: _entry(path, name, of, len(head)) for name, of in header.items() if name != "__metadata__"
    }
    return head, entries


def to_bytes(array: mx.array) -> memoryview:
    """An array's bytes, row-major, as in a file."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return _bytes_of(np.ascontiguousarray(cast("Any", array)))


def _bytes_of(array: "np.ndarray[Any, Any]") -> memoryview:
    """The memory of a contiguous array, even an empty one (which `memoryview.cast` refuses)."""
    return array.reshape(-1).view(np.uint8).data
