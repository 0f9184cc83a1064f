"""Sweeps become curves at the places of their numbers."""

from typing import Any
from xml.etree import ElementTree

import pytest

from phi3v.bench.growth import QUANTITIES, growth_svg
from phi3v.report.charts import LEFT, RIGHT, WIDTH

SVG = "{http://www.w3.org/2000/svg}"


def sweep(kind: str | None = "num_crops", points: int = 3) -> dict[str, Any]:
    runs: list[dict[str, Any]] = [
        {
            "samples_per_s": 10.0 / (number + 1),
            "tflops": 400.0 + number,
            "memory": {"allocated_bytes": 50e9, "reserved_bytes": 60e9},
            "sample": {"crops": 1 + 8.0 * number, "positions": 100.0 * number + 313},
            "options": {"micro_batch_tokens": 2500 * (number + 1), "lora_rank": 2 ** (number + 3)},
        }
        for number in range(points)
    ]
    runs.insert(1, {"not_measured": "no room"})
    return {"options": {"sweep": kind, "method": "full"}, "runs": runs}


@pytest.mark.parametrize("kind", ["num_crops", "length", "micro_batch", "rank"])
def test_a_sweep_is_a_row_of_curves_through_its_points(kind: str) -> None:
    root = ElementTree.fromstring(growth_svg([sweep(kind)]))
    charts = root.findall(f"{SVG}svg")
    assert [float(chart.get("x", "")) for chart in charts] == [number * WIDTH for number in range(len(QUANTITIES))]
    for chart in charts:
        (line,) = (path for path in chart.iter(f"{SVG}path") if path.get("class") == "line")
        points = [tuple(map(float, point.split())) for point in (line.get("d") or "")[1:].split("L")]
        assert len(points) == 3
        assert LEFT <= points[0][0] < points[1][0] < points[2][0] == RIGHT
    time, speed, memory = (chart.find(f"{SVG}title") for chart in charts)
    assert time is not None and speed is not None and memory is not None
    assert "100 at" in str(time.text) and "300 at" in str(time.text)
    assert "402 at" in str(speed.text) and "60 at" in str(memory.text)


def test_every_sweep_has_a_row_and_other_measurements_none() -> None:
    root = ElementTree.fromstring(growth_svg([sweep("num_crops"), sweep(None), sweep("rank"), sweep("length", 1)]))
    assert len(root.findall(f"{SVG}svg")) == 2 * len(QUANTITIES)
    with pytest.raises(ValueError, match="two points"):
        growth_svg([sweep(None), sweep("rank", 1)])
