"""What does context cost? Seconds and bytes per token over 0 to 16384 positions, KV cache in 16 and in 8 bits.

    python benchmarks/contexts.py [--trials 8]

Heads as Magistral's (32 of queries, 8 of keys, 128 wide), two layers, little width: what is measured is
attention and its cache. The cache is filled with random keys and values, not read from a prompt; then ids are
decoded one by one. A straight line is fitted to the medians (time over context), and what the cache holds of a
position is scaled to 40 layers and 16-bit numbers (a CPU computes in float32). Times are CPU times where there is
no GPU: on a GPU 8 bits are half the bytes to read, on a CPU they are more arithmetic.
"""

import argparse
import statistics
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks.memory_plan import config
from benchmarks.pairs import TRIALS, in_turn, ratio, seconds, told, write
from magistral_mlx import memory
from magistral_mlx.matrix import Matrix
from magistral_mlx.model import Transformer

LAYERS = 2
SHAPE = config(128, LAYERS, (32, 8, 128), 256, 1024)
CONTEXTS = (256, 2048, 4096, 8192, 12288, 16384)
TOKENS = 4


class Random:
    """Where the model takes its weights from."""

    def matrix(self, path: str) -> Matrix:
        shape = dict(SHAPE.matrices())[path]
        weight = mx.random.normal(shape, key=mx.random.key(len(path))) * shape[1] ** -0.5
        return Matrix(weight=weight.astype(memory.default_dtype()))

    def vector(self, path: str) -> mx.array:
        return mx.ones(SHAPE.dim, memory.default_dtype())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--most", type=int, default=CONTEXTS[-1], help="the longest context")
    args = parser.parse_args()
    model, dtype = Transformer(SHAPE, Random()), memory.default_dtype()
    rows = []
    for context in (context for context in CONTEXTS if context <= args.most):
        caches = {bits: filled(model, context, bits) for bits in (None, 8)}
        ways = {bits: lambda kept=kept: decoded(model, kept) for bits, kept in caches.items()}
        found = in_turn(ways, args.trials)
        # On a CPU computing takes 4 bytes a number, and the scales of packed ones as well.
        kept = {bits or 16: memory.kv_bytes(MAGISTRAL, context, itemsize=2, kv_bits=bits) for bits in (None, 8)}
        assert all(
            sum(cache.nbytes for cache in each)
            == memory.kv_bytes(SHAPE, caches[bits][0].offset, itemsize=dtype.size, kv_bits=bits)
            for bits, each in caches.items()
        )
        rows.append(
            {"context": context, "milliseconds": {str(bits or 16): 1e3 * statistics.median(each) for bits, each in found.items()}}
            | {"bytes_at_40_layers": kept, "times_as_fast_16": ratio(found[8], found[None])}
        )
        print(f"{context:6}", rows[-1]["milliseconds"], kept, "16 bit is", told(rows[-1]["times_as_fast_16"]))


if __name__ == "__main__":
    main()
