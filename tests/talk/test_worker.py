"""Jobs on the model's thread: every one is run or refused, even while the thread ends."""

import queue
import threading
from typing import Any

import pytest

from magistral_mlx import ClosedError
from magistral_mlx.talk.worker import Worker


def test_job_submitted_during_close_is_run_or_refused():
    """Between the check that the worker is open and the queueing, another thread starts to close it."""
    worker = Worker("short-lived")
    closing = threading.Thread(target=worker.close)
    jobs = worker._jobs

    class Slow(queue.SimpleQueue[Any]):
        def put(self, item: Any, *_: Any) -> None:
            closing.start()
            closing.join(0.05)
            jobs.put(item)

    worker._jobs = Slow()
    job = worker.submit(lambda: 7)
    closing.join()
    assert job.finished
    assert job.wait() == 7
    with pytest.raises(ClosedError):
        worker.submit(lambda: 7)
