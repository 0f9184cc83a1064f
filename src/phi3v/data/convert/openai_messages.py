"""OpenAI's chat messages, as its fine-tuning takes them: texts, or lists of text and image parts.

Source: OpenAI's pages on fine-tuning and vision; Axolotl and TRL write their multimodal messages in the same way, with
``{"type": "image"}`` parts.
"""

import base64
import binascii
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..images import UnusableImageError, check_image
from ..schema import sample_error
from .conversations import (
    Message,
    Role,
    convert_records,
    each_message,
    image_paths,
    native_conversation,
    read_role,
    wrong_type,
)
from .source_images import SourceImages, shown
from .writer import Conversion, OnBadSample, name_of_content

MAX_DATA_URL_BYTES = 64 << 20
"""Largest image file that a data URL may hold; several times what the API takes, and no danger to memory."""

_ROLES: dict[str, Role] = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image_url", "input_image", "image")
_IMAGE_KEYS = ("image_url", "image", "path", "url")

_DATA_URL = re.compile(r"data:image/([a-z0-9.+-]+)(?:;[a-z0-9=._-]+)*?;base64,", re.IGNORECASE)
_SUFFIXES = {
    "avif": "avif",
    "bmp": "bmp",
    "gif": "gif",
    "jp2": "jp2",
    "jpeg": "jpg",
    "jpg": "jpg",
    "png": "png",
    "tiff": "tif",
    "webp": "webp",
}


def convert_openai_messages(
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
    """OpenAI chat messages (JSON lines) with text and image_url parts; data URLs become files.

    Args:
        source: the JSON lines file.
        output_dir: folder for the JSONL files and ``images``.
        image_dir: folder that image paths start from and that file URLs lie in (default: the source file's).
        split: name of the split, and of its file.
        val_share: share of the images, 0 to below 1, whose samples go to ``val`` instead; the same ones every time.
        on_bad_sample: ``error`` ends at the first bad sample, ``skip`` leaves bad ones out and counts them.
        copy_images: copy image files into the output folder, needed where the source has data URLs as well;
            otherwise ``images`` is a link to image_dir.
        progress: show a bar.

    Raises:
        DataError: a bad sample that is not to be skipped, no usable one, or a file or folder that is not there.
        ConfigError: val_share or split cannot be used.
    """
    return convert_records(
        source,
        output_dir,
        "openai",
        _to_native,
        image_dir=image_dir,
        split=split,
        val_share=val_share,
        on_bad_sample=on_bad_sample,
        copy_images=copy_images,
        progress=progress,
    )


def _to_native(record: dict[str, Any], label: str, images: SourceImages) -> dict[str, Any]:
    if "messages" not in record:
        keys = ", ".join(map(repr, record))
        raise sample_error(label, f"it has no 'messages'; its keys are {keys}", "Add its messages.", "missing key")
    listed = image_paths(record, label)
    num_listed = len(listed)
    messages: list[Message] = []
    for place, message in each_message(record["messages"], label):
        role = read_role(message, "role", _ROLES, place)
        content = message.get("content")
        if isinstance(content, str):
            messages.append(Message(role, (content,)))
        elif isinstance(content, list) and content:
            messages.append(_read_parts(content, role, place, listed, images))
        else:
            raise wrong_type(place, "'content'", content, "a string or a list of parts")
    if listed:
        raise sample_error(
            label,
            f"it lists {num_listed} image(s) and its parts show {num_listed - len(listed)} of them",
            'Write a part {"type": "image"} for each; `phi3v data convert sharegpt` reads texts with <image> in them.',
            "wrong image tags",
        )
    return native_conversation(messages, label)


def _read_parts(parts: list[Any], role: Role, place: str, listed: list[str], images: SourceImages) -> Message:
    """Reads a message's parts, a line feed between any two; takes images without a path of their own off ``listed``."""
    texts, names = [""], []
    for number, part in enumerate(parts, start=1):
        here = f"{place}, part {number}"
        if not isinstance(part, dict):
            raise wrong_type(here, "it", part, "an object with a 'type'")
        if number > 1:
            texts[-1] += "\n"
        kind = part.get("type")
        if kind in _TEXT_PARTS:
            if not isinstance(part.get("text"), str):
                raise wrong_type(here, "'text'", part.get("text"), "a string")
            texts[-1] += part["text"]
        elif kind in _IMAGE_PARTS:
            if role != "user":
                raise sample_error(
                    here, f"an image stands in the {role}'s message", "Only users show images.", "wrong image tags"
                )
            names.append(_place(_image_source(part, here, listed), here, images))
            texts.append("")
        else:
            known = ", ".join((*_TEXT_PARTS, *_IMAGE_PARTS))
            raise sample_error(
                here, f"a part of type {kind!r} cannot be learned here", f"Parts are {known}.", "unknown part"
            )
    return Message(role, tuple(texts), tuple(names))


def _image_source(part: dict[str, Any], place: str, listed: list[str]) -> str:
    """Returns the one URL or path of an image part, or the next of the sample's list where the part has none."""
    for key in ("file_id", "base64"):
        if part.get(key):
            raise sample_error(
                place, f"the image is given by {key!r}", "Give a path or a data URL instead.", "unknown part"
            )
    sources = [part[key] for key in _IMAGE_KEYS if part.get(key)]
    if not sources and part.get("type") == "image" and listed:
        return listed.pop(0)
    source = sources[0] if len(sources) == 1 else None
    if isinstance(source, dict):
        source = source.get("url")
    if not isinstance(source, str) or not source:
        raise sample_error(
            place,
            "the image part does not name one image",
            'Write {"type": "image_url", "image_url": {"url": "..."}}.',
            "wrong type",
        )
    return source


def _place(url: str, place: str, images: SourceImages) -> str:
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        return _decode(url, place, images)
    if scheme == "file":
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise sample_error(
                place, f"{shown(url)} lies on another machine", "Copy it here and name its path.", "image is a URL"
            )
        return images.place(unquote(parts.path), place)
    return images.place(url, place)


def _decode(url: str, place: str, images: SourceImages) -> str:
    head = _DATA_URL.match(url)
    suffix = _SUFFIXES.get(head[1].lower()) if head else None
    if head is None or suffix is None:
        raise sample_error(
            place,
            f"{shown(url)} is no data URL of an image",
            f"It must start with data:image/TYPE;base64, and the type be one of {', '.join(_SUFFIXES)}.",
            "broken data URL",
        )
    num_bytes = (len(url) - head.end()) * 3 // 4 - url[-2:].count("=")
    if num_bytes > MAX_DATA_URL_BYTES:
        raise sample_error(
            place,
            f"its data URL holds {num_bytes} bytes",
            f"At most {MAX_DATA_URL_BYTES} are read: scale the image down, or write it to a file and name that.",
            "broken data URL",
        )
    try:
        content = base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise sample_error(
            place, f"its data URL is broken ({error})", "Encode the file again with base64.", "broken data URL"
        ) from error
    name = f"{name_of_content(content)}.{suffix}"
    path = images.write(name, content)
    try:
        check_image(path, decode=True)
    except UnusableImageError as error:
        path.unlink()
        raise sample_error(place, f"the image in its data URL {error.found}", error.remedy, error.reason) from error
    return name
