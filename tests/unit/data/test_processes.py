"""A pool of processes ends when its work fails, however busy it is."""

import signal
import time
from multiprocessing import active_children

import pytest

from phi3v.data.processes import is_worker, leave_signals_to_parent, process_pool


def test_an_error_ends_busy_processes_at_once() -> None:
    before = set(active_children())
    started = time.monotonic()
    with pytest.raises(ZeroDivisionError), process_pool(2, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        for _ in range(8):
            pool.submit(time.sleep, 30)
        while len(set(active_children()) - before) < 2:
            time.sleep(0.01)
        raise ZeroDivisionError
    assert set(active_children()) <= before
    assert time.monotonic() - started < 10


def test_a_spawned_process_does_not_wait_for_a_model_that_it_does_not_need() -> None:
    question = "{name: name in __import__('sys').modules for name in ('phi3v', 'torch', 'transformers', 'peft')}"
    with process_pool(1, leave_signals_to_parent, (0,), is_spawned=True) as pool:
        loaded = pool.submit(eval, question).result()
    assert loaded == {"phi3v": True, "torch": False, "transformers": False, "peft": False}
    assert not is_worker()


def test_work_that_ends_well_is_waited_for() -> None:
    with process_pool(2, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        results = [pool.submit(pow, 2, power) for power in range(5)]
    assert [result.result() for result in results] == [1, 2, 4, 8, 16]
