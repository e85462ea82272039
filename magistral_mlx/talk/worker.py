"""The one thread that owns a model's arrays, and the queue in front of it.

MLX keeps its streams per thread: an array that is not evaluated yet is unusable in another thread. So a model
is loaded, run and freed here, one short job at a time, in the order of submission, from any thread. Jobs are
single steps, which is why streams that are open together take turns.

Does not know what a job does.
"""

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeAlias, TypeVar

import mlx.core as mx

from magistral_mlx.errors import ClosedError

T = TypeVar("T")
_Queue: TypeAlias = "queue.SimpleQueue[tuple[Pending[Any], Callable[[], Any]] | None]"


class Pending(Future[T]):
    """A job's future, for a thread that Ctrl-C may interrupt at any moment: call `wait`, not `result`.

    `Future.result`, `done` and `add_done_callback` hold a lock in Python code. An interrupt there may leave
    it locked for ever, and block the worker when it sets the result. `wait` blocks in C, and reads the result
    only after the worker has set it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._finished: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.finished = False
        """Whether the job is done, and its result or error is set."""

    def finish(self) -> None:
        """The worker has set the result."""
        self.finished = True
        self._finished.put(None)

    def wait(self) -> T:
        """Block until the job is done; its result. May be called again, also after an interrupt."""
        while not self.finished:
            self._finished.get()
        return self.result()


class Worker:
    """A thread that runs jobs until it is closed, dropped, or the interpreter exits.

    The thread is a daemon that is joined all the same: `weakref.finalize` does so at exit, while the
    interpreter still runs. A non-daemon thread would be joined before that, and block exit for ever; one that
    is not joined dies inside MLX, and crashes the process.
    """

    def __init__(self, name: str) -> None:
        self._jobs: _Queue = queue.SimpleQueue()
        self._lock = threading.Lock()  # so that no job is queued after the end mark, where none would run
        thread = threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True)
        thread.start()
        self.close = weakref.finalize(self, _stop, self._jobs, self._lock, thread)
        """Finish the jobs in the queue and end the thread. May be called again."""

    def submit(self, job: Callable[[], T]) -> "Pending[T]":
        """Queue a job; the future gets what it returns or raises."""
        future: Pending[T] = Pending()
        with self._lock:
            if not self.close.alive:
                raise ClosedError("this model was closed; load it again")
            self._jobs.put((future, job))
        return future

    def run(self, job: Callable[[], T]) -> T:
        """Run a job and wait for it."""
        return self.submit(job).wait()


def _work(jobs: _Queue) -> None:
    while (item := jobs.get()) is not None:
        future, job = item
        if future.set_running_or_notify_cancel():
            try:
                result = job()
            except BaseException as error:  # noqa: BLE001 -- raised again where the result is waited for
                future.set_exception(error)
            else:
                future.set_result(result)
                del result
        future.finish()
        del item, future, job  # nothing is kept alive while waiting for the next
    mx.clear_streams()


def _stop(jobs: _Queue, lock: threading.Lock, thread: threading.Thread) -> None:
    with lock:
        jobs.put(None)
    if thread is not threading.current_thread():  # the last reference may be dropped by a job
        thread.join()
