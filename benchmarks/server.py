"""What does the server cost on top of the library, and what does prefix reuse gain?

    python benchmarks/server.py [--tokens 1000] [--trials 7] [--prefix 2000] [--prompts 5]

**Per token**: a model of one layer that generates "a" for ever, so that next to nothing is computed and only
the way from the model to the reader is measured. In turn: the library in a `for` loop, in an `async for`
loop, and a server in a separate process, read through a plain socket. From the first piece to the last.

**First token**: the demo model behind a server; new prompts of `--prefix` ids, and each again with another
question after the same prefix. From the request to its first piece of text.

Writes `benchmarks/results/server.json`.
"""

import argparse
import asyncio
import json
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
from rich.console import Console
from rich.table import Table

from magistral_mlx import Magistral, Sampling
from magistral_mlx.config import ModelConfig
from magistral_mlx.fetch.hub import DEMO
from magistral_mlx.text.tokenizer import Tokenizer

HERE = Path(__file__).parent
QUESTION = "What is 48 + 37?"
PIECE = re.compile(rb'"delta": \{"(reasoning|content": "[^"])')
GREEDY = Sampling(temperature=0)


def write_parrot(directory: Path) -> Path:
    """A checkpoint that always predicts "a", with the demo's tokenizer."""
    tokenizer = Tokenizer.from_directory(DEMO)
    [a] = tokenizer.encode("a")
    config = ModelConfig(
        dim=32,
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        head_dim=32,
        hidden_dim=32,
        vocab_size=tokenizer.vocab_size,
        norm_eps=1e-5,
        rope_theta=1e4,
        max_context=32768,
    )
    weights = {f"{path}.weight": mx.zeros(shape) for path, shape in config.matrices()}
    weights |= {name: mx.ones(config.dim) for name in config.vectors()}
    weights["model.embed_tokens.weight"] = mx.ones((config.vocab_size, config.dim))
    weights["lm_head.weight"][a] = 1.0
    (directory / "config.json").write_text(json.dumps(config.to_json()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights)
    for name in ("tekken.json", "SYSTEM_PROMPT.txt"):
        (directory / name).write_bytes((DEMO / name).read_bytes())
    return directory


@contextmanager
def server(model: str, *options: str) -> Iterator[int]:
    """Run `magistral-mlx serve` in a separate process; yields its port."""
    command = [sys.executable, "-m", "magistral_mlx", "serve", "--model", model, "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            yield int(line.partition("http://127.0.0.1:")[2].split()[0])
        finally:
            process.terminate()


def pieces(port: int, body: dict) -> Iterator[float]:
    """The time at which each piece of text arrived."""
    data = json.dumps(body | {"stream": True, "temperature": 0}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port)) as line, line.makefile("rb") as answer:
        line.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        for event in answer:
            if PIECE.search(event):
                yield time.perf_counter()
            if b"[DONE]" in event:
                return


def per_token(times: list[float]) -> float:
    """Microseconds."""
    return (times[-1] - times[0]) / (len(times) - 1) * 1e6


def measure_tokens(tokens: int, trials: int) -> dict:
    """Median microseconds per token of each of the three, and what the server adds."""
    with tempfile.TemporaryDirectory() as directory:
        name = str(write_parrot(Path(directory)))
        with Magistral.load(name) as model, server(name) as port:

            def stream():  # noqa: ANN202
                return model.stream(QUESTION, sampling=GREEDY, max_tokens=tokens)

            def plain() -> list[float]:
                with stream() as said:
                    return [time.perf_counter() for event in said if getattr(event, "text", "")]

            async def asynchronous() -> list[float]:
                async with stream() as said:
                    return [time.perf_counter() async for event in said if getattr(event, "text", "")]

            def served() -> list[float]:
                body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": tokens}
                return list(pieces(port, body))

            ways: dict[str, Callable[[], list[float]]] = {
                "library, for": plain,
                "library, async for": lambda: asyncio.run(asynchronous()),
                "server": served,
            }
            found: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(trials):
                for way, run in ways.items():
                    times = run()
                    assert len(times) == tokens, (way, len(times))
                    found[way].append(per_token(times))
    medians = {way: statistics.median(each) for way, each in found.items()}
    return {
        "microseconds_per_token": {way: round(value, 1) for way, value in medians.items()},
        "all": {way: [round(value, 1) for value in each] for way, each in found.items()},
        "overhead_over_for": round(medians["server"] - medians["library, for"], 1),
        "overhead_over_async_for": round(medians["server"] - medians["library, async for"], 1),
    }


def measure_first(prefix: int, prompts: int) -> dict:
    """Median seconds to the first piece, of a new prompt and of one with the same prefix."""
    tokenizer = Tokenizer.from_directory(DEMO)
    new, again = list[float](), list[float]()
    with server("demo", "--prefix-cache", "1GB") as port:
        list(pieces(port, {"messages": [{"role": "user", "content": QUESTION}]}))  # compiled once
        for at in range(prompts):
            numbers = iter(range(1000 * (at + 1), 10**6))
            text = ""
            while len(tokenizer.encode(text)) < prefix:
                text += f"{next(numbers)} "
            for seconds, question in ((new, QUESTION), (again, "What is 12 + 5?")):
                body = {"messages": [{"role": "user", "content": f"{text}\n{question}"}], "max_tokens": 16}
                start = time.perf_counter()
                seconds.append(next(iter(list(pieces(port, body)))) - start)
    a, b = statistics.median(new), statistics.median(again)
    return {
        "prefix_tokens": prefix,
        "new_seconds": round(a, 4),
        "again_seconds": round(b, 4),
        "ratio": round(b / a, 3),
        "all": {"new": [round(s, 4) for s in new], "again": [round(s, 4) for s in again]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1000, help="of each stream")
    parser.add_argument("--trials", type=int, default=7, help="of each way, in turn")
    parser.add_argument("--prefix", type=int, default=2000, help="ids that two prompts have in common")
    parser.add_argument("--prompts", type=int, default=5)
    args = parser.parse_args()
    tokens = measure_tokens(args.tokens, args.trials)
    first = measure_first(args.prefix, args.prompts)
    table = Table("what", "figure")
    for way, value in tokens["microseconds_per_token"].items():
        table.add_row(way, f"{value} µs a token")
    table.add_row("server over the library's for", f"{tokens['overhead_over_for']} µs a token")
    table.add_row("first token, new prompt", f"{first['new_seconds']} s")
    table.add_row("first token, same beginning", f"{first['again_seconds']} s")
    table.add_row("ratio", f"{first['ratio']}")
    Console().print(table)
    out = HERE / "results" / "server.json"
    out.parent.mkdir(exist_ok=True)
    machine = f"{platform.system()} {platform.machine()}, {mx.default_device()}"
    report = {"machine": machine, "run": vars(args), "per_token": tokens, "first_token": first}
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
