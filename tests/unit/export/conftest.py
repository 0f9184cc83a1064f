"""A small trained run, and samples to compare models on."""

import json
from pathlib import Path

import pytest
from PIL import Image

from phi3v.train.run import run_training
from training import make_config, write_training_data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two samples, with an image and without."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (50, 70), "orange").save(tmp_path / "images" / "a.png")
    rows = [{"images": ["a.png"], "user": "Colour?", "assistant": "orange"}, {"user": "Hi", "assistant": "Hello."}]
    lines = [json.dumps({"id": str(index), "conversations": [row]}) for index, row in enumerate(rows)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return tmp_path / "data.jsonl"


@pytest.fixture(scope="session")
def lora_run(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with adapters, scored before and after; its answers have learned something."""
    folder = tmp_path_factory.mktemp("lora")
    data = write_training_data(folder / "data")
    scores = {"eval_data": [data / "eval.jsonl"], "eval_max_new_tokens": 2, "num_crops": 3}
    adapters = {"method": "lora", "lora_rank": 4, "learning_rate": 1e-2}
    return run_training(make_config(tiny_dir, data, folder / "run", **adapters, **scores))
