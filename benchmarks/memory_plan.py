"""Is the memory plan right? Its peak against MLX's own counter, on real runs.

    python benchmarks/memory_plan.py [--large]

Three sizes of model with random weights, three contexts each, with an unquantized KV cache and one of 8 bits;
a prompt is prefilled and 20 ids are decoded, each case in a separate process. Prints a table and writes
`benchmarks/results/memory_plan.json`, or with --large `memory_plan_large.json`: an eighth, a quarter and a
half of Magistral's width with its proportions and vocabulary, up to 16,384 tokens, with the library's prefill
chunks. They need 10 GB of memory, and take too long with the BLAS that MLX brings on Linux: preload OpenBLAS
(LD_PRELOAD), which changes no array's size. A run that was stopped resumes; remove the file to start over. On
a CPU the attention scores are the largest part; on Metal they are never materialized.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from magistral_mlx.config import ModelConfig

RESULTS = Path(__file__).parent / "results"
REPLY = 20


def config(dim: int, n_layers: int, heads: tuple[int, int, int], hidden_dim: int, vocab: int) -> ModelConfig:
    return ModelConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=heads[0],
        n_kv_heads=heads[1],
        head_dim=heads[2],
        hidden_dim=hidden_dim,
        vocab_size=vocab,
        norm_eps=1e-5,
        rope_theta=1e9,
        max_context=131072,
    )


SMALL = {
    "small": (config(192, 4, (8, 2, 32), 512, 2024), (800, 1600, 3000)),
    "medium": (config(384, 6, (6, 2, 64), 1536, 32768), (400, 800, 1500)),
    "large": (config(1024, 3, (8, 2, 128), 4096, 65536), (150, 300, 600)),
}
LARGE = {
    "an eighth": (config(640, 8, (4, 1, 128), 4096, 131072), (1024, 4096, 16384)),
    "a quarter": (config(1280, 4, (8, 2, 128), 8192, 131072), (1024, 4096, 16384)),
    "a half": (config(2560, 2, (16, 4, 128), 16384, 131072), (1024, 4096, 16384)),
}
CASES = SMALL | LARGE


def chunk_of(size: str) -> int:
    """The library's prefill chunk, or 512 for the small sizes, so that their prompts need several chunks."""
    from magistral_mlx.decoder.engine import PREFILL_CHUNK

    return PREFILL_CHUNK if size in LARGE else 512


def run(size: str, context: int, kv_bits: int | None) -> dict:
    """One run in this process: what was planned and what was measured, in bytes."""
    import mlx.core as mx

    from magistral_mlx import memory
    from magistral_mlx.decoder.engine import decode, prefill
    from magistral_mlx.decoder.matrix import Matrix
    from magistral_mlx.decoder.model import Transformer
    from magistral_mlx.decoder.sampling import Sampler, Sampling

    shape = CASES[size][0]
    shapes = dict(shape.matrices())
    dtype = memory.default_dtype()

    class Random:
        def matrix(self, path: str) -> Matrix:
            weight = (mx.random.normal(shapes[path]) * shapes[path][1] ** -0.5).astype(dtype)
            mx.eval(weight)
            return Matrix(weight=weight)

        def vector(self, _: str) -> mx.array:
            weight = mx.ones(shape.dim, dtype)
            mx.eval(weight)
            return weight

    model = Transformer(shape, Random())
    mx.clear_cache()
    weights = mx.get_active_memory()
    mx.reset_peak_memory()
    caches = model.new_caches(kv_bits)
    prompt = [i * 7919 % shape.vocab_size for i in range(context - REPLY)]
    reading = prefill(model, prompt, caches, chunk=chunk_of(size))
    while True:
        try:
            next(reading)
        except StopIteration as done:
            logits = done.value
            break
    said = list(decode(model, logits, caches, sampler=Sampler(Sampling(), 1), limit=REPLY))
    assert len(said) == REPLY
    plan = memory.MemoryPlan(
        config=shape,
        weights=weights,
        context=context,
        prompt=len(prompt),
        machine=memory.this_machine(),
        itemsize=dtype.size,
        kv_bits=kv_bits,
        chunk=chunk_of(size),
    )
    measured = mx.get_peak_memory()
    return {
        "size": size,
        "parameters": shape.parameters,
        "context": context,
        "kv_bits": kv_bits,
        "weights": weights,
        "kv": plan.kv,
        "transient": plan.transient,
        "transient_measured": measured - weights - plan.kv,
        "total": plan.total,
        "measured": measured,
        "ratio": round(plan.total / measured, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3, metavar=("SIZE", "CONTEXT", "BITS"), help=argparse.SUPPRESS)
    parser.add_argument("--large", action="store_true", help="Magistral's proportions, long contexts")
    args = parser.parse_args()
    if one := args.one:
        print(json.dumps(run(one[0], int(one[1]), int(one[2]) or None)))
        return
    out = RESULTS / ("memory_plan_large.json" if args.large else "memory_plan.json")
    rows = json.loads(out.read_text())["rows"] if args.large and out.exists() else []
    done = {(row["size"], row["context"], row["kv_bits"]) for row in rows}
    for bits in (None, 8):
        for size, (_, contexts) in (LARGE if args.large else SMALL).items():
            for context in contexts:
                if (size, context, bits) not in done:
                    command = [sys.executable, __file__, "--one", size, str(context), str(bits or 0)]
                    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                    rows.append(json.loads(told))
                    print(told, file=sys.stderr, end="")
                    write(out, rows)
    show(rows)


def write(out: Path, rows: list[dict]) -> None:
    """Called after each case: with --large, a stopped run resumes with the missing ones."""
    out.parent.mkdir(exist_ok=True)
    worst = max(abs(row["ratio"] - 1) for row in rows)
    out.write_text(json.dumps({"worst": worst, "rows": rows}, indent=1) + "\n")


def show(rows: list[dict]) -> None:
    columns = (
        "width",
        "parameters",
        "context",
        "KV cache",
        "planned, GB",
        "measured, GB",
        "planned / measured",
    )
    table = Table(*columns, box=MARKDOWN)
    for row in rows:
        sizes = [f"{row[key] / 1e9:.3f}" for key in ("total", "measured")]
        kind, parameters = "8 bit" if row["kv_bits"] else "full", f"{row['parameters'] / 1e6:,.0f} M"
        table.add_row(row["size"], parameters, f"{row['context']:,}", kind, *sizes, f"{row['ratio']:.3f}")
    Console(width=160).print(table)
    print(f"furthest from 1: {max(abs(row['ratio'] - 1) for row in rows):.1%}")


if __name__ == "__main__":
    main()
