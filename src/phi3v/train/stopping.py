"""A run that is asked to stop: it finishes its step, saves, and can go on later.

Schedulers ask by SIGTERM, or by a signal of the user's choice such as SIGUSR1 some time before the limit. It may reach
one process of many, or one process twice (from the scheduler, and passed on by torchrun), and processes that prepare
samples too.
"""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

AT_ONCE_AFTER_S = 5.0
"""A signal so long after the first one is a second request; a nearer one is the first, passed on by somebody."""


class Stop:
    """Notes, within a ``with``, that this process is asked to stop; a second request ends it at once.

    Args:
        speaks: say so on standard error.

    Attributes:
        is_asked: whether this process was asked.
        is_agreed: whether all processes know that one was; whoever made them agree sets it.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.is_agreed = False
        self._speaks = speaks
        self._pid = os.getpid()
        self._asked_s: float | None = None
        self._previous: dict[int, Any] = {}

    @property
    def is_asked(self) -> bool:
        return self._asked_s is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._previous = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a loader's worker that has just been forked: its signals are this run's business, not its own
        now = time.monotonic()
        if self._asked_s is None:
            self._asked_s = now
            if self._speaks:
                # Not print: the signal may have come in the middle of one.
                text = f"\n{signal.Signals(number).name}: the run stops after this step, with a checkpoint.\n"
                os.write(2, text.encode())
        elif now - self._asked_s >= AT_ONCE_AFTER_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(self._pid, number)
