"""Processes that work for this one and end with it."""

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from multiprocessing import active_children, current_process, get_start_method
from multiprocessing.context import SpawnContext, SpawnProcess
from threading import Thread
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from ..errors import CapacityError

MOST_WORKERS = 16
"""Processes or threads that read and decode unless more are asked for; a disk rarely feeds more."""

TASKS_AHEAD = 4
"""Tasks that wait or lie finished for each of ``Workers``; bounds what a slow first task lets pile up."""

_WORKER_NAME = "phi3v-worker"

Bench = TypeVar("Bench")
Task = TypeVar("Task")
Answer = TypeVar("Answer")

_bench: object = None
"""What this worker process works with; made once, by its initializer."""


def default_num_workers() -> int:
    """Returns the number of cores that this process may use, ``MOST_WORKERS`` at most."""
    num_cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(MOST_WORKERS, num_cores)


def leave_signals_to_parent(worker_number: int) -> None:
    """Makes a data loader's worker go on when a signal asks the run to stop; its parent ends it when it is done.

    A scheduler or torchrun signals every process of a group, and a run that is to finish its step needs its data.
    SIGTERM from the parent itself still ends the worker. Elsewhere than on Linux nobody says who sent it.

    Args:
        worker_number: given by the data loader, not used.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    while sys.platform == "linux":
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
            os._exit(0)


def is_worker() -> bool:
    """Whether this is a spawned process of ``process_pool``; known before anything is imported for its work."""
    return current_process().name.startswith(_WORKER_NAME)


class _Worker(SpawnProcess):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.name = f"{_WORKER_NAME}-{self.name}"


class _WorkerContext(SpawnContext):
    Process = _Worker


@contextmanager
def process_pool(
    num_workers: int,
    initializer: Callable[..., object],
    initargs: tuple[Any, ...] = (),
    is_spawned: bool = False,
) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes that an error in the block, or Ctrl-C, ends at once.

    Left to itself, a pool that a signal meets in the middle of handing out a task, or while it is closing, can wait for
    its idle processes for ever.

    Args:
        num_workers: processes.
        initializer: called once in each of them; should leave SIGINT to this process.
        initargs: its arguments.
        is_spawned: whether processes start from nothing, which other threads of this one do not disturb; else the
            platform's way.
    """
    others = set(active_children())
    context = _WorkerContext() if is_spawned or get_start_method() == "spawn" else None
    pool = ProcessPoolExecutor(num_workers, context, initializer, initargs)
    try:
        yield pool
    except BaseException:
        for worker in set(active_children()) - others:
            worker.kill()
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


class Workers(Generic[Bench]):
    """Processes that each hold one ``Bench``, made by ``make_bench``: the same answers in the same order, however many.

    A context manager. A tokenizer, for instance, holds a core and is not safe to share between threads, so each process
    has its own.

    Args:
        num_workers: processes; with 1 everything happens in this one.
        make_bench: called once in every process with ``arguments``; both must survive pickling.
        arguments: of ``make_bench``.
    """

    def __init__(self, num_workers: int, make_bench: Callable[..., Bench], *arguments: object) -> None:
        self._num_workers = num_workers
        self._make_bench = make_bench
        self._arguments = arguments
        self._own: Bench | None = None
        self._pool: ProcessPoolExecutor | None = None
        self._ending = ExitStack()

    def __enter__(self) -> Self:
        if self._num_workers == 1:
            self._own = self._make_bench(*self._arguments)
        else:
            pool = process_pool(self._num_workers, _start_worker, (self._make_bench, self._arguments))
            self._pool = self._ending.enter_context(pool)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the processes."""
        self._ending.__exit__(kind, error, trace)

    def map(self, work: Callable[[Bench, Task], Answer], tasks: Iterable[Task]) -> Iterator[Answer]:
        """Yields ``work(bench, task)`` for every task, in the order of the tasks.

        Raises:
            CapacityError: a process was killed.
        """
        if self._own is not None:
            for task in tasks:
                yield work(self._own, task)
            return
        assert self._pool is not None, "Workers is a context manager"
        ahead: deque[Future[Answer]] = deque()
        try:
            for task in tasks:
                ahead.append(self._pool.submit(_work, work, task))
                if len(ahead) > TASKS_AHEAD * self._num_workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BrokenProcessPool as error:
            raise CapacityError(
                "a worker process was killed, most likely for want of memory. Set num_workers to a smaller number."
            ) from error


def _start_worker(make_bench: Callable[..., object], arguments: tuple[object, ...]) -> None:
    global _bench
    # Ctrl-C reaches every process of the terminal; the parent alone decides, and its workers leave no tracebacks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _bench = make_bench(*arguments)


def _work(work: Callable[..., Answer], task: object) -> Answer:
    return work(_bench, task)
