"""Files that are whole or as they were, and JSON that every reader reads."""

import errno
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""What some programs write in front of UTF-8."""

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space on the disk, none left of the user's share of it, or a file over the largest size that is allowed."""

_FULL_DISK_TEXT = re.compile(r"No space left on device|Disk quota exceeded|File too large|os error (28|122|27)\b")


def is_full_disk(error: Exception) -> bool:
    """Says whether an error is a full disk's, as the system names it or as a library hands it on in words."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL_DISK
    return bool(_FULL_DISK_TEXT.search(str(error)))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes ``value`` as indented JSON, whole or not at all; numbers that are not finite become null."""
    text = json.dumps(_plain(value), ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    write_atomically(path, encode(text))


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one line of JSON a row, whole or not at all; numbers that are not finite become null."""
    write_atomically(path, b"".join(json_line(row) for row in rows))


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that a kill or a power cut leaves the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Forces a file that is written to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes a rename in ``folder`` survive a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_line(row: Mapping[str, Any]) -> bytes:
    """Returns a line of JSON; numbers that are not finite become null."""
    return encode(json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n")


def encode(text: str) -> bytes:
    """Returns text as UTF-8."""
    # A lone surrogate, which UTF-8 cannot hold, becomes \udXXX: within a JSON string that is its own escape.
    return text.encode("utf-8", errors="backslashreplace")


def _plain(value: Any) -> Any:
    """Turns numpy scalars, paths and tuples into what JSON has, and numbers that are not finite into None."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value
