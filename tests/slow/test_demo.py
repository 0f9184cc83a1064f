"""The demo as a newcomer runs it: everything works, and the small model really learns to see."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from phi3v.demo import NEW_QUESTION, PAIR_QUESTION, QUESTIONS
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
        assert run.report_path.is_file()
    before, after = full.evaluation("before"), full.evaluation("after")
    assert before is not None and after is not None
    assert before["high"] < 0.2 and after["low"] > 0.75

    first, *_, last = lora.prediction_steps()
    began, ended = (accuracies(lora.predictions(step)) for step in (first, last))
    assert began[NEW_QUESTION] == 0 and ended[NEW_QUESTION] > 0.85
    for question in {*QUESTIONS, PAIR_QUESTION}:  # what it knew is not displaced
        assert ended[question] > began[question] - 0.06

    assert json.loads((folder / "exported" / "export_check.json").read_text())["verdict"] == "passed"
    lines = (folder / "eval-exported" / "predictions.jsonl").read_text().splitlines()
    exported = {row["id"]: row["prediction"] for row in map(json.loads, lines)}
    trained = {row["id"]: row["prediction"] for row in lora.predictions(last)}
    assert len(exported) == 1800 and len(trained) == 720
    assert sum(exported[name] == answer for name, answer in trained.items()) > 715  # merged sums round otherwise


def accuracies(rows: list[dict[str, Any]]) -> dict[str, float]:
    scores: dict[str, list[float]] = {}
    for row in rows:
        scores.setdefault(row["question"], []).append(row["score"])
    return {question: sum(own) / len(own) for question, own in scores.items()}
