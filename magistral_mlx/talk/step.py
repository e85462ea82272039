"""One step of a reply on the model's thread, and what it took: seconds, and memory at its highest.

MLX counts the peak of the whole process. It is counted anew for each step, so that of streams that take turns
each counts its own steps only, with whatever the others held meanwhile. Does not know what a step does.
"""

import time
from collections.abc import Generator
from typing import TypeVar

import mlx.core as mx

from magistral_mlx.wire import Cost

Out = TypeVar("Out")
In = TypeVar("In")


def take(steps: Generator[Out, In, object], sent: In) -> tuple[Out, Cost]:
    """The next step, with `sent` sent into it. For the model's thread, where nothing else runs meanwhile."""
    mx.reset_peak_memory()
    start = time.perf_counter()
    result = steps.send(sent)
    return result, Cost(time.perf_counter() - start, mx.get_peak_memory())
