"""Sweeps as curves: one SVG picture out of several measurements."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

from phi3v.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, curve

Run = Mapping[str, Any]

AXES: dict[str, tuple[str, Callable[[Run], float]]] = {
    "num_crops": ("crops a sample", lambda run: run["sample"]["crops"]),
    "length": ("positions a sample", lambda run: run["sample"]["positions"]),
    "micro_batch": ("positions at once", lambda run: run["options"]["micro_batch_tokens"]),
    "rank": ("rank of the adapters", lambda run: run["options"]["lora_rank"]),
}
"""What each sweep changes, and where a run says how much of it there was."""

QUANTITIES: tuple[tuple[str, str, Callable[[Run], float]], ...] = (
    ("Time a sample", "ms", lambda run: 1e3 / run["samples_per_s"]),
    ("Speed", "TFLOP/s", lambda run: run["tflops"]),
    ("Peak memory", "GB", lambda run: max(run["memory"].values()) / 1e9),
)

STYLE = """
text { font: 12px system-ui, sans-serif; fill: #444 }
.title { font-size: 13px; font-weight: 600; fill: #222 }
.grid { stroke: #ddd } .line { fill: none; stroke: #1f6feb; stroke-width: 2 } .point { fill: #1f6feb }
.y { text-anchor: end } .x { text-anchor: middle }
"""

HEADING_PX = 26


def growth_svg(measurements: Sequence[Mapping[str, Any]]) -> str:
    """Draws what `phi3v bench --sweep` found: a row of charts for every measurement.

    Args:
        measurements: contents of its JSON files; other measurements are left out.

    Raises:
        ValueError: none of them is a sweep with at least two points.
    """
    rows = [row for row in map(_charts, measurements) if row]
    if not rows:
        raise ValueError("no measurement is a sweep that has at least two points")
    height = HEADING_PX + HEIGHT
    drawn = "".join(
        _draw(chart, column * WIDTH, number * height)
        for number, row in enumerate(rows)
        for column, chart in enumerate(row)
    )
    width, total = WIDTH * len(QUANTITIES), height * len(rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" role="img">'
        f"<style>{STYLE}</style>"
        '<defs><marker id="point" markerWidth="7" markerHeight="7" refX="3.5" refY="3.5" markerUnits="userSpaceOnUse">'
        '<circle class="point" cx="3.5" cy="3.5" r="3.5"/></marker></defs>'
        f'<rect width="{width}" height="{total}" fill="#fff"/>{drawn}</svg>\n'
    )


def _charts(measured: Mapping[str, Any]) -> list[Chart]:
    sweep = measured["options"]["sweep"]
    runs = [run for run in measured["runs"] if "samples_per_s" in run]
    if sweep is None or len(runs) < 2:
        return []
    x_title, x_of = AXES[sweep]
    runs.sort(key=x_of)
    xs = [round(x_of(run)) for run in runs]
    charts = []
    for title, unit, value_of in QUANTITIES:
        values = [value_of(run) for run in runs]
        chart = curve(f"{title}, {measured['options']['method']}", unit, xs, values, from_zero=True)
        assert chart is not None
        points = ", ".join(f"{value:.3g} at {x:,}" for x, value in zip(xs, values, strict=True))
        charts.append(replace(chart, x_title=x_title, description=f"{title} in {unit} by {x_title}: {points}."))
    return charts


def _draw(chart: Chart, x: int, y: int) -> str:
    parts = [
        f'<svg x="{x}" y="{y}" width="{WIDTH}" height="{HEADING_PX + HEIGHT}">',
        f"<title>{escape(chart.description)}</title>",
        f'<text class="title" x="{LEFT}" y="17">{escape(chart.title)}, {escape(chart.unit)}</text>',
        f'<g transform="translate(0 {HEADING_PX - TOP // 2})">',
    ]
    for tick in chart.y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{tick.position}" y2="{tick.position}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{tick.position + 4}">{escape(tick.label)}</text>')
    parts += [
        f'<text class="x" x="{tick.position}" y="{BOTTOM + 17}">{escape(tick.label)}</text>' for tick in chart.x_ticks
    ]
    middle = (LEFT + RIGHT) / 2
    parts.append(f'<text class="x" x="{middle}" y="{BOTTOM + 35}">{escape(chart.x_title)}</text>')
    ends = " ".join(f'marker-{place}="url(#point)"' for place in ("start", "mid", "end"))
    parts.append(f'<path class="line" d="{chart.line}" {ends}/></g></svg>')
    return "".join(parts)
