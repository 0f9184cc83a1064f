"""The demo as a newcomer runs it: everything works, and the small model really learns to see."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from phi3v.runlog import RunDirectory


@pytest.mark.slow
def test_the_demo_learns_resumes_exports_and_reports(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    command = [sys.executable, "-m", "phi3v", "demo", "--output_dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "killed after step 150" in done.stdout
    assert "Going on from" in done.stderr

    full, lora = RunDirectory(folder / "full").open(), RunDirectory(folder / "lora").open()
    assert [line["step"] for line in full.steps()] == list(range(10, 721, 10))
    for run in (full, lora):
        before, after = run.evaluation("before"), run.evaluation("after")
        assert before is not None and after is not None
        assert before["high"] < 0.2
        assert after["low"] > 0.75
        assert run.report_path.is_file()
    assert json.loads((folder / "exported" / "export_check.json").read_text())["verdict"] == "passed"
    exported = json.loads((folder / "eval-exported" / "eval.json").read_text())
    assert exported["score"] == lora.evaluation("after")["score"]  # pyright: ignore[reportOptionalSubscript]
