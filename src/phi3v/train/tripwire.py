"""What counts as a spike: a loss or gradient norm far above those of the steps before it."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

WARM_UP_STEPS = 50
"""Steps that are looked at before the first can be a spike."""

RECENT_STEPS = 200
"""Steps that a new one is compared with. As long as the early fall of the loss is among them, only more than that is a
spike."""

SPREADS = 8.0
"""A spike lies so many spreads above the median of the recent steps. A spread is 1.4826 times the median distance from
the median: the standard deviation, if the noise is normal."""

LARGEST_TIMES = 3.0
"""A spike lies so many times as far above the median as any recent step: noise with a long tail, or data of which a
tenth is hard, makes no false alarm."""

LEAST_NATS = 0.1
LEAST_SHARE = 0.2
"""A loss spike is at least so many nats, and such a share of the median, above it."""

LEAST_NORM_TIMES = 10.0
"""A spike of the gradient's norm is at least so many times the median."""


class Range(NamedTuple):
    """What was expected of a step: the median of the recent steps, and the highest value that is no spike."""

    median: float
    limit: float


class Spike(NamedTuple):
    """A step beyond what was expected; a range is None where the value was within it.

    Attributes:
        loss: nats per answer token.
        grad_norm: L2 norm before clipping.
        loss_range: what was expected of the loss.
        norm_range: what was expected of the norm.
    """

    loss: float
    grad_norm: float
    loss_range: Range | None
    norm_range: Range | None

    def __str__(self) -> str:
        found = []
        if self.loss_range is not None:
            found.append(_described("the loss", self.loss, self.loss_range))
        if self.norm_range is not None:
            found.append(_described("the gradient's norm", self.grad_norm, self.norm_range))
        return " and ".join(found)


class Baseline:
    """The recent values of a noisy quantity, and how high the next one may be.

    A spike enters the record as the limit that it broke. So a lasting change of level is reported a few times, each
    limit higher than the last, and then is the level.

    Args:
        least_excess: of a median, how far above it no value is a spike.

    >>> baseline = Baseline(least_excess=lambda median: 0.1)
    >>> [baseline.see(1 + 0.01 * (number % 3)) for number in range(60)] == [None] * 60
    True
    >>> baseline.see(1.05), baseline.see(4.0)
    (None, Range(median=1.01, limit=1.13))
    """

    def __init__(self, least_excess: Callable[[float], float]) -> None:
        self._least_excess = least_excess
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)

    def see(self, value: float) -> Range | None:
        """Takes in the next value; returns what was expected if the value is a spike."""
        expected = self._expected()
        if expected is None or value <= expected.limit:
            self._recent.append(value)
            return None
        self._recent.append(expected.limit)
        return expected

    def _expected(self) -> Range | None:
        if len(self._recent) < WARM_UP_STEPS:
            return None
        median = statistics.median(self._recent)
        spread = 1.4826 * statistics.median(abs(value - median) for value in self._recent)
        excess = max(SPREADS * spread, LARGEST_TIMES * (max(self._recent) - median), self._least_excess(median))
        return Range(round(median, 6), round(median + excess, 6))


class Tripwire:
    """Looks at every step's loss and gradient norm. Norms vary by factors, so their logarithms are compared.

    Its state follows from the steps that it saw, so a resumed run looks at those of the log first. A run that logs
    means over several steps warms up again.
    """

    def __init__(self, log_history: Iterable[Mapping[str, Any]] = ()) -> None:
        self._losses = Baseline(lambda median: max(LEAST_NATS, LEAST_SHARE * abs(median)))
        self._norms = Baseline(lambda median: math.log(LEAST_NORM_TIMES))
        last_step = 0
        for entry in log_history:
            if "loss" in entry:
                if entry["step"] == last_step + 1:
                    self.see(entry["loss"], entry.get("grad_norm") or 0.0)
                last_step = entry["step"]

    def see(self, loss: float, grad_norm: float) -> Spike | None:
        """Takes in a step; returns what is wrong with it, if anything is. What is not finite is left aside."""
        loss_range = self._losses.see(loss) if math.isfinite(loss) else None
        norm_range = None
        if math.isfinite(grad_norm) and grad_norm > 0:
            of_logarithm = self._norms.see(math.log(grad_norm))
            norm_range = of_logarithm and Range(*(round(math.exp(value), 6) for value in of_logarithm))
        if loss_range is None and norm_range is None:
            return None
        return Spike(loss, grad_norm, loss_range, norm_range)


def _described(name: str, value: float, expected: Range) -> str:
    return f"{name} is {value:.4g}, where at most {expected.limit:.4g} was expected (median {expected.median:.4g})"
