"""The diagnosis as one HTML file that needs nothing else: no network, no script, no other file.

All of the data is untrusted text: the template escapes it, a content security policy forbids scripts and requests, and
of images only the crops that the image processor makes are shown, encoded anew.
"""

from pathlib import Path
from typing import NamedTuple

import jinja2

from ..data.encode import SampleEncoder
from ..files import write_atomically
from .diagnosis import Diagnosis, Split, percent
from .ledger import Ledger
from .lengths import Costs, Histogram
from .specimens import specimens

CHART_WIDTH, CHART_HEIGHT = 320, 96
"""Plot of a histogram, in the units of its SVG view box."""

WIDEST_BAR = 24.0
"""In the same units: a histogram of one number is a bar, not a block."""


class Bar(NamedTuple):
    """One bar of a histogram, in view box units, with what it says."""

    x: float
    width: float
    height: float
    label: str


class Bars(NamedTuple):
    """A histogram ready to draw.

    Attributes:
        title: what is counted.
        bars: left to right.
        low: smallest number on the axis.
        high: largest number on the axis.
        limit_x: where the limit stands, or None where that is outside.
    """

    title: str
    bars: list[Bar]
    low: str
    high: str
    limit_x: float | None = None


def write_page(diagnosis: Diagnosis, ledger: Ledger, costs: Costs, encoder: SampleEncoder, path: Path) -> None:
    """Writes the page, in place of an earlier one.

    Args:
        diagnosis: what is to be told.
        ledger: the data, for the samples shown.
        costs: at the number of crops that training uses.
        encoder: as training uses it.
        path: the file.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["percent"] = percent
    html = templates.get_template("page.html").render(
        diagnosis=diagnosis,
        charts={split.name: _charts(split, diagnosis.limit) for split in diagnosis.splits},
        specimens=specimens(ledger, costs, encoder, diagnosis.limit),
        chart_width=CHART_WIDTH,
        chart_height=CHART_HEIGHT,
    )
    # A lone surrogate, which UTF-8 cannot hold, becomes a character reference; browsers show it as a replacement mark.
    write_atomically(path, html.encode("utf-8", errors="xmlcharrefreplace"))


def _charts(split: Split, limit: int) -> list[list[Bars]]:
    """Returns two rows of histograms: tokens of a sample, then crops of an image, by number of crops."""
    return [
        [_token_bars(f"num_crops {crops}", one.histogram, limit) for crops, one in split.lengths.items()],
        [_crop_bars(f"num_crops {crops}", one.image_crops) for crops, one in split.lengths.items()],
    ]


def _token_bars(title: str, histogram: Histogram, limit: int) -> Bars:
    if not histogram.counts:
        return Bars(title, [], "", "")
    low, high = histogram.edges[0], histogram.edges[-1]
    labels = [
        f"{start:,} to {stop - 1:,} tokens: {count:,} samples"
        for start, stop, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False)
    ]
    limit_x = (limit - low) / (high - low) * CHART_WIDTH if low < limit < high else None
    return Bars(title, _bars(histogram.counts, labels), f"{low:,}", f"{high:,} tokens", limit_x)


def _crop_bars(title: str, image_crops: dict[int, int]) -> Bars:
    if not image_crops:
        return Bars(title, [], "", "")
    low, high = min(image_crops), max(image_crops)
    counts = tuple(image_crops.get(crops, 0) for crops in range(low, high + 1))
    labels = [f"{crops} crops: {count:,} images" for crops, count in enumerate(counts, start=low)]
    return Bars(title, _bars(counts, labels), f"{low}", f"{high} crops")


def _bars(counts: tuple[int, ...], labels: list[str]) -> list[Bar]:
    slot = CHART_WIDTH / len(counts)
    width = min(max(0.8 * slot, slot - 1), WIDEST_BAR)
    most = max(counts)
    return [
        Bar(round(slot * (index + 0.5) - width / 2, 2), round(width, 2), round(CHART_HEIGHT * count / most, 2), label)
        for index, (count, label) in enumerate(zip(counts, labels, strict=True))
    ]
