"""Processes that work for this one and end with it."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.context import BaseContext
from threading import Thread
from typing import Any

MOST_WORKERS = 16
"""Processes or threads that read and decode unless more are asked for; a disk rarely feeds more."""


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


@contextmanager
def process_pool(
    num_workers: int,
    initializer: Callable[..., object],
    initargs: tuple[Any, ...] = (),
    context: BaseContext | None = None,
) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes that an error in the block, or Ctrl-C, ends at once.

    Left to itself, a pool that a signal meets in the middle of handing out a task, or while it is closing, can wait for
    its idle processes for ever.

    Args:
        num_workers: processes.
        initializer: called once in each of them; should leave SIGINT to this process.
        initargs: its arguments.
        context: how processes are started; default: the platform's way.
    """
    others = set(active_children())
    pool = ProcessPoolExecutor(num_workers, context, initializer, initargs)
    try:
        yield pool
    except BaseException:
        for worker in set(active_children()) - others:
            worker.kill()
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()
