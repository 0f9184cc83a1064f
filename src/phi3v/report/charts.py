"""From series of numbers to the geometry of small line charts. Drawing them is the report template's.

Positions are in the user units of an SVG of ``WIDTH`` x ``HEIGHT``, y downwards. A value of None is a gap.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

WIDTH, HEIGHT = 400, 236
LEFT, RIGHT, TOP, BOTTOM = 50, 386, 14, 194
"""The plot's box; tick labels and the x axis' title stand outside it."""

MOST_POINTS = 400
"""A series with more is drawn as one mean per bin of neighbours, with a lowest-to-highest stroke when smoothed."""

SMALLEST_SPAN = 5.0
"""Percentage points that a chart of scores spans at least."""

LOG_FROM_RATIO = 100
"""Where a log axis is allowed, it is used from this ratio of highest to lowest value up."""

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Value = float | None


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on an axis: its position in user units, and what it says."""

    position: float
    label: str


@dataclass(frozen=True, slots=True)
class Marker:
    """A single measured point, with its interval's ends when it has one; y in user units."""

    x: float
    y: float
    low_y: float | None
    high_y: float | None
    label: str


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart, ready to draw.

    Attributes:
        title: what is shown.
        unit: the y axis' unit, scale factor included.
        x_title: the x axis' title.
        x_ticks: marks along the x axis.
        y_ticks: marks along the y axis.
        raw: SVG path of the values as logged, or of each bin's range; empty for a series that is not smoothed.
        line: SVG path of the smoothed values.
        markers: single points.
        description: the chart in words, for those who do not see it.
        note: how the line was made; may be empty.
    """

    title: str
    unit: str
    x_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    raw: str
    line: str
    markers: tuple[Marker, ...]
    description: str
    note: str


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with the ends of its interval, None when unknown."""

    value: float
    low: Value = None
    high: Value = None


@dataclass(frozen=True, slots=True)
class _Scale:
    """Maps values from ``low`` to ``high`` onto positions from ``start`` to ``stop``."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return round(self.start + (value - low) / (high - low) * (self.stop - self.start), 1)


def curve(
    title: str,
    unit: str,
    steps: Sequence[int],
    values: Sequence[Value],
    *,
    from_zero: bool,
    smooth: bool = False,
    may_use_log: bool = False,
) -> Chart | None:
    """Lays out a value logged at many steps; None when no value is a number.

    Args:
        title: what is shown.
        unit: of the values; may be empty.
        steps: rising.
        values: one a step.
        from_zero: whether the y axis must start at 0.
        smooth: whether to draw the values faintly and their moving average over them.
        may_use_log: whether values that span more than ``LOG_FROM_RATIO`` get a log axis.
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    window = _smoothing_window(len(values)) if smooth else 1
    smoothed = moving_average(values, window)
    is_log = may_use_log and min(known) > 0 and max(known) / min(known) >= LOG_FROM_RATIO
    y_values = log_ticks(min(known), max(known)) if is_log else _covering_ticks(known, from_zero=from_zero)
    factor, labels = tick_labels(y_values)
    x_scale = _x_scale(steps)
    y_scale = _Scale(y_values[0], y_values[-1], BOTTOM, TOP, is_log)
    is_binned = len(values) > MOST_POINTS
    line_steps, line_values = _bin_means(steps, smoothed) if is_binned else (list(steps), smoothed)
    raw = ""
    if window > 1:
        ranges = _ranges_path(_bin_ranges(steps, values), x_scale, y_scale)
        raw = ranges if is_binned else _line_path(steps, values, x_scale, y_scale)
    first, last = _first_known(smoothed), _first_known(smoothed[::-1])
    trend = (
        f"{title}: from {first:.3g} at step {steps[0]:,} to {last:.3g} at step {steps[-1]:,}; "
        f"lowest {min(known):.3g}, highest {max(known):.3g}{f' {unit}' if unit else ''}."
    )
    return Chart(
        title=title,
        unit=_unit_with_factor(unit, factor, is_log),
        x_title="optimizer step",
        x_ticks=_x_ticks(steps, x_scale),
        y_ticks=tuple(Tick(y_scale(value), label) for value, label in zip(y_values, labels, strict=True)),
        raw=raw,
        line=_line_path(line_steps, line_values, x_scale, y_scale),
        markers=(Marker(x_scale(steps[0]), y_scale(known[0]), None, None, f"{known[0]:.4g}"),)
        if len(steps) == 1
        else (),
        description=trend,
        note=_line_note(window, is_binned),
    )


def scores(title: str, steps: Sequence[int], intervals: Sequence[Interval]) -> Chart | None:
    """Lays out few scores in percent with their intervals, joined by a line; None when there are none.

    Args:
        title: what is shown.
        steps: rising.
        intervals: one a step, 0 to 100.
    """
    if not intervals:
        return None
    ends = [end for point in intervals for end in (point.value, point.low, point.high) if end is not None]
    missing = SMALLEST_SPAN - (max(ends) - min(ends))
    if missing > 0:
        # Scores that hardly differ must not look as if they did.
        low = min(max(0.0, min(ends) - missing / 2), 100.0 - SMALLEST_SPAN)
        ends = [low, low + SMALLEST_SPAN]
    y_values = _covering_ticks(ends, from_zero=False)
    _, labels = tick_labels(y_values)
    x_scale = _x_scale(steps)
    y_scale = _Scale(y_values[0], y_values[-1], BOTTOM, TOP)
    markers = tuple(
        Marker(
            x_scale(step),
            y_scale(point.value),
            None if point.low is None else y_scale(point.low),
            None if point.high is None else y_scale(point.high),
            f"step {step:,}: {point.value:.1f}",
        )
        for step, point in zip(steps, intervals, strict=True)
    )
    values = ", ".join(f"{point.value:.1f} at step {step:,}" for step, point in zip(steps, intervals, strict=True))
    return Chart(
        title=title,
        unit="%",
        x_title="optimizer step",
        x_ticks=_x_ticks(steps, x_scale),
        y_ticks=tuple(Tick(y_scale(value), label) for value, label in zip(y_values, labels, strict=True)),
        raw="",
        line=_line_path(steps, [point.value for point in intervals], x_scale, y_scale),
        markers=markers,
        description=f"{title} in percent: {values}.",
        note="",
    )


def nice_ticks(low: float, high: float, target: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that cover ``low`` to ``high``: the finest with <= ``target`` gaps.

    >>> nice_ticks(0.13, 2.31)
    [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    """
    step = _nice_step((high - low) / target)
    while math.ceil(high / step - 1e-9) - math.floor(low / step + 1e-9) > target:
        step = _nice_step(step * 1.01)
    return _multiples(step, math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9))


def step_ticks(low: float, high: float) -> list[float]:
    """Whole numbers within ``low`` to ``high``, few enough that their labels stand apart.

    >>> step_ticks(0, 1233)
    [0.0, 200.0, 400.0, 600.0, 800.0, 1000.0, 1200.0]
    """
    step = _nice_step(max(1.0, (high - low) / (6.2 if high < 10_000 else 4.2)))
    return _multiples(step, math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9))


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that cover ``low`` to ``high``, at most seven.

    >>> log_ticks(0.3, 120)
    [0.1, 1.0, 10.0, 100.0, 1000.0]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first) / 6))
    last += -(last - first) % stride
    return [float(f"1e{exponent}") for exponent in range(first, last + 1, stride)]


def tick_labels(ticks: Sequence[float]) -> tuple[int, list[str]]:
    """Writes ticks with as many decimals as they need; a common power of ten is taken out of very small or large ones.

    Returns:
        The exponent taken out (0: none), and the labels.

    >>> tick_labels([0.0, 0.0001, 0.0002])
    (-4, ['0', '1', '2'])
    >>> tick_labels([0.0, 500.0, 1000.0])
    (0, ['0', '500', '1,000'])
    """
    largest = max(abs(tick) for tick in ticks)
    smallest = min((abs(tick) for tick in ticks if tick != 0), default=1.0)
    is_geometric = smallest > 0 and largest / smallest >= LOG_FROM_RATIO and 0 not in ticks
    if is_geometric:
        return 0, [_power_label(tick) for tick in ticks]
    exponent = math.floor(math.log10(largest)) if largest > 0 else 0
    if -3 < exponent < 6:
        exponent = 0
    scaled = [tick / 10**exponent for tick in ticks]
    gap = min(after - before for before, after in pairwise(scaled)) if len(scaled) > 1 else 1.0
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9))
    return exponent, [_signed(value, decimals) for value in scaled]


def moving_average(values: Sequence[Value], window: int) -> list[Value]:
    """Averages each value with its neighbours, ``window`` in all, fewer at the ends; gaps are left out of the average.

    >>> moving_average([1, 2, 6, None, 8], 3)
    [1.5, 3.0, 4.0, None, 8.0]
    """
    totals = [0.0, *accumulate(value if value is not None else 0.0 for value in values)]
    counts = [0, *accumulate(value is not None for value in values)]
    half = window // 2
    averages: list[Value] = []
    for index, value in enumerate(values):
        start, stop = max(0, index - half), min(len(values), index + half + 1)
        count = counts[stop] - counts[start]
        averages.append(None if value is None else (totals[stop] - totals[start]) / count)
    return averages


def superscript(exponent: int) -> str:
    """Writes a power of ten: ``10⁻⁴``."""
    return f"10{str(exponent).translate(SUPERSCRIPTS)}"


def _nice_step(rough: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten that is at least ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    multiple = next(multiple for multiple in (1, 2, 5, 10) if multiple * power >= rough * (1 - 1e-9))
    return multiple * power


def _multiples(step: float, first: int, last: int) -> list[float]:
    """Multiples of ``step``, rounded to its own decimals: a tick is 0.3 and not 0.30000000000000004."""
    decimals = max(0, -math.floor(math.log10(step)))
    return [round(index * step, decimals) for index in range(first, last + 1)]


def _covering_ticks(values: Sequence[float], *, from_zero: bool) -> list[float]:
    low, high = min(values), max(values)
    # A loss that has fallen by more than half is read against zero anyway.
    if from_zero or 0 <= low < high / 2:
        low = min(low, 0.0)
        high = max(high, 0.0)
    # Values that differ by rounding alone are one value: there is no sensible scale between them.
    if high - low <= abs(high) * 1e-9:
        margin = abs(high) / 10 or 1.0
        low, high = (low - margin if low != 0 else low), high + margin
    return nice_ticks(low, high)


def _x_scale(steps: Sequence[int]) -> _Scale:
    low, high = steps[0], steps[-1]
    if low == high:
        low, high = low - 1, high + 1
    # A run logged from step 1 on still starts at the axis.
    return _Scale(min(low, 0) if low <= high / 10 else low, high, LEFT, RIGHT)


def _x_ticks(steps: Sequence[int], scale: _Scale) -> tuple[Tick, ...]:
    ticks = step_ticks(scale.low, scale.high) if len(steps) > 1 else [float(steps[0])]
    return tuple(Tick(scale(tick), _signed(tick, 0)) for tick in ticks)


def _unit_with_factor(unit: str, exponent: int, is_log: bool) -> str:
    parts = [unit] if unit else []
    if exponent:
        parts.append(f"\N{MULTIPLICATION SIGN}{superscript(exponent)}")
    if is_log:
        parts.append("log scale")
    return ", ".join(parts)


def _power_label(value: float) -> str:
    exponent = round(math.log10(value))
    return f"{value:,.15g}" if -3 < exponent < 5 else superscript(exponent)


def _signed(value: float, decimals: int) -> str:
    return f"{value:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def _smoothing_window(count: int) -> int:
    """An odd number of neighbours, about a twentieth of the run; 1, that is none, for a run of few steps."""
    return 1 if count < 12 else 2 * max(1, count // 40) + 1


def _line_note(window: int, is_binned: bool) -> str:
    if window == 1:
        return ""
    faint = "strokes show the lowest to highest of neighbouring steps" if is_binned else "ones show each step"
    return f"Bold lines average {window} logged steps; faint {faint}."


def _first_known(values: Sequence[Value]) -> float:
    return next(value for value in values if value is not None)


def _bins(count: int) -> list[slice]:
    edges = [index * count // MOST_POINTS for index in range(MOST_POINTS + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def _bin_means(steps: Sequence[int], values: Sequence[Value]) -> tuple[list[int], list[Value]]:
    middles: list[int] = []
    means: list[Value] = []
    for part in _bins(len(values)):
        known = [value for value in values[part] if value is not None]
        middles.append(steps[(part.start + part.stop) // 2])
        means.append(math.fsum(known) / len(known) if known else None)
    return middles, means


def _bin_ranges(steps: Sequence[int], values: Sequence[Value]) -> list[tuple[int, float, float]]:
    ranges = []
    for part in _bins(len(values)):
        known = [value for value in values[part] if value is not None]
        if known:
            ranges.append((steps[(part.start + part.stop) // 2], min(known), max(known)))
    return ranges


def _line_path(steps: Sequence[int], values: Sequence[Value], x_scale: _Scale, y_scale: _Scale) -> str:
    commands = []
    is_drawing = False
    for step, value in zip(steps, values, strict=True):
        if value is None:
            is_drawing = False
            continue
        commands.append(f"{'L' if is_drawing else 'M'}{x_scale(step):g} {y_scale(value):g}")
        is_drawing = True
    # A stretch of one point draws nothing by itself; a line of no length shows as a dot under round caps.
    return "".join(
        command + "h0" if command[0] == "M" and (following is None or following[0] == "M") else command
        for command, following in zip(commands, [*commands[1:], None], strict=True)
    )


def _ranges_path(ranges: Sequence[tuple[int, float, float]], x_scale: _Scale, y_scale: _Scale) -> str:
    return "".join(f"M{x_scale(step):g} {y_scale(low):g}V{y_scale(high):g}" for step, low, high in ranges)
