"""How long until the first token? In a new process: imports, load, first token; ours and mlx-lm's in turn.

    python benchmarks/cold_start.py [--trials 8]

The demo model at 4 bits, the same question and sampling, each library's Python API: `Magistral.load` and
`stream`, `mlx_lm.load` and `stream_generate`. Then the parts of ours: Python itself, imports, tokenizer,
weights and first token, one after another (normally the tokenizer loads while the weights do). The first
trial, which warms the page cache, is not counted.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks.pairs import TRIALS, as_text, in_turn, ratio, write
from magistral_mlx.measure.bench import resolved_model
from magistral_mlx.measure.figures import spread

OURS = """
from magistral_mlx import Magistral
model = Magistral.load(PLACE)
with model.stream(QUESTION, seed=0) as stream:
    next(stream)
tell("first token")
"""
PEERS = """
from mlx_lm import load, stream_generate
from mlx_lm.sample_utils import make_sampler
model, tokenizer = load(PLACE)
messages = [{"role": "user", "content": QUESTION}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
next(stream_generate(model, tokenizer, prompt, sampler=make_sampler(temp=0.7, top_p=0.95)))
tell("first token")
"""
APART = """
tell("Python")
import mlx.core
tell("import mlx")
import mistral_common.protocol.instruct.request, mistral_common.tokens.tokenizers.mistral
tell("import mistral_common")
from magistral_mlx import chat, memory
from magistral_mlx.disk import checkpoint
from magistral_mlx.fetch import hub
from magistral_mlx.text import tokenizer
from magistral_mlx.talk.worker import Worker
tell("import magistral_mlx")
found = hub.resolve(PLACE)
words = tokenizer.Tokenizer.from_directory(found.tokenizer)
words.detokenizer()
tell("tokenizer")
worker, opened = Worker("cold"), checkpoint.open_checkpoint(found.weights)
weights = worker.run(lambda: checkpoint.load(opened, memory.default_dtype()))
model = chat.Magistral(opened, words, worker, weights)
tell("weights")
with model.stream(QUESTION, seed=0) as stream:
    next(stream)
tell("first token")
"""
HEAD = """
import json, sys, time
PLACE, QUESTION = sys.argv[1:]
def tell(what): print(json.dumps([what, time.time()]), flush=True)
"""
QUESTION = "What is 48 + 37?"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=TRIALS)
    args = parser.parse_args()
    with resolved_model("demo") as (place, _):
        ways = {"magistral_mlx": OURS, "mlx-lm": PEERS}
        found = in_turn(
            {name: lambda code=code: phases(code, place)["first token"] for name, code in ways.items()},
            args.trials,
        )
        apart = [phases(APART, place) for _ in range(args.trials)]
    faster = ratio(found["mlx-lm"], found["magistral_mlx"])
    whole = {name: spread(each) for name, each in found.items()}
    for name, each in whole.items():
        print(f"{name}: {each['median']:.2f} s to the first token ({each['min']:.2f} to {each['max']:.2f})")
    print(f"times as fast: {as_text(faster)}")
    parts = {name: statistics.median(each[name] for each in apart) for name in apart[0]}
    print("apart: " + ", ".join(f"{name} {each:.2f} s" for name, each in parts.items()))
    write("cold_start", {"seconds": whole, "times_as_fast": faster, "seconds_apart": parts})


def phases(code: str, place: str) -> dict[str, float]:
    """Seconds of each phase that a new process reports, from the report before it, or from its start."""
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-c", HEAD + code, place, QUESTION], capture_output=True, text=True, check=True
    )
    lines: list[tuple[str, float]] = [json.loads(line) for line in done.stdout.splitlines()]
    moments = [start, *(moment for _, moment in lines)]
    return {name: after - before for (name, after), before in zip(lines, moments[:-1], strict=True)}


if __name__ == "__main__":
    main()
