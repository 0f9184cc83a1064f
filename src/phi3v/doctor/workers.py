"""Work spread over processes: the same answers in the same order, however many there are.

A tokenizer holds a core and is not safe to share between threads, so each process has its own.
"""

import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from types import TracebackType
from typing import Generic, Self, TypeVar

from ..data.processes import process_pool
from ..errors import CapacityError

TASKS_AHEAD = 4
"""Tasks that wait or lie finished for each process; bounds what a slow first task lets pile up."""

Bench = TypeVar("Bench")
Task = TypeVar("Task")
Answer = TypeVar("Answer")

_bench: object = None
"""What this worker process works with; made once, by its initializer."""


class Workers(Generic[Bench]):
    """Processes that each hold one ``Bench``, made by ``make_bench``; a context manager.

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
