"""A long run's memory stays flat: clips of changing numbers of frames, every process watched from outside."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "leak.py"

MOST_GROWTH_MB = 12.0
"""Between the second and the last quarter of 400 steps, when the allocator is still finding its size."""


@pytest.mark.slow
def test_neither_memory_nor_open_files_grow(tmp_path: Path) -> None:
    output = tmp_path / "leak.json"
    options = ["--steps", "400", "--save_steps", "100", "--output", str(output)]
    subprocess.run([sys.executable, SCRIPT, *options], check=True, capture_output=True)
    processes = json.loads(output.read_text())["processes"]
    assert processes.keys() == {"main", "a", "b"}
    for name, found in processes.items():
        assert found["growth_mb"] < MOST_GROWTH_MB, name
        second, last = found["files"]
        assert last <= second + 20, name  # micro-batches on their way are open files
