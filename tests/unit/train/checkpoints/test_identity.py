import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phi3v.config import TrainConfig, settings_of
from phi3v.errors import CheckpointError
from phi3v.train.checkpoints.identity import identify, require_same_run

CONFIG = TrainConfig(model="m", output_dir=Path("r"), train_data=[Path("t.jsonl")])


def identity(config: TrainConfig = CONFIG, **changes: Any) -> dict[str, Any]:
    facts = {
        "precision": "fp32",
        "shared_questions": 1,
        "train_fingerprint": "abc",
        "eval_fingerprint": None,
        "world_size": 1,
        **changes,
    }
    return identify(config, **facts)


def test_the_documentation_names_what_a_resume_may_change() -> None:
    page = (Path(__file__).parents[4] / "docs" / "tuning.md").read_text("utf-8")
    settings = settings_of(TrainConfig)
    unnamed = {"output_dir", "train_data", "eval_data", "resume", "progress"}  # where files lie, and what a run shows
    for start, kind in (("| freely |", "free"), ("| with a warning", "rounds")):
        (row,) = (line for line in page.splitlines() if line.startswith(start))
        named = set(re.findall(r"`(\w+)`", row)) & settings.keys()
        assert named == {one.name for one in settings.values() if one.on_resume == kind} - unnamed


def test_the_same_run() -> None:
    assert require_same_run(identity(), identity(), Path("c")) == []


@pytest.mark.parametrize(
    "change",
    [
        {"logging_steps": 7},
        {"num_workers": 0},
        {"save_steps": 3},
        {"keep_checkpoints": 5},
        {"output_dir": Path("elsewhere")},
        {"train_data": [Path("moved.jsonl")]},
    ],
)
def test_changes_that_cost_nothing(change: dict[str, Any]) -> None:
    assert require_same_run(identity(), identity(replace(CONFIG, **change)), Path("c")) == []


def test_changes_that_round_differently_are_allowed_and_told() -> None:
    changed = identity(replace(CONFIG, micro_batch_tokens=512, checkpointing="full"), world_size=2)
    assert require_same_run(identity(), changed, Path("c")) == [
        "checkpointing: auto there, full now",
        "micro_batch_tokens: none there, 512 now",
        "number of processes: 1 there, 2 now",
    ]


def test_four_bits_depend_on_the_package_that_makes_them() -> None:
    assert "bitsandbytes version" in identity(replace(CONFIG, method="qlora"))["rounds"]
    assert "bitsandbytes version" not in identity()["rounds"]


@pytest.mark.parametrize(
    ("config_change", "fact_change", "name"),
    [
        ({"batch_size": 32}, {}, "batch_size: 64 there, 32 now"),
        ({"seed": 1}, {}, "seed"),
        ({"method": "frozen_vision"}, {}, "method: full there, frozen_vision now"),
        ({"learning_rate": 1e-5}, {}, "learning_rate"),
        ({"num_train_epochs": 2}, {}, "num_train_epochs"),
        ({"freeze": ["vision"]}, {}, "freeze"),
        ({"model": "other"}, {}, "model: m there, other now"),
        ({}, {"shared_questions": 4}, "shared_questions: 1 there, 4 now"),
        ({"fp8": True}, {}, "fp8"),
        ({}, {"train_fingerprint": "xyz"}, "training samples"),
        ({}, {"eval_fingerprint": "xyz"}, "evaluation samples"),
        ({}, {"precision": "bf16"}, "precision: fp32 there, bf16 now"),
    ],
)
def test_changes_that_make_another_run_are_refused(
    config_change: dict[str, Any], fact_change: dict[str, Any], name: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        require_same_run(
            identity(), identity(replace(CONFIG, **config_change), **fact_change), Path("run/checkpoint-5")
        )
    assert name in str(caught.value)
    assert "run/checkpoint-5" in str(caught.value) and "another output_dir" in str(caught.value)


def test_a_model_folder_is_the_same_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    relative, absolute = (replace(CONFIG, model=name) for name in ("model", str(tmp_path / "model")))
    assert identity(relative) == identity(absolute)
