"""What tests of the data doctor plant: pictures, samples, files."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int, height: int = 90, width: int = 120) -> Image.Image:
    """Makes a smooth coloured picture, another one for every seed."""
    levels = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize((width, height), Image.Resampling.BICUBIC)


def as_jpeg(image: Image.Image, quality: int = 85, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, **options)
    return buffer.getvalue()


def sample(
    name: str, images: list[str], user: str = "What is it?", assistant: str = "A thing.", **more: Any
) -> dict[str, Any]:
    return {"id": name, "conversations": [{"images": images, "user": user, "assistant": assistant}], **more}


def write_jsonl(path: Path, *records: dict[str, Any] | str) -> Path:
    """Writes records, or lines as they are, and makes the folder of their images."""
    (path.parent / "images").mkdir(exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines))
    return path
