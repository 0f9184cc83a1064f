"""The four recipes as their users start them: from tables or clips to scores, with one process and with two."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from clips import write_clip
from phi3v.runlog import RunDirectory
from sources import docvqa_rows, hateful_memes_rows, nlvr2_rows, write_cauldron, write_mini_docvqa

RECIPES = Path(__file__).parents[2] / "recipes"
HELD_OUT = 500
"""Rows of the collection's training split that the published scripts keep for evaluation."""

pytestmark = pytest.mark.slow


def docvqa_from_the_hub(folder: Path) -> list[str]:
    write_mini_docvqa(folder, num_train=8, num_test=3)
    return []


def full_docvqa_from_the_hub(folder: Path) -> list[str]:
    write_mini_docvqa(folder, num_train=1, num_test=3)
    write_cauldron(folder, "docvqa", docvqa_rows(8))
    return ["--full_train"]


def hateful_memes_from_the_hub(folder: Path) -> list[str]:
    write_cauldron(folder, "hateful_memes", hateful_memes_rows(HELD_OUT + 8))
    return ["--eval_limit", "6"]


def nlvr2_from_the_hub(folder: Path) -> list[str]:
    write_cauldron(folder, "nlvr2", nlvr2_rows(HELD_OUT + 8))
    return ["--eval_limit", "6"]


def ucf101_from_clips(folder: Path) -> list[str]:
    for split, clips in {"train": 4, "val": 2, "test": 1}.items():
        for action in ("Archery", "BabyCrawling"):
            for number in range(clips):
                place = folder / "clips" / split / action
                place.mkdir(parents=True, exist_ok=True)
                write_clip(place / f"v_{action}_g{number:02d}_c01.avi", num_frames=10)
    run([sys.executable, RECIPES / "convert_ucf101.py", "--source", "clips", "--out_dir", "ucf101"], folder)
    return ["--data_dir", "ucf101"]


CASES: list[tuple[str, Callable[[Path], list[str]], str]] = [
    ("docvqa", docvqa_from_the_hub, "anls"),
    ("docvqa", full_docvqa_from_the_hub, "anls"),
    ("hateful_memes", hateful_memes_from_the_hub, "accuracy"),
    ("nlvr2", nlvr2_from_the_hub, "accuracy"),
    ("ucf101", ucf101_from_clips, "accuracy"),
]


def run(command: Sequence[str | Path], folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(("name", "make_data", "metric"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_recipe_scores_trains_and_scores_again(
    name: str, make_data: Callable[[Path], list[str]], metric: str, tiny_dir: Path, tmp_path: Path
) -> None:
    own = make_data(tmp_path)
    script = RECIPES / f"finetune_hf_trainer_{name}.py"
    flags = f"--model_name_or_path {tiny_dir} --batch_size 4 --num_crops 1 --learning_rate 1e-3 --no-tqdm".split()
    flags += ["--num_workers", "0", "--logging_steps", "1", "--eval_max_new_tokens", "8", "--report_to", "none", *own]

    said = run([sys.executable, script, *flags, "--output_dir", "one"], tmp_path)
    assert "run directory: one" in said
    two_processes = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert run([*two_processes, script, *flags, "--output_dir", "two"], tmp_path).count("run directory: two") == 1

    one, two = RunDirectory(tmp_path / "one"), RunDirectory(tmp_path / "two")
    for line, other in zip(one.steps(), two.steps(), strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-4)
    for when in ("before", "after"):
        scores = [json.loads((tmp_path / folder / f"eval_{when}.json").read_text()) for folder in ("one", "two")]
        assert scores[0]["metric"] == metric
        assert scores[0]["low"] <= scores[0]["score"] <= scores[0]["high"]
        assert without_time(scores[0]) == pytest.approx(without_time(scores[1])) or when == "after"
    assert (tmp_path / "one" / "model" / "config.json").is_file()
    assert (tmp_path / "two" / "report.html").is_file()

    steps = (tmp_path / "one" / "steps.jsonl").read_bytes()
    run([sys.executable, script, *flags, "--output_dir", "one"], tmp_path)  # finished: nothing is trained again
    assert (tmp_path / "one" / "steps.jsonl").read_bytes() == steps


def without_time(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if isinstance(value, int | float) and key != "seconds"}
