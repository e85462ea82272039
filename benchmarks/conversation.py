"""How soon does the tenth answer of a conversation begin, with and without prefix reuse?

    python benchmarks/conversation.py [--turns 10] [--repeats 3] [--context 3000]

Two models: the demo, whose context is 4096 tokens, and a random one of four layers with a long text in its
first message. The same ten turns; then the last prompt again from an empty cache. Both times are the reply's
own `first_token_seconds`. Writes `benchmarks/results/conversation.json`.
"""

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from magistral_mlx import Magistral, Sampling
from magistral_mlx.config import ModelConfig
from magistral_mlx.disk.checkpoint import Checkpoint, load, open_checkpoint
from magistral_mlx.fetch.hub import DEMO
from magistral_mlx.talk.worker import Worker
from magistral_mlx.text.tokenizer import Tokenizer

HERE = Path(__file__).parent
GREEDY = Sampling(temperature=0)


def random_model(directory: Path, context: int) -> Magistral:
    """The demo's tokenizer with random weights, and a longer context than the demo's."""
    tokenizer = Tokenizer.from_directory(DEMO)
    config = ModelConfig(
        dim=256,
        n_layers=4,
        n_heads=8,
        n_kv_heads=2,
        head_dim=32,
        hidden_dim=1024,
        vocab_size=tokenizer.vocab_size,
        norm_eps=1e-5,
        rope_theta=1e9,
        max_context=2 * context + 4096,
    )
    rng = np.random.default_rng(0)
    weights = {
        f"{path}.weight": mx.array(rng.normal(size=shape).astype(np.float32) * shape[1] ** -0.5)
        for path, shape in config.matrices()
    }
    weights |= {name: mx.ones(config.dim) for name in config.vectors()}
    (directory / "config.json").write_text(json.dumps(config.to_json()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights)
    checkpoint: Checkpoint = open_checkpoint(directory)
    worker = Worker("random")
    return Magistral(checkpoint, tokenizer, worker, worker.run(lambda: load(checkpoint, mx.float32)))


def measure(model: Magistral, label: str, first: str, turns: int, repeats: int) -> dict:
    """Median seconds to the first id of the last turn, with prefix reuse and without."""
    reused, fresh = list[float](), list[float]()
    for _ in range(repeats):
        talk = model.conversation(sampling=GREEDY, max_tokens=40, think_budget=10)
        for turn in range(turns):
            reply = talk.ask(first if turn == 0 else f"What is {40 + turn} + 37?")
        again = model.stream_ids(reply.prompt_ids, sampling=GREEDY, max_tokens=1, seed=0)
        assert next(iter(again.drain().token_ids)) == reply.token_ids[0]
        assert again.reply.stats.cached_tokens == 0
        reused.append(reply.stats.first_token_seconds)
        fresh.append(again.reply.stats.first_token_seconds)
    a, b = statistics.median(reused), statistics.median(fresh)
    return {
        "model": label,
        "turns": turns,
        "prompt_tokens": reply.stats.prompt_tokens,
        "read_again": reply.stats.prompt_tokens - reply.stats.cached_tokens,
        "reused_seconds": round(a, 4),
        "fresh_seconds": round(b, 4),
        "times_sooner": round(b / a, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--context", type=int, default=3000, help="numbers in the first message")
    args = parser.parse_args()
    with Magistral.load("demo") as demo:
        rows = [measure(demo, "demo", "What is 48 + 37?", args.turns, args.repeats)]
    with tempfile.TemporaryDirectory() as directory, random_model(Path(directory), args.context) as model:
        text = " ".join(map(str, range(100, 100 + args.context // 4)))
        rows.append(measure(model, "random, 4 layers", text, args.turns, args.repeats))
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    out = HERE / "results" / "conversation.json"
    out.parent.mkdir(exist_ok=True)
    machine = f"{platform.system()} {platform.machine()}, {mx.default_device()}"
    out.write_text(json.dumps({"machine": machine, "run": vars(args), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
