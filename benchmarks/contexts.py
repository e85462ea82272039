"""What does context cost? Time and bytes per token up to 16384 positions, with a KV cache of 16 and 8 bits.

    python benchmarks/contexts.py [--trials 8]

Magistral's heads (32 query heads, 8 KV heads, 128 wide), two layers, small width: what is measured is
attention and its cache. The cache is filled with random keys and values, without a prefill; then ids are
decoded one by one, all contexts in turn, and a straight line is fitted to the medians. Times are per layer.
Bytes are those of Magistral's 40 layers with 2-byte numbers, and those held here (a CPU computes in float32).
On a GPU 8 bits halve the bytes to read; on a CPU they add arithmetic.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import mlx.core as mx

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks.memory_plan import config
from benchmarks.pairs import TRIALS, as_text, in_turn, ratio, seconds, write
from benchmarks.tokens_per_second import MAGISTRAL
from magistral_mlx import memory
from magistral_mlx.decoder.cache import KVCache, trim_all
from magistral_mlx.decoder.matrix import Matrix
from magistral_mlx.decoder.model import Transformer
from magistral_mlx.measure.figures import Json, spread

LAYERS = 2
SHAPE = config(128, LAYERS, (32, 8, 128), 256, 1024)
CONTEXTS = (256, 2048, 4096, 8192, 12288, 16384)
TOKENS = 4
KV_BITS = 8
Place: TypeAlias = tuple[int, int | None]
"""A context, and the bits of its cache (None: as computed)."""


class Random:
    """Gives the model random weights."""

    def matrix(self, path: str) -> Matrix:
        shape = dict(SHAPE.matrices())[path]
        weight = mx.random.normal(shape, key=mx.random.key(len(path))) * shape[1] ** -0.5
        return Matrix(weight=weight.astype(memory.default_dtype()))

    def vector(self, _: str) -> mx.array:
        return mx.ones(SHAPE.dim, memory.default_dtype())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--most", type=int, default=CONTEXTS[-1], help="the longest context")
    args = parser.parse_args()
    model = Transformer(SHAPE, Random())
    rows = measured(model, [context for context in CONTEXTS if context <= args.most], args.trials)
    fits = {}
    for bits in ("16", "8"):
        times = [row["milliseconds"][bits]["median"] for row in rows]
        slope, start, r2 = line([row["context"] for row in rows], times)
        fits[bits] = {"ms_per_1000_positions": 1000 * slope, "ms_at_0": start, "r2": r2}
        print(f"{bits:>2} bits: {start:.2f} ms + {1000 * slope:.3f} ms per 1000 positions, r² {r2:.4f}")
    write("contexts", {"layers": LAYERS, "tokens_per_trial": TOKENS, "rows": rows, "fits": fits})


def measured(model: Transformer, contexts: Sequence[int], trials: int) -> list[Json]:
    """Milliseconds per token and layer with each cache at each context, and the caches' bytes."""
    caches = {
        (context, bits): filled(model, context, bits) for context in contexts for bits in (None, KV_BITS)
    }
    ways = {place: lambda kept=kept: decoded(model, kept) for place, kept in caches.items()}
    found = {place: [1e3 * s / LAYERS for s in each] for place, each in in_turn(ways, trials).items()}
    return [row(context, found, caches) for context in contexts]


def row(context: int, found: Mapping[Place, list[float]], caches: Mapping[Place, list[KVCache]]) -> Json:
    both = {"16": (context, None), "8": (context, KV_BITS)}
    milliseconds = {bits: spread(found[place]) for bits, place in both.items()}
    # For 40 layers in 16-bit numbers: codes keep their size, floats (here maybe 4 bytes) take 2.
    whole = {
        bits: memory.kv_bytes(MAGISTRAL, context, itemsize=2, kv_bits=place[1])
        for bits, place in both.items()
    }
    faster = ratio(found[both["16"]], found[both["8"]])
    medians = ", ".join(f"{bits} bits {each['median']:.2f} ms" for bits, each in milliseconds.items())
    gigabytes = ", ".join(f"{each / 1e9:.2f} GB" for each in whole.values())
    print(f"{context:6}: {medians} per token and layer; 8 bits times as fast: {as_text(faster)}; {gigabytes}")
    return {
        "context": context,
        "milliseconds": milliseconds,
        "cache_bytes_here": {bits: sum(c.nbytes for c in caches[place]) for bits, place in both.items()},
        "cache_bytes_magistral": whole,
        "times_as_fast_in_8_bits": faster,
    }


def filled(model: Transformer, context: int, kv_bits: int | None) -> list[KVCache]:
    """Caches that hold `context` random positions, with room for those that are decoded."""
    shape = (1, SHAPE.n_kv_heads, context - TOKENS, SHAPE.head_dim)
    caches = model.new_caches(kv_bits)
    for cache in caches:
        cache.update(*(mx.random.normal(shape).astype(model.dtype) for _ in range(2)))
        mx.eval(cache.arrays())
    return caches


def decoded(model: Transformer, caches: list[KVCache]) -> float:
    """Seconds per token; the caches are trimmed back afterwards."""

    def run() -> None:
        for token in range(TOKENS):
            mx.eval(model.logits(model(mx.array([[token]]), caches)))

    took = seconds(run) / TOKENS
    trim_all(caches, TOKENS)
    return took


def line(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Least squares: slope, value at 0, and the share of the variance that the line explains."""
    slope, start = statistics.linear_regression(x, y)
    return slope, start, statistics.correlation(x, y) ** 2 if len(x) > 1 else 1.0


if __name__ == "__main__":
    main()
