"""ShareGPT conversations as LLaMA-Factory, Axolotl and ms-swift write them.

Source: the data pages of those tools. Three shapes, told apart by their keys:
``{"conversations": [{"from", "value"}], "images", "system"}``, ``{"messages": [{"role", "content"}], "images"}``, and
ms-swift's pairs, ``{"conversation": [{"human", "assistant"}], "system"}``.
"""

from pathlib import Path
from typing import Any

from ..schema import sample_error
from .conversations import (
    Role,
    convert_records,
    each_message,
    image_paths,
    native_conversation,
    place_images,
    spoken,
    wrong_type,
)
from .source_images import SourceImages
from .writer import Conversion, OnBadSample

_CONVERSATION_KEYS = ("conversations", "messages", "conversation")


def convert_sharegpt(
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
    """ShareGPT JSON of LLaMA-Factory, Axolotl and ms-swift: conversations with <image> and a list of images.

    Args:
        source: the JSON or JSON lines file.
        output_dir: folder for the JSONL files and ``images``.
        image_dir: folder that image paths start from and that absolute ones lie in (default: the source file's).
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
        "sharegpt",
        _to_native,
        image_dir=image_dir,
        split=split,
        val_share=val_share,
        on_bad_sample=on_bad_sample,
        copy_images=copy_images,
        progress=progress,
    )


def _to_native(record: dict[str, Any], label: str, images: SourceImages) -> dict[str, Any]:
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise wrong_type(label, "'system'", system, "a string")
    keys = [key for key in _CONVERSATION_KEYS if record.get(key)]
    if len(keys) != 1:
        raise sample_error(
            label,
            f"it has {' and '.join(map(repr, keys)) or 'no conversation'}; its keys are {', '.join(map(repr, record))}",
            f"A sample has one of the keys {', '.join(_CONVERSATION_KEYS)}.",
            "missing key",
        )
    messages = record[keys[0]]
    turns = _pairs(messages, label) if keys[0] == "conversation" else spoken(messages, label)
    names = [images.place(path, label) for path in image_paths(record, label)]
    return native_conversation(place_images(turns, names, label), label, system)


def _pairs(rounds: Any, label: str) -> list[tuple[Role, str]]:
    turns: list[tuple[Role, str]] = []
    for place, pair in each_message(rounds, label):
        question, answer = pair.get("human"), pair.get("assistant")
        if not isinstance(question, str) or not isinstance(answer, str):
            raise wrong_type(place, "it", pair, 'an object {"human": "...", "assistant": "..."}')
        turns.append(("user", question))
        turns.append(("assistant", answer))
    return turns
