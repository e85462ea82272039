"""How much faster than mlx-lm could any decode loop be on this machine? The matrix products alone.

    python benchmarks/ceiling.py [MODEL] [--dtype bfloat16] [--trials 8]

A step's matrix products, each using the result of the one before, with queries, keys and values fused, and
gate and up fused, as the package computes them; without norms, RoPE, attention, cache, sampling or Python. A
loop of the same arithmetic cannot be faster. For comparison, whole steps of both loops, in turn, at
temperature 0.7 and top_p 0.95 after a prompt of 64 ids. The demo model (the default) is converted to 4 bit
first. Writes `results/ceiling-<model>-<dtype>.json`.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import load_model

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks.pairs import TRIALS, as_text, in_turn, ratio, write
from magistral_mlx.decoder import engine
from magistral_mlx.decoder.model import Transformer
from magistral_mlx.decoder.sampling import Sampler, Sampling
from magistral_mlx.disk.checkpoint import load, open_checkpoint
from magistral_mlx.measure.bench import resolved_model
from magistral_mlx.measure.figures import spread
from magistral_mlx.measure.trial import exhaust

STEPS = 64
PROMPT = list(range(1000, 1064))


def products(model: Transformer) -> float:
    """Milliseconds of a step's matrix products."""
    x = mx.zeros((1, 1, model.config.dim), model.dtype)
    heads = model.config.n_heads * model.config.head_dim
    start = time.perf_counter()
    for _ in range(STEPS):
        h = x
        for block in model.blocks:
            h = block.attention.out(block.attention.qkv(h)[..., :heads])
            gate_up = block.feed_forward.gate_up(h)
            h = block.feed_forward.down(gate_up[..., : model.config.hidden_dim])
        mx.eval(model.logits(h))
    return 1e3 * (time.perf_counter() - start) / STEPS


def per_step(ids: Iterator[Any]) -> float:
    """Milliseconds per step, without the first."""
    next(ids)
    start = time.perf_counter()
    for _ in islice(ids, STEPS):
        pass
    return 1e3 * (time.perf_counter() - start) / STEPS


def ours(model: Transformer) -> float:
    caches = model.new_caches()
    logits = exhaust(engine.prefill(model, PROMPT, caches))
    return per_step(engine.decode(model, logits, caches, sampler=Sampler(Sampling(), 0), limit=STEPS + 2))


def peers(model: Any) -> float:
    sampler = make_sampler(temp=0.7, top_p=0.95)
    return per_step(generate_step(mx.array(PROMPT), model, max_tokens=STEPS + 2, sampler=sampler))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    with resolved_model(args.model) as (_, directory):
        model = load(open_checkpoint(directory), getattr(mx, args.dtype))
        theirs: Any = load_model(directory)[0]
        theirs.set_dtype(getattr(mx, args.dtype))
        mx.eval(theirs.parameters())
        found = in_turn(
            {
                "products alone": lambda: products(model),
                "magistral_mlx": lambda: ours(model),
                "mlx-lm": lambda: peers(theirs),
            },
            args.trials,
        )
    rows = {name: spread(trials) for name, trials in found.items()}
    for name, row in rows.items():
        print(f"{name:16}{row['median']:8.2f} ms a step ({row['min']:.2f} to {row['max']:.2f})")
    most, reached = (ratio(found["mlx-lm"], found[name]) for name in ("products alone", "magistral_mlx"))
    print(f"times as fast as mlx-lm: {as_text(reached)}; the products alone: {as_text(most)}")
    question = f"ceiling-{Path(args.model).name}-{args.dtype}"
    write(question, {"milliseconds": rows, "times_as_fast": reached, "at_most": most})


if __name__ == "__main__":
    main()
