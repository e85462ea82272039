"""What the benchmarks share: engines timed in turn, their ratio pair by pair, and a report as JSON.

Each benchmark is one question and writes `results/<question>.json`: what it ran on, and its rows.
"""

import gc
import json
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from magistral_mlx.measure.figures import Json, lower_bound, spread
from magistral_mlx.measure.machine import this_computer

K = TypeVar("K")
T = TypeVar("T")
RESULTS = Path(__file__).parent / "results"
TRIALS = 8
"""The second smallest of eight is a 95 % lower bound of the median; of five it is the smallest."""


def seconds(run: Callable[[], Any]) -> float:
    gc.collect()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turn(engines: Mapping[K, Callable[[], T]], trials: int) -> dict[K, list[T]]:
    """One figure of each engine per round, so that pairs see the same machine state. The first warms up."""
    found: dict[K, list[T]] = {name: [] for name in engines}
    for trial in range(trials + 1):
        for name, measure in engines.items():
            figure = measure()
            if trial:
                found[name].append(figure)
    return found


def ratio(above: list[float], below: list[float]) -> Json:
    """Pair by pair, with the lower 95 % bound of the median."""
    pairs = [a / b for a, b in zip(above, below, strict=True)]
    return {**spread(pairs), "lower_95": lower_bound(pairs), "pairs": pairs}


def as_text(found: Json) -> str:
    """A ratio as text."""
    bound = "" if found["lower_95"] is None else f", with 95 % confidence at least {found['lower_95']:.2f}"
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f}{bound})"


def write(question: str, rows: Json) -> None:
    """`results/<question>.json`, with the machine and the versions it was run on."""
    computer = this_computer()
    report = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": {"chip": computer.chip, "cores": computer.cores, "memory_bytes": computer.memory_bytes},
        "versions": {name: metadata.version(name) for name in ("magistral_mlx", "mlx", "mlx-lm")},
    }
    path = RESULTS / f"{question}.json"
    path.write_text(json.dumps(report | rows, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
