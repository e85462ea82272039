"""Casts and quantizes one source tensor, one block of rows at a time.

Knows MLX's quantizer and which weights it cannot take. Does not know the output's files and offsets
(`conversion`), or which scheme a tensor gets (`recipe`).
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from magistral_mlx.config import Scheme
from magistral_mlx.disk.checkpoint import Checkpoint, Tensor
from magistral_mlx.disk.tensorfile import DTYPES, NAMES
from magistral_mlx.errors import ConversionError

BLOCK_BYTES = 8 * 2**20
"""Bytes of source rows read at once: enough for full disk speed, little compared to any Mac's memory."""
SAMPLE_ROWS = 16
"""Rows of each block that are compared with their quantized form, for the quantization error."""

_EXPONENT = {mx.float32: 0xFF000000, mx.bfloat16: 0xFF00, mx.float16: 0xF800}


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Rows from `first` on. parts: the floats, or packed weights, scales and biases; all evaluated."""

    first: int
    rows: int
    parts: list[mx.array]
    finite: bool
    loss: tuple[float, float] | None
    """Sum of squares of a sample's quantization errors, and of its original values; None: not measured."""


@dataclass(slots=True)
class Loss:
    """A tensor's quantization error, summed over its blocks."""

    squared_error: float = 0.0
    squared_values: float = 0.0
    measured: bool = False
    finite: bool = True

    def add(self, block: Block) -> None:
        self.finite = self.finite and block.finite
        if block.loss:
            self.measured = True
            self.squared_error += block.loss[0]
            self.squared_values += block.loss[1]

    def relative(self) -> float | None:
        """The relative RMS error; infinite if there were non-finite weights (and allowed)."""
        if not self.finite:
            return math.inf
        if not self.measured:
            return None
        return math.sqrt(self.squared_error / self.squared_values) if self.squared_values else 0.0


def blocks(
    checkpoint: Checkpoint,
    name: str,
    scheme: Scheme | None,
    dtype: mx.Dtype,
    *,
    measure: bool = False,
    allow_nonfinite: bool = False,
) -> Iterator[Block]:
    """The tensor `name`, cast to `dtype` and quantized by `scheme`, if there is one.

    Groups run along a row, so the joined blocks are bit for bit the whole tensor quantized at once.
    """
    tensor, stored = checkpoint.tensors[name], checkpoint.scheme(name.removesuffix(".weight"))
    rows = tensor.entry.shape[0]
    row_bytes = tensor.entry.row_bytes * 16 // stored.bits if stored else tensor.entry.row_bytes
    step = max(BLOCK_BYTES // (row_bytes * tensor.block), 1) * tensor.block
    spans = [(first, min(first + step, rows)) for first in range(0, rows, step)]
    source = (
        ((span, *_dequantized_rows(checkpoint, name, stored, *span)) for span in spans)
        if stored
        else _read_ahead(tensor, spans)
    )
    for (first, last), read, finite in source:
        if not (allow_nonfinite or finite):
            raise ConversionError(
                f"{name} holds weights that are not finite (NaN or Inf): the checkpoint is damaged; get it "
                "again, or give --allow-nonfinite to convert it as it is"
            )
        block = read.astype(dtype)
        parts = [block] if scheme is None else _quantize(block, scheme)
        mx.eval(parts)
        cast_to = [block] if block.dtype != read.dtype else []
        fits = all(map(_finite, [*cast_to, *parts[1:]]))
        if not (allow_nonfinite or fits):
            raise ConversionError(
                f"{name} holds weights too large for {scheme or 'unquantized weights'} in {NAMES[dtype]}; "
                "choose another --dtype or --recipe"
            )
        loss = _error(block, parts, scheme) if scheme and measure else None
        del read, block
        yield Block(first=first, rows=last - first, parts=parts, finite=finite and fits, loss=loss)
        del parts
        mx.clear_cache()


def _quantize(block: mx.array, scheme: Scheme) -> list[mx.array]:
    return list(mx.quantize(block, group_size=scheme.group_size, bits=scheme.bits, mode=scheme.mode))


def _read_ahead(
    tensor: Tensor, spans: Sequence[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], mx.array, bool]]:
    """Rows as floats, and whether all are finite; the next ones are read and checked meanwhile."""

    def fetch(span: tuple[int, int]) -> tuple[NDArray[Any], bool]:
        raw = tensor.entry.raw(*span)
        return raw, _finite_bits(raw, DTYPES[tensor.entry.dtype])

    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(fetch, spans[0])
        for span, following in zip(spans, [*spans[1:], None], strict=True):
            raw, finite = pending.result()
            if following:
                pending = pool.submit(fetch, following)
            yield span, tensor.reorder(tensor.entry.decode(raw)), finite


def _dequantized_rows(
    checkpoint: Checkpoint, name: str, scheme: Scheme, first: int, last: int
) -> tuple[mx.array, bool]:
    """Rows of a quantized matrix, dequantized, and whether all are finite."""
    path = name.removesuffix(".weight")
    suffixes = ("weight", "scales", "biases") if scheme.has_biases else ("weight", "scales")
    parts = [checkpoint.tensors[f"{path}.{suffix}"].read(first, last) for suffix in suffixes]
    rows = _dequantize(parts, scheme)
    return rows, _finite(rows)


def _dequantize(parts: list[mx.array], scheme: Scheme) -> mx.array:
    return mx.dequantize(*parts, group_size=scheme.group_size, bits=scheme.bits, mode=scheme.mode)


def _finite(array: mx.array) -> bool:
    """Checks the bits of the values themselves: quantization would turn a NaN into an ordinary number."""
    if array.dtype not in _EXPONENT:
        return True
    bits = cast("NDArray[Any]", np.asarray(array.view(mx.uint32 if array.dtype == mx.float32 else mx.uint16)))
    return _finite_bits(bits, array.dtype)


def _finite_bits(raw: NDArray[Any], dtype: mx.Dtype) -> bool:
    bits = raw.view(np.uint32 if dtype == mx.float32 else np.uint16)
    return bool((bits << bits.dtype.type(1)).max() < _EXPONENT[dtype])


def _error(block: mx.array, parts: list[mx.array], scheme: Scheme) -> tuple[float, float]:
    """Sums of squares over a block's first rows: of the errors, and of the values. In float64: bfloat16's
    squares need its range.
    """
    original = block[:SAMPLE_ROWS].astype(mx.float32)
    restored = _dequantize([part[:SAMPLE_ROWS] for part in parts], scheme).astype(mx.float32)
    error, values = (
        _squares(cast("NDArray[np.float32]", np.asarray(x))) for x in (restored - original, original)
    )
    return error, values


def _squares(x: NDArray[np.float32]) -> float:
    return float(np.square(x, dtype=np.float64).sum())
