"""How long does it take to sample one id from 131072 logits? Ours and mlx-lm's, on the same logits, in turn.

    python benchmarks/sampler.py [--trials 8]

Temperature 0.7 and top_p 0.95 on both sides: mlx-lm's `make_sampler`, ours as `decode` calls it. Both get
logits; the log-softmax that mlx-lm computes first, in every step, is not counted. Peaked and flat logits cost
the same. Correctness (the nucleus as in float64) is tested in `tests/decoder/test_sampling.py`.
"""

import argparse
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks.pairs import TRIALS, as_text, in_turn, ratio, seconds, write
from magistral_mlx.decoder.sampling import Sampler, Sampling
from magistral_mlx.measure.figures import spread

VOCABULARY = 131072
DRAWS = 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=TRIALS)
    args = parser.parse_args()
    rows = []
    for name, width in (("peaked", 3.0), ("flat", 0.1)):
        logits = width * mx.random.normal((VOCABULARY,), key=mx.random.key(0))
        mx.eval(logits)
        found = in_turn(engines(logits), args.trials)
        faster = ratio(found["mlx-lm"], found["magistral_mlx"])
        milliseconds = {engine: spread([1e3 * s for s in each]) for engine, each in found.items()}
        rows.append({"logits": name, "milliseconds": milliseconds, "times_as_fast": faster})
        ours, theirs = (milliseconds[engine]["median"] for engine in ("magistral_mlx", "mlx-lm"))
        print(f"{name} logits: {ours:.2f} ms against {theirs:.2f} ms; times as fast: {as_text(faster)}")
    write("sampler", {"vocabulary": VOCABULARY, "draws_per_trial": DRAWS, "rows": rows})


def engines(logits: mx.array) -> dict[str, Callable[[], float]]:
    """Seconds per sample; each is waited for, as in a decode step."""
    sampler, positions = Sampler(Sampling(temperature=0.7, top_p=0.95), seed=0), count()
    theirs, batch = make_sampler(temp=0.7, top_p=0.95), logits[None]

    def per_draw(draw: Callable[[], mx.array]) -> Callable[[], float]:
        return lambda: seconds(lambda: [draw().item() for _ in range(DRAWS)]) / DRAWS

    return {
        "magistral_mlx": per_draw(lambda: sampler.draw(logits, next(positions))),
        "mlx-lm": per_draw(lambda: theirs(batch)),
    }


if __name__ == "__main__":
    main()
