"""Where does a decode step's time go? Graph, forward pass and sampling, ours and mlx-lm's, in turn.

    python benchmarks/decode_step.py [--trials 8] [--dtype bfloat16]

Magistral's 40 layers and 131072 ids at 4 bits, 64 wide, so that arithmetic does not hide host and sampler.
`graph`: Python and C++ build one step, nothing is evaluated; `forward` evaluates the logits; `sampling`
samples one id from evaluated logits. In a real loop the graph is built while the device computes, so the
parts do not add up to a step. The cost of text per token is measured by `text.py`. Prints rows of Markdown,
and writes `results/decode_step-<dtype>.json`.
"""

import argparse
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import load_model

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks.pairs import TRIALS, as_text, in_turn, ratio, write
from benchmarks.tokens_per_second import MAGISTRAL, make, narrowed
from magistral_mlx.decoder.sampling import Sampler, Sampling
from magistral_mlx.disk.checkpoint import load, open_checkpoint
from magistral_mlx.measure.figures import spread

STEPS = 16
PARTS = ("graph", "forward", "sampling")


class Ours:
    def __init__(self, directory: Path, dtype: mx.Dtype) -> None:
        self.model = load(open_checkpoint(directory), dtype)
        self.caches = self.model.new_caches()
        self.sampler, self.positions = Sampler(Sampling(), 0), count()

    def scores(self, token: mx.array) -> mx.array:
        return self.model.logits(self.model(token.reshape(1, 1), self.caches))[0, 0]

    def draw(self, scores: mx.array) -> mx.array:
        return self.sampler.draw(scores, next(self.positions))


class Peers:
    """The parts as in mlx-lm's `generate_step`, log-softmax included."""

    def __init__(self, directory: Path, dtype: mx.Dtype) -> None:
        self.model: Any = load_model(directory)[0]
        self.model.set_dtype(dtype)
        self.caches = make_prompt_cache(self.model)
        self.sampler = make_sampler(temp=0.7, top_p=0.95)

    def scores(self, token: mx.array) -> mx.array:
        return self.model(token.reshape(1, 1), cache=self.caches)[:, -1, :]

    def draw(self, scores: mx.array) -> mx.array:
        return self.sampler(scores - mx.logsumexp(scores, keepdims=True))


def parts(engine: Ours | Peers) -> list[float]:
    """Milliseconds per step of each part."""
    token, spent = mx.array([1000]), [0.0] * len(PARTS)
    for _ in range(STEPS):
        mx.eval(token)
        start = time.perf_counter()
        scores = engine.scores(token)
        engine.draw(scores)
        built = time.perf_counter()
        mx.eval(scores)
        computed = time.perf_counter()
        token = engine.draw(scores)
        mx.eval(token)
        for at, seconds in enumerate((built - start, computed - built, time.perf_counter() - computed)):
            spent[at] += 1e3 * seconds / STEPS
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    dtype = getattr(mx, args.dtype)
    with tempfile.TemporaryDirectory() as place:
        directory = make(Path(place), narrowed(MAGISTRAL, 1), dtype)
        engines = {"magistral_mlx": Ours(directory, dtype), "mlx-lm": Peers(directory, dtype)}
        found = in_turn({name: lambda e=engine: parts(e) for name, engine in engines.items()}, args.trials)
    rows = []
    print("| part | ours, ms | mlx-lm, ms | times as fast |\n|---|---:|---:|---|")
    for at, part in enumerate(PARTS):
        ours, theirs = ([trial[at] for trial in found[name]] for name in ("magistral_mlx", "mlx-lm"))
        row = {"part": part, "magistral_mlx": spread(ours), "mlx-lm": spread(theirs)}
        rows.append(row | {"times_as_fast": ratio(theirs, ours)})
        medians = f"{row['magistral_mlx']['median']:.2f} | {row['mlx-lm']['median']:.2f}"
        print(f"| {part} | {medians} | {as_text(rows[-1]['times_as_fast'])} |")
    write(f"decode_step-{args.dtype}", {"milliseconds": rows})


if __name__ == "__main__":
    main()
