"""A run that takes a frozen encoder's rows from disk trains as one that computes them."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import phi3v.train.trainer
from phi3v.config import TrainConfig
from phi3v.model.packed import PackedBatch
from phi3v.train.run import run_training
from training import final_weights, largest_difference, logged, make_config, write_shared_data

TOLERANCE = 1e-5
"""Float32: rows come from products of other images' rows together, which round otherwise."""


def refuse(batch: PackedBatch, *_: object) -> PackedBatch:
    assert batch.crops is None, "an image was cut, though its rows are there"
    return batch


def assert_trains_alike(run: Path, reference: Path) -> None:
    losses, expected = ([line["loss"] for line in logged(one)] for one in (run, reference))
    assert losses == pytest.approx(expected, rel=TOLERANCE)
    assert largest_difference(final_weights(run), final_weights(reference)) <= TOLERANCE


@pytest.mark.parametrize(
    "method",
    [
        {"method": "frozen_vision"},
        pytest.param(
            {
                "method": "lora",
                "lora_rank": 2,
                "freeze": ["vision", "projector"],
                "shared_questions": 4,
                "num_workers": 2,
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["frozen vision", "lora"],
)
def test_with_a_cache_equals_without(
    method: dict[str, Any], tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_shared_data(tmp_path / "data")

    def configure(name: str, **changes: Any) -> TrainConfig:
        return make_config(tiny_dir, data, tmp_path / name, max_steps=6, save_steps=None, **method, **changes)

    without = run_training(configure("without"))
    cache = tmp_path / "cache"
    filling = run_training(configure("filling", vision_cache=cache))
    assert_trains_alike(filling, without)
    stored = {path: path.stat().st_size for path in cache.glob("*/*.rows")}
    assert sum(stored.values()) > 0
    monkeypatch.setattr(phi3v.train.trainer, "compute_missing", refuse)
    filled = run_training(configure("filled", vision_cache=cache))
    assert_trains_alike(filled, without)
    assert {path: path.stat().st_size for path in cache.glob("*/*.rows")} == stored


@pytest.mark.slow
def test_a_changed_image_is_computed_anew(tiny_dir: Path, tmp_path: Path) -> None:
    data = write_shared_data(tmp_path / "data")
    cache = tmp_path / "cache"

    def train(name: str, **changes: Any) -> Path:
        return run_training(
            make_config(
                tiny_dir, data, tmp_path / name, method="frozen_vision", max_steps=2, save_steps=None, **changes
            )
        )

    train("first", vision_cache=cache)
    for path in (data / "images").iterdir():
        with Image.open(path) as image:
            image.point(lambda value: 255 - value).save(path)
    assert_trains_alike(train("second", vision_cache=cache), train("without"))
