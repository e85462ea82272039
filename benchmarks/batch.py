"""What does a batch gain? Tokens per second of 1, 2, 4 and 8 replies decoded at once.

    python benchmarks/batch.py [--trials 8] [--narrow | --clients]

The demo model at 4 bits, or with `--narrow` Magistral's 40 layers and 131072 ids at a small width. Every row
samples with its own seed after the same prompt. On a GPU a step of eight reads the weights once, as a step of
one does; a CPU is bound by arithmetic, and shows what host and kernels cost per step.

With `--clients`, whole replies of the demo model to so many readers on one event loop, as in the server:
continuous batching against streams that are open together and take turns, step by step.
"""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks.pairs import TRIALS, as_text, in_turn, ratio, seconds, write
from benchmarks.tokens_per_second import MAGISTRAL, make, narrowed
from magistral_mlx import Magistral, Reply, memory
from magistral_mlx.decoder.batch import Request, Row, feed
from magistral_mlx.decoder.engine import prefill
from magistral_mlx.decoder.model import Transformer
from magistral_mlx.decoder.sampling import Sampler, Sampling
from magistral_mlx.disk.checkpoint import load, open_checkpoint
from magistral_mlx.measure.bench import resolved_model
from magistral_mlx.measure.figures import Json, spread
from magistral_mlx.measure.trial import exhaust
from magistral_mlx.talk.continuous import ContinuousBatch
from magistral_mlx.wire import UNCHANGED

SIZES = (1, 2, 4, 8)
TOKENS = 24
REPLY = 60
PROMPT = list(range(1000, 1064))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--narrow", action="store_true", help="40 layers and 131072 ids, 64 wide")
    parser.add_argument(
        "--clients", action="store_true", help="readers of streams: continuous batching against turns"
    )
    args = parser.parse_args()
    if args.clients:
        write("batch-clients", {"tokens_per_reply": REPLY, "rows": clients(args.trials)})
        return
    dtype = memory.default_dtype()
    with tempfile.TemporaryDirectory() as directory:
        if args.narrow:
            rows = measured(make(Path(directory), narrowed(MAGISTRAL, 1), dtype), args.trials)
        else:
            with resolved_model("demo") as (place, _):
                rows = measured(Path(place), args.trials)
    write("batch-narrow" if args.narrow else "batch", {"tokens_per_line": TOKENS, "rows": rows})


def measured(directory: Path, trials: int) -> list[Json]:
    model = load(open_checkpoint(directory), memory.default_dtype())
    found = in_turn({str(n): lambda n=n: rate(model, n) for n in SIZES}, trials)
    rows = [
        {"batch": int(n), "tokens_per_second": spread(each), "times_one": ratio(each, found["1"])}
        for n, each in found.items()
    ]
    for row in rows:
        median = row["tokens_per_second"]["median"]
        print(f"{row['batch']} at once: {median:.1f} tokens/s, times one: {as_text(row['times_one'])}")
    return rows


def clients(trials: int) -> list[Json]:
    """Continuous batching compared with turns, for each number of readers."""
    rows: list[Json] = []
    with Magistral.load("demo") as model:
        batch = model.new_continuous_batch()
        for n in SIZES:
            found = in_turn(
                {"turns": lambda n=n: read(model, n, None), "continuous": lambda n=n: read(model, n, batch)},
                trials,
            )
            rates = {f"{way}_tokens_per_second": spread(each) for way, each in found.items()}
            rows.append({"readers": n, **rates, "times_turns": ratio(found["continuous"], found["turns"])})
            print(f"{n} readers, continuous batching, times turns: {as_text(rows[-1]['times_turns'])}")
    return rows


def read(model: Magistral, n: int, batch: ContinuousBatch | None) -> float:
    """Tokens per second of `n` readers together, prompts included."""

    async def main() -> list[Reply]:
        prompt, hot = model.encode("What is 48 + 37?"), Sampling(temperature=4, top_p=1)  # it never ends
        streams = [
            model.stream_ids(prompt, batch=batch, seed=seed, sampling=hot, max_tokens=REPLY)
            for seed in range(n)
        ]
        return await asyncio.gather(*(stream.adrain() for stream in streams))

    tokens = list[int]()
    took = seconds(lambda: tokens.extend(len(reply.token_ids) for reply in asyncio.run(main())))
    return sum(tokens) / took


def rate(model: Transformer, n: int) -> float:
    """Tokens per second of all rows together; the first step is not counted."""
    caches = model.new_caches()
    logits = exhaust(prefill(model, PROMPT, caches))
    rows = [
        Row(
            Request(prompt=PROMPT, sampler=Sampler(Sampling(), seed), limit=TOKENS + 2),
            logits,
            [cache.fork() for cache in caches],
        )
        for seed in range(n)
    ]

    def step() -> None:
        feed(model, rows)
        for row in rows:
            row.read(model)
            row.advance(UNCHANGED)

    step()
    return n * TOKENS / seconds(lambda: [step() for _ in range(TOKENS)])


if __name__ == "__main__":
    main()
