"""How much work does a decode step schedule? Evaluated graph nodes, ours and mlx-lm's.

    python benchmarks/graph_nodes.py

A node is one primitive that MLX schedules: a kernel or a view, and the host's work for it. Counted on the
unchanged loop of each engine: when it passes a step to `mx.async_eval`, the graph is exported
(`mx.export_to_dot`) and its primitives are counted. The model has Magistral's 40 layers, its vocabulary and 4
bits; the width does not change the number of nodes. Counted twice: `cpu`, float32, where norms, RoPE and
attention are many nodes; and `gpu`, bfloat16, where each of them is one node, and what is compiled for a GPU
is compiled. Nothing is timed: the figures do not depend on the machine. Prints a table and writes
`benchmarks/results/graph_nodes.json`.
"""

import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from io import StringIO
from itertools import count, islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import load_model

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from benchmarks.tokens_per_second import MAGISTRAL, make, narrowed  # noqa: E402 -- a script beside this one
from magistral_mlx import memory  # noqa: E402
from magistral_mlx.decoder.engine import decode, prefill  # noqa: E402
from magistral_mlx.decoder.sampling import Sampler, Sampling  # noqa: E402
from magistral_mlx.disk.checkpoint import load, open_checkpoint  # noqa: E402
from magistral_mlx.measure.trial import exhaust  # noqa: E402

OUT = HERE / "results" / "graph_nodes.json"
PROMPT = [1, 7, 9, 4]
SAMPLINGS = {"recommended": Sampling(), "greedy": Sampling(temperature=0)}
STEPS = 4
"""Ids that are decoded before a step is counted: by then the prompt's work is done."""


def ours(directory: Path, sampling: Sampling) -> Iterator[int]:
    model = load(open_checkpoint(directory), memory.default_dtype())
    caches = model.new_caches()
    logits = exhaust(prefill(model, PROMPT, caches))
    yield from decode(model, logits, caches, sampler=Sampler(sampling, 0), limit=STEPS + 2)


def peers(directory: Path, sampling: Sampling) -> Iterator[int]:
    model: Any = load_model(directory)[0]
    sampler = make_sampler(temp=sampling.temperature, top_p=sampling.top_p)
    steps = generate_step(mx.array(PROMPT), model, max_tokens=STEPS + 2, sampler=sampler)
    yield from (token for token, _ in steps)


ENGINES = {"magistral_mlx": ours, "mlx-lm": peers}


def nodes(ids: Iterator[int]) -> Counter[str]:
    """The primitives of the step that an engine had scheduled when it yielded its id number `STEPS`."""
    asked, found, times = mx.async_eval, Counter[str](), count()

    def spy(*arrays: Any) -> None:
        if next(times) == STEPS:  # the first is scheduled before any id is yielded
            found.update(primitives(arrays))
        asked(*arrays)

    with patch.object(mx, "async_eval", spy):
        list(islice(ids, STEPS))
    return found


def primitives(arrays: Any) -> Counter[str]:
    """How often each primitive occurs in a graph that is not evaluated yet."""
    text = StringIO()
    mx.export_to_dot(text, [array for _, array in tree_flatten(arrays) if array is not None])
    # By the line, not by the id: a compiled function has one id for all its uses.
    return Counter(re.findall(r'\[label ="(.*?)", shape=rectangle\]', text.getvalue()))


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Replace norm, RoPE and attention by one node each, and pretend that the device is a GPU.

    Only the graph is right then, not its numbers: each replacement is some one node with the same inputs.
    """

    def attention(queries: mx.array, keys: mx.array, values: mx.array, **_: Any) -> mx.array:
        return mx.depends(queries, [keys, values])

    def bounded(x: mx.array, *_: Any, **__: Any) -> mx.array:
        return mx.tanh(x)

    with ExitStack() as stack:
        for place, name, stand_in in (
            (mx.fast, "rms_norm", bounded),
            (mx.fast, "rope", bounded),
            (mx.fast, "scaled_dot_product_attention", attention),
            (mx, "default_device", lambda: mx.Device(mx.gpu)),
        ):
            stack.enter_context(patch.object(place, name, stand_in))
        yield


def counted(device: str, vocabulary: int = MAGISTRAL.vocab_size) -> list[dict[str, Any]]:
    """One row for each sampling: the nodes of each engine, their ratio, and which they are."""
    config = replace(narrowed(MAGISTRAL, 1), vocab_size=vocabulary)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place, as_on_gpu() if device == "gpu" else nullcontext():
        directory = make(Path(place), config, memory.default_dtype())
        for name, sampling in SAMPLINGS.items():
            found = {engine: nodes(run(directory, sampling)) for engine, run in ENGINES.items()}
            total = {engine: names.total() for engine, names in found.items()}
            rows.append(
                {"as_on": device, "sampling": name, "nodes": total}
                | {"ratio": total["magistral_mlx"] / total["mlx-lm"]}
                | {"primitives": {engine: dict(names.most_common()) for engine, names in found.items()}}
            )
    return rows


def main() -> None:
    rows = counted("cpu") + counted("gpu")
    print(f"{'as on':6} {'sampling':12} {'magistral_mlx':>13} {'mlx-lm':>7} {'ratio':>6}")
    for row in rows:
        ours, theirs = row["nodes"].values()
        print(f"{row['as_on']:6} {row['sampling']:12} {ours:13} {theirs:7} {row['ratio']:6.2f}")
    OUT.write_text(
        json.dumps({"layers": MAGISTRAL.n_layers, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
