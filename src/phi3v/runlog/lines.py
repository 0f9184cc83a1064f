"""Logs that grow by one line of JSON a call, and survive a kill in the middle of one."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from phi3v.errors import DataError
from phi3v.files import json_line


def append_line(path: Path, line: Mapping[str, Any], *, is_synced: bool) -> None:
    """Appends one JSON line. It reaches the operating system before the call returns, so a kill cannot lose it."""
    encoded = json_line(line)
    with path.open("ab+") as file:
        _repair_tail(file)
        file.write(encoded)
        if is_synced:
            file.flush()
            os.fsync(file.fileno())


def _repair_tail(file: BinaryIO) -> None:
    """Ends the file with a whole line: completes a last one that lacks its newline only, removes a partial one."""
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    content = file.read()
    start_of_tail = content.rfind(b"\n") + 1
    if _parse_object(content[start_of_tail:]) is None:
        file.truncate(start_of_tail)
    else:
        file.write(b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a log; empty when there is none. A partial last line is passed over.

    Raises:
        DataError: another line is no JSON object.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    # Split at newline bytes only: str.splitlines would also split at separators that JSON strings may hold.
    *whole_lines, tail = content.split(b"\n")
    rows = []
    for number, line in enumerate(whole_lines, start=1):
        if not line.strip():
            continue
        row = _parse_object(line)
        if row is None:
            raise DataError(f"{path}:{number}: not a JSON object: {_excerpt(line)}; remove that line")
        rows.append(row)
    last_row = _parse_object(tail)
    return rows if last_row is None else [*rows, last_row]


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads a file that holds one JSON object; None when there is none.

    Raises:
        DataError: it holds something else.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    loaded = _parse_object(content)
    if loaded is None:
        raise DataError(f"{path}: not a JSON object: {_excerpt(content)}; remove it or restore the file the run wrote")
    return loaded


def _parse_object(content: bytes) -> dict[str, Any] | None:
    """Reads a JSON object; None for anything else. A part of an object is never one: it lacks its last brace."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _excerpt(content: bytes) -> str:
    return repr(content[:80].decode("utf-8", errors="replace"))
