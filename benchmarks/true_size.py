"""Does the whole decoder work at Magistral's true size? Memory against the plan, logits against mlx-lm's.

    python benchmarks/true_size.py [--keep DIR]

All 40 layers, 5120 wide, 131072 ids, random weights at 4 bit: 13.3 GB, written to a temporary directory (or
to DIR, and kept there). A prompt is prefilled and two ids are decoded, greedily; by us, then by mlx-lm, each
in a separate process. On a CPU it runs in float32, where scales take twice the room: 15 GB, and minutes per
engine, which says nothing about a Mac. Writes `benchmarks/results/true_size.json`.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks.pairs import write
from magistral_mlx.config import MAGISTRAL
from magistral_mlx.convert.plan import plan
from magistral_mlx.convert.recipe import named
from magistral_mlx.decoder.engine import decode, prefill
from magistral_mlx.decoder.sampling import Sampler, Sampling
from magistral_mlx.disk.checkpoint import load, open_checkpoint
from magistral_mlx.measure.trial import exhaust
from magistral_mlx.memory import MemoryPlan, default_dtype, this_machine

PROMPT = [1, 3, 22177]
IDS = 2
ENGINES = ("magistral_mlx", "mlx-lm")


def make(directory: Path) -> None:
    """Write a quantized model, one shard in memory at a time; activations keep their size through layers."""
    planned = plan(MAGISTRAL, named("4bit"), mx.bfloat16)
    for name in planned.heads:
        shard: dict[str, mx.array] = {}
        for seed, entry in enumerate(planned.entries()):
            if entry.file.name == name:
                shard[entry.name] = _random(entry.name, entry.shape, seed)
        mx.save_safetensors(str(directory / name), shard, {"format": "mlx"})
        mx.clear_cache()
    for name, document in planned.documents().items():
        (directory / name).write_bytes(document)


def _random(name: str, shape: tuple[int, ...], seed: int) -> mx.array:
    if name.endswith(".weight") and len(shape) == 2:  # eight 4-bit codes in each
        return mx.random.randint(-(2**31), 2**31 - 1, shape, mx.int32, key=mx.random.key(seed)).view(
            mx.uint32
        )
    if name.endswith("norm.weight"):
        return mx.ones(shape, mx.bfloat16)
    step = 1 / (4.6 * math.sqrt(64 * shape[1]))  # 16 of them around zero, together as wide as their input
    return mx.full(shape, -7.5 * step if name.endswith(".biases") else step, mx.bfloat16)


def ours(directory: Path) -> dict[str, Any]:
    model = load(open_checkpoint(directory), default_dtype())
    loaded, caches, start = mx.get_peak_memory(), model.new_caches(), time.perf_counter()
    logits = exhaust(prefill(model, PROMPT, caches))
    steps = decode(model, logits, caches, sampler=Sampler(Sampling(temperature=0), 0), limit=IDS)
    return _report(loaded, start, logits, [*steps])


def peers(directory: Path) -> dict[str, Any]:
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model: Any = load_model(directory)[0]
    model.set_dtype(default_dtype())
    mx.eval(model.parameters())
    loaded, start = mx.get_peak_memory(), time.perf_counter()
    steps = islice(generate_step(mx.array(PROMPT), model, max_tokens=IDS), IDS)
    found = [(token, logprobs) for token, logprobs in steps]
    return _report(loaded, start, found[0][1], [int(token) for token, _ in found])


def _report(loaded: int, start: float, scores: mx.array, ids: list[int]) -> dict[str, Any]:
    scores = scores.astype(mx.float32)
    return {
        "peak_bytes_of_loading": loaded,
        "peak_bytes": mx.get_peak_memory(),
        "seconds": time.perf_counter() - start,
        "ids": ids,
        "logprobs": (scores - mx.logsumexp(scores)).tolist(),
    }


def run(engine: str, directory: Path) -> dict[str, Any]:
    """Run one engine in a separate process, so that no memory is left in use for the next."""
    command = [sys.executable, __file__, "--engine", engine, "--keep", str(directory)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measured(directory: Path) -> None:
    if not (directory / "config.json").exists():
        print("writing 13.3 GB", flush=True)
        directory.mkdir(parents=True, exist_ok=True)
        make(directory)
    checkpoint = open_checkpoint(directory)
    memory = MemoryPlan(
        config=checkpoint.config,
        weights=checkpoint.nbytes(default_dtype()),
        context=len(PROMPT) + IDS,
        prompt=len(PROMPT),
        machine=this_machine(),
        itemsize=default_dtype().size,
    )
    found = {engine: run(engine, directory) for engine in ENGINES}
    for engine, row in found.items():
        loaded, peak = (row[name] / 1e9 for name in ("peak_bytes_of_loading", "peak_bytes"))
        print(f"{engine:14} {loaded:.2f} GB loaded, {peak:.2f} at its peak, {row['seconds']:.0f} s")
    ours, theirs = (np.array(found[engine].pop("logprobs")) for engine in ENGINES)
    difference = float(np.abs(ours - theirs).max())
    print(f"plan {memory.total / 1e9:.2f} GB; scores differ by {difference:.3g}, of {np.ptp(theirs):.3g}")
    rows = {"engines": found, "planned_bytes": memory.total, "weight_bytes": memory.weights}
    write("true_size", rows | {"greatest_difference": difference, "range": float(np.ptp(theirs))})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=Path, help="where the model is, or is to be, written")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        print(json.dumps((ours if args.engine == ENGINES[0] else peers)(args.keep)))
        return
    with nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory() as place:
        measured(Path(place))


if __name__ == "__main__":
    main()
