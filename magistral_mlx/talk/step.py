"""One step of a reply on the model's thread, and its cost: seconds, and peak memory.

MLX tracks the peak of the whole process. It is reset for each step, so that streams that take turns each
count their own steps only, with whatever the others hold meanwhile. Does not know what a step does.
"""

import time
from collections.abc import Generator
from typing import TypeVar

import mlx.core as mx

from magistral_mlx.wire import Cost

Out = TypeVar("Out")
In = TypeVar("In")


def take(steps: Generator[Out, In, object], sent: In) -> tuple[Out, Cost]:
    """Take the next step, with `sent` sent into it. On the model's thread: nothing else runs meanwhile."""
    mx.reset_peak_memory()
    start = time.perf_counter()
    result = steps.send(sent)
    return result, Cost(time.perf_counter() - start, mx.get_peak_memory())
