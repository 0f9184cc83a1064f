"""A JSONL file by its lines: where each sample lies, so that none has to stay in memory."""

import hashlib
import os
from array import array
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from ..files import BYTE_ORDER_MARK

MAX_LINE_BYTES = 64 * 2**20
"""Longest line of a data file, bytes. A line is one conversation; a longer one is another format's file, a JSON array
on one line for instance, and would be held in memory whole."""


@dataclass(frozen=True, slots=True)
class JsonlFile:
    """Where a file's samples lie.

    Attributes:
        path: as the user gave it.
        image_dir: resolved folder that its image paths may not leave.
        offsets: byte offset of each line that is not blank; 8 bytes a sample is all that memory holds.
        blanks: for every blank line, the number of samples before it; gives line numbers back.
        stamp: (size in bytes, modification time in ns) when the index was made.
        digest: SHA-256 of the content.
    """

    path: Path
    image_dir: Path
    offsets: array
    blanks: array
    stamp: tuple[int, int]
    digest: bytes

    def where(self, index: int) -> str:
        """Returns ``file:line`` of a sample."""
        return f"{self.path}:{index + 1 + bisect_right(self.blanks, index)}"

    def read(self, index: int) -> bytes:
        """Returns a sample's line, without a byte order mark.

        The file is opened anew each time: threads and processes may share an index.

        Raises:
            DataError: the file was changed or taken away after its index was made.
        """
        where = self.where(index)
        try:
            with self.path.open("rb") as file:
                if _stamp(file.fileno()) != self.stamp:
                    raise DataError(
                        f"{where}: the file was changed while it was in use. Start again with the new file."
                    )
                file.seek(self.offsets[index])
                return file.readline().removeprefix(BYTE_ORDER_MARK)
        except OSError as error:
            raise DataError(f"{where}: cannot be read any more: {error}. Put the file back and start again.") from error


def index_file(path: Path, image_dir: Path | None) -> JsonlFile:
    """Finds a file's samples: reads it once, line by line.

    Args:
        path: the file.
        image_dir: as ``ConversationDataset``'s.

    Raises:
        DataError: the file or the image folder cannot be read, or a line is over ``MAX_LINE_BYTES``.
    """
    if image_dir is None:
        beside = path.parent / "images"
        image_dir = beside if beside.is_dir() else path.parent
    elif not image_dir.is_dir():
        raise DataError(f"{image_dir}: the image folder is not there. Set image_dir to the folder of the images.")
    offsets, blanks = array("Q"), array("Q")
    digest = hashlib.sha256()
    offset = 0
    try:
        with path.open("rb") as file:
            stamp = _stamp(file.fileno())
            while line := file.readline(MAX_LINE_BYTES + 1):
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{path}:{len(offsets) + len(blanks) + 1}: the line is longer than {MAX_LINE_BYTES // 2**20} "
                        "MiB, so this is no JSONL file. Write one JSON object a line, or convert the file "
                        "(phi3v data convert)."
                    )
                digest.update(line)
                if line.removeprefix(BYTE_ORDER_MARK).strip():
                    offsets.append(offset)
                else:
                    blanks.append(len(offsets))
                offset += len(line)
    except OSError as error:
        raise DataError(
            f"{path}: the data file cannot be read: {error.strerror}. Name an existing JSONL file."
        ) from error
    return JsonlFile(path, image_dir.resolve(), offsets, blanks, stamp, digest.digest())


def _stamp(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns
