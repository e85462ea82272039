"""What does it cost to turn ids into events? Parser and detokenizer over 4000 tokens, in µs per token.

    python benchmarks/text.py [--trials 8]

The real vocabulary (131072 ids, from mistral_common's own file) and a text with reasoning, several scripts
and an answer. `transcript`: detokenizer, parser and stop strings, for every id. `builder`: all of the host's
work for an id, that is the transcript, statistics, limits, and the thinking budget.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks.pairs import TRIALS, in_turn, seconds, write
from magistral_mlx.measure.figures import spread
from magistral_mlx.talk.reply import ReplyBuilder
from magistral_mlx.text.tokenizer import Tokenizer
from magistral_mlx.text.transcript import Transcript
from magistral_mlx.wire import Cost
from tests.tokenizers import full_tekken

TOKENS = 4000
THOUGHT = (
    "Let me see: 48 + 37. First 8 + 7 = 15, write 5, carry 1.\nÇa marche; 東京は夜の七時。 <b>85</b>?\n\n"
)
ANSWER = "The answer is **85**: forty-eight and thirty-seven.\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=TRIALS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = Tokenizer.from_file(full_tekken(Path(directory), "v11"))
    ids = tokenizer.encode(f"<think>\n{70 * THOUGHT}</think>\n{300 * ANSWER}")[:TOKENS]
    assert len(ids) == TOKENS
    found = in_turn({name: way(tokenizer, ids) for name, way in WAYS.items()}, args.trials)
    micros = {name: spread([1e6 * s / TOKENS for s in each]) for name, each in found.items()}
    for name, each in micros.items():
        print(f"{name:10} {each['median']:.2f} µs per token ({each['min']:.2f} to {each['max']:.2f})")
    write("text", {"tokens": TOKENS, "microseconds_per_token": micros})


def transcript(tokenizer: Tokenizer, ids: list[int]) -> Callable[[], float]:
    def run() -> None:
        feed = Transcript(tokenizer).feed
        for token in ids:
            feed(token)

    return lambda: seconds(run)


def builder(tokenizer: Tokenizer, ids: list[int]) -> Callable[[], float]:
    def run() -> None:
        one = ReplyBuilder(
            Transcript(tokenizer),
            tokenizer,
            prompt_ids=(),
            seed=0,
            max_tokens=2 * TOKENS,
            think_budget=TOKENS,
        )
        for token in ids:
            one.add(token, Cost(0.001))
            one.events.clear()

    return lambda: seconds(run)


WAYS = {"transcript": transcript, "builder": builder}

if __name__ == "__main__":
    main()
