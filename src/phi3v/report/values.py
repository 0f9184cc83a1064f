"""Values of a run's records, which are untrusted, as numbers and as words for a page."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from phi3v.errors import Phi3VError

Json = Mapping[str, Any]

T = TypeVar("T")

NO_BREAK = "\N{NO-BREAK SPACE}"
"""Stands between a number and its unit where a line must not end."""

BIGGEST_NUMBER = 1e30
"""Logged numbers beyond are treated as not finite: a run that logs them has diverged."""

DEEPEST_VALUE = 4
"""Levels of nesting shown of a setting or a summary."""

LONGEST_TEXT = 500
"""Characters shown of a question or answer; the count of the rest is."""


def read_or_note(reader: Callable[[], T], notes: list[str]) -> T | None:
    """Reads one piece of the run; an unreadable one becomes a note of the report."""
    try:
        return reader()
    except (Phi3VError, OSError) as error:
        notes.append(f"A piece of the run could not be read and is left out. {error}")
        return None


def step_of(line: Json) -> int | None:
    step = line.get("step")
    is_usable = isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 10**12
    return step if is_usable else None


def by_step(lines: Sequence[Json]) -> list[Json]:
    """Step lines in order, the last one of each step, without lines that have no usable step."""
    by_step = {step: line for line in lines if (step := step_of(line)) is not None}
    return [by_step[step] for step in sorted(by_step)]


def to_number(value: Any) -> float | None:
    """A logged number; None for a gap, for what is no number, and for what only a diverged run logs."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if abs(value) > BIGGEST_NUMBER or not math.isfinite(value):
        return None
    return float(value) if abs(value) > 1 / BIGGEST_NUMBER else 0.0


def to_whole(value: Any) -> int | None:
    is_usable = isinstance(value, int) and not isinstance(value, bool) and abs(value) < BIGGEST_NUMBER
    return value if is_usable else None


def to_percent(value: Any) -> float | None:
    number = to_number(value)
    return None if number is None else 100 * number


def to_text(value: Any, depth: int = 0) -> str:
    """A value of the configuration or of a summary in one line; what is nested deeper than any of ours is left out."""
    if depth > DEEPEST_VALUE:
        return "\u2026"
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {to_text(item, depth + 1)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(to_text(item, depth + 1) for item in value) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def shortened(value: Any) -> str:
    """A question or an answer, cut to ``LONGEST_TEXT``."""
    text = value if isinstance(value, str) else to_text(value)
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]}\u2026 ({len(text) - LONGEST_TEXT:,} more characters)"


def humanised(key: str) -> str:
    names = {
        "phi3v": "phi3v",
        "cpu": "CPU",
        "cpu_count": "CPU cores",
        "gpus": "GPUs",
        "git": "source commit",
        "lora": "LoRA",
    }
    if key in names:
        return names[key]
    for suffix in ("_bytes", "_s"):
        key = key.removesuffix(suffix)
    return key.replace("_", " ")


def quantity(key: str, value: Any, depth: int = 0) -> str:
    """A summary's value with the unit that its key ends in."""
    if depth > DEEPEST_VALUE:
        return "\u2026"
    if isinstance(value, Mapping):
        items = (f"{humanised(str(name))}: {quantity(str(name), item, depth + 1)}" for name, item in value.items())
        return ", ".join(items) or "none"
    if isinstance(value, list):
        return "; ".join(quantity(key, item, depth + 1) for item in value) or "none"
    number = to_number(value)
    if number is None:
        return to_text(value)
    if key.endswith("_bytes"):
        return in_bytes(number)
    if key.endswith("_s") or key == "seconds":
        return in_duration(number)
    return f"{value:,}" if isinstance(value, int) else f"{number:,.4g}"


def short_count(count: int) -> str:
    """A count in three digits: ``4.15 B``."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{NO_BREAK}{letter}"
    return str(count)


def in_bytes(count: float) -> str:
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.3g}{NO_BREAK}{unit}"
    return f"{count:.0f}{NO_BREAK}bytes"


def in_duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"
