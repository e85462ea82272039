"""Statistics of trials: medians, bounds, pairwise ratios, and the share of the memory-bandwidth ceiling.

Arithmetic on plain numbers. Does not know models or clocks.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

Json: TypeAlias = dict[str, Any]


def ceiling(bandwidth: float, model: Json, context: float) -> float:
    """Tokens per second if decoding only read the weights and the KV cache of a context."""
    return bandwidth / (model["read_bytes_per_token"] + context * model["kv_bytes_per_token"])


def spread(values: Sequence[float]) -> Json:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def lower_bound(values: Sequence[float]) -> float | None:
    """Lower 95 % confidence bound of the median by the sign test: exact for any distribution.

    The k-th smallest value, for the largest k such that fewer than k heads in n coin tosses have probability
    of at most 0.05. None for fewer than five values.
    """
    n, chance, k = len(values), 0.0, 0
    while (chance := chance + math.comb(n, k) / 2**n) <= 0.05:
        k += 1
    return sorted(values)[k - 1] if k else None


def summary(trials: Sequence[Json], limit: Callable[[int], float]) -> Json:
    """Statistics of one engine's trials; `limit(context)` is the ceiling in tokens per second."""

    def row(points: Sequence[Json]) -> Json:
        context: int = points[0]["context"]
        decode = spread([point["decode_tokens_per_second"] for point in points])
        return {
            "context": context,
            "prefill_tokens_per_second": spread([context / p["first_token_seconds"] for p in points]),
            "first_token_seconds": spread([point["first_token_seconds"] for point in points]),
            "decode_tokens_per_second": decode,
            "ceiling_tokens_per_second": limit(context),
            "share_of_ceiling": decode["median"] / limit(context),
            "peak_bytes": max(point["peak_bytes"] for point in points),
        }

    seconds = {key: spread([trial[key] for trial in trials]) for key in ("import_seconds", "load_seconds")}
    contexts = zip(*(trial["points"] for trial in trials), strict=True)
    return {**seconds, "contexts": [row(points) for points in contexts]}


def ratios(ours: Sequence[Json], theirs: Sequence[Json]) -> list[Json]:
    """Ratios of trials that ran next to each other, above 1 where this package is faster."""

    def compared(pairs: Sequence[float]) -> Json:
        return {**spread(pairs), "lower_95": lower_bound(pairs), "pairs": [*pairs]}

    def start(trial: Json) -> float:
        return trial["import_seconds"] + trial["load_seconds"]

    both = list(zip(ours, theirs, strict=True))
    rows = [{"what": "import and load", "context": None} | compared([start(b) / start(a) for a, b in both])]
    for at, point in enumerate(ours[0]["points"]):
        points = [(a["points"][at], b["points"][at]) for a, b in both]
        first = [b["first_token_seconds"] / a["first_token_seconds"] for a, b in points]
        decode = [a["decode_tokens_per_second"] / b["decode_tokens_per_second"] for a, b in points]
        rows.append({"what": "prefill", "context": point["context"]} | compared(first))
        rows.append({"what": "decode", "context": point["context"]} | compared(decode))
    return rows
