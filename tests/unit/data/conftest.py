import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from phi3v.model.processing_phi3_v import Phi3VProcessor

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder with the published tokenizer files and what the published code gave on a tiny model."""
    return GOLDEN


@pytest.fixture(scope="session")
def processor() -> Phi3VProcessor:
    """The published tokenizer, with one tile an image: 313 tokens for a square one."""
    return Phi3VProcessor.from_pretrained(GOLDEN, num_crops=1)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes records (or raw lines) to a JSONL file in the test's folder."""

    def write(*records: dict[str, Any] | str, name: str = "train.jsonl") -> Path:
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes("".join(line + "\n" for line in lines).encode())
        return path

    return write


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """``images/`` beside the JSONL files, with red.png (20 x 30 px) and blue.jpg (40 x 10 px), sizes (h, w)."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (30, 20), (255, 0, 0)).save(folder / "red.png")
    Image.new("RGB", (10, 40), (0, 0, 255)).save(folder / "blue.jpg")
    return folder
