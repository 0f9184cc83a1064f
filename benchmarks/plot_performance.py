"""Draws docs/performance.svg from the JSON files of `phi3v bench --sweep`.

phi3v bench --sweep num_crops --batch_size 16 --output crops.json
phi3v bench --sweep length --batch_size 16 --output length.json
python benchmarks/plot_performance.py crops.json length.json
"""

import argparse
import json
from pathlib import Path

from phi3v.bench.growth import growth_svg

DEFAULT_OUTPUT = Path(__file__).parents[1] / "docs" / "performance.svg"


def main() -> None:
    """Reads, draws, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="JSON", help="a row of charts each, in this order")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="SVG")
    options = parser.parse_args()
    measurements = [json.loads(path.read_text(encoding="utf-8")) for path in options.files]
    options.output.write_text(growth_svg(measurements), encoding="utf-8")
    print(options.output)


if __name__ == "__main__":
    main()
