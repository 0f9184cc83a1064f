"""LLaVA's JSON: ``{"id", "image", "conversations": [{"from", "value"}]}`` with ``<image>`` in the texts.

Source: the data of LLaVA, LLaVA-1.5 and the many sets written like it (ShareGPT4V, LLaVA-NeXT, M4-Instruct).
"""

from pathlib import Path
from typing import Any

from .conversations import convert_records, image_paths, native_conversation, place_images, spoken
from .source_images import SourceImages
from .writer import Conversion, OnBadSample


def convert_llava(
    source: str,
    output_dir: Path,
    *,
    image_dir: Path | None = None,
    split: str = "train",
    val_share: float = 0.0,
    on_bad_sample: OnBadSample = "error",
    copy_images: bool = False,
    progress: bool = True,
) -> Conversion:
    """LLaVA's JSON array (or JSON lines) of conversations with <image> in the texts.

    Args:
        source: the JSON file.
        output_dir: folder for the JSONL files and ``images``.
        image_dir: folder that image paths start from (default: the source file's).
        split: name of the split, and of its file.
        val_share: share of the images, 0 to below 1, whose samples go to ``val`` instead; the same ones every time.
        on_bad_sample: ``error`` ends at the first bad sample, ``skip`` leaves bad ones out and counts them.
        copy_images: copy the images into the output folder; otherwise ``images`` is a link to image_dir.
        progress: show a bar.

    Raises:
        DataError: a bad sample that is not to be skipped, no usable one, or a file or folder that is not there.
        ConfigError: val_share or split cannot be used.
    """
    return convert_records(
        source,
        output_dir,
        "llava",
        _to_native,
        image_dir=image_dir,
        split=split,
        val_share=val_share,
        on_bad_sample=on_bad_sample,
        copy_images=copy_images,
        progress=progress,
    )


def _to_native(record: dict[str, Any], label: str, images: SourceImages) -> dict[str, Any]:
    turns = spoken(record.get("conversations"), label)
    names = [images.place(path, label) for path in image_paths(record, label)]
    return native_conversation(place_images(turns, names, label), label)
