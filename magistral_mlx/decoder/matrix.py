"""One weight matrix `(out, in)`, dense or quantized: multiply by it, look up rows, stack several.

Knows MLX's quantized formats. Does not know what the matrix is for, nor where it came from.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from magistral_mlx.config import Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """`weight` is `(out, in)` floats or, with a `scheme`, `(out, in * bits / 32)` packed uint32.

    `scales` (and for affine, `biases`) are `(out, in / group_size)`.
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    scheme: Scheme | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """`x @ weight.T`: `(…, in)` → `(…, out)`."""
        if self.scheme is None:
            return x @ self.weight.T
        assert self.scales is not None
        return mx.quantized_matmul(
            x,
            self.weight,
            self.scales,
            self.biases,
            transpose=True,
            group_size=self.scheme.group_size,
            bits=self.scheme.bits,
            mode=self.scheme.mode,
        )

    def dequantized(self, first: int = 0, last: int | None = None) -> mx.array:
        """Rows `first` to `last`, dequantized to float32: the reference for a quantized product."""
        weight = self.weight[first:last]
        if self.scheme is not None:
            assert self.scales is not None
            weight = mx.dequantize(
                weight,
                self.scales[first:last],
                None if self.biases is None else self.biases[first:last],
                group_size=self.scheme.group_size,
                bits=self.scheme.bits,
                mode=self.scheme.mode,
            )
        return weight.astype(mx.float32)

    def rows(self, ids: mx.array) -> mx.array:
        """The rows at `ids`: `(…)` → `(…, in)`, the embedding look-up."""
        if self.scheme is None:
            return self.weight[ids]
        assert self.scales is not None
        return mx.dequantize(
            self.weight[ids],
            self.scales[ids],
            None if self.biases is None else self.biases[ids],
            group_size=self.scheme.group_size,
            bits=self.scheme.bits,
            mode=self.scheme.mode,
        )

    def arrays(self) -> list[mx.array]:
        return [array for array in (self.weight, self.scales, self.biases) if array is not None]


class Stack:
    """Matrices that take the same input: `(…, in)` → `(…, sum of outs)`.

    If their schemes agree they are fused into one matrix, for one kernel launch. This is exact: rows are
    independent, and quantization groups run along a row.
    """

    def __init__(self, *matrices: Matrix) -> None:
        alike = len({matrix.scheme for matrix in matrices}) == 1
        self._matrices = [_joined(matrices)] if alike else list(matrices)

    def __call__(self, x: mx.array) -> mx.array:
        parts = [matrix(x) for matrix in self._matrices]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)

    def arrays(self) -> list[mx.array]:
        return [array for matrix in self._matrices for array in matrix.arrays()]


def _joined(matrices: Sequence[Matrix]) -> Matrix:
    def rows(parts: Sequence[mx.array | None]) -> mx.array | None:
        arrays = [part for part in parts if part is not None]
        return mx.concatenate(arrays) if arrays else None

    weight = mx.concatenate([matrix.weight for matrix in matrices])
    scales, biases = rows([m.scales for m in matrices]), rows([m.biases for m in matrices])
    joined = Matrix(weight=weight, scales=scales, biases=biases, scheme=matrices[0].scheme)
    mx.eval(joined.arrays())
    return joined
