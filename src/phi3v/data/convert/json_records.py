"""The records of a JSON file, an array or JSON lines, one at a time: what is held never grows with the file."""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import DataError
from ...files import BYTE_ORDER_MARK
from ..schema import SampleError, sample_error

CHUNK_BYTES = 1 << 20
"""How much of an array is read at once; a longer record is read on until it ends."""

_SPACE = re.compile(r"[ \t\r\n]*")
_LONGEST_TOKEN = len(r"\ud83d\ude00")  # of what may be cut at a window's end and is then reported from its start
_DECODER = json.JSONDecoder()


def read_json_records(path: Path, on_bad_record: Callable[[SampleError], None]) -> Iterator[tuple[str, Any]]:
    """Yields ``(file:line, value)`` for each element of a JSON array, or for each line of a JSON lines file.

    The first character tells which of the two it is. Blank lines are passed over, a byte order mark is dropped, and the
    line is the one on which a record begins.

    Args:
        path: an existing file; its name does not matter.
        on_bad_record: takes the error of a line that cannot be read. In an array, where no one knows what follows a
            broken record, the reading ends instead.

    Raises:
        DataError: the file cannot be opened, or an array is broken.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Name a file that this user may read.") from error
    with file:
        is_array = _first_character(file) == b"["
        file.seek(0)
        yield from _array_elements(path, file) if is_array else _lines(path, file, on_bad_record)


def _first_character(file: BinaryIO) -> bytes:
    start = file.read(len(BYTE_ORDER_MARK)).removeprefix(BYTE_ORDER_MARK)
    while not (text := start.lstrip()):
        if not (start := file.read(CHUNK_BYTES)):
            break
    return text[:1]


def _lines(path: Path, file: BinaryIO, on_bad_record: Callable[[SampleError], None]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        if not content.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(content.decode())
        except UnicodeDecodeError as error:
            found, remedy = f"byte {error.start + 1} of the line is not UTF-8", "Save the file as UTF-8."
            on_bad_record(sample_error(where, found, remedy, "broken text"))
        except (ValueError, RecursionError) as error:  # broken, a number of thousands of digits, nested too deeply
            remedy = "A file holds one JSON object a line, or one JSON array of objects."
            on_bad_record(sample_error(where, f"broken JSON: {error}", remedy, "broken JSON"))
        else:
            yield where, value


def _array_elements(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    window = _Window(path, file)
    window.take()
    if window.peek() == "]":
        window.take()
    else:
        while True:
            window.peek()
            yield f"{path}:{window.line}", window.take_value()
            separator = window.take()
            if separator == "]":
                break
            if separator != ",":
                raise window.error(
                    f"{separator!r} follows a record, not a comma or ]" if separator else "the array has no end"
                )
    if window.peek():
        raise window.error(f"{window.peek()!r} follows the end of the array")


class _Window:
    """The stretch of a JSON text that is being read.

    Attributes:
        line: number of the line that the next character stands on, counted from 1.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.line = 1
        self._path = path
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._position = 0
        self._is_complete = False

    def peek(self) -> str:
        """Returns the next character that is not white space, or an empty string at the end."""
        while True:
            space = _SPACE.match(self._text, self._position)
            assert space is not None
            self._advance(space.end())
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read_on():
                return ""

    def take(self) -> str:
        """Returns what ``peek`` does and passes over it."""
        character = self.peek()
        self._advance(self._position + len(character))
        return character

    def take_value(self) -> Any:
        """Returns the JSON value that begins here and passes over it."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                line = self.line + self._text.count("\n", self._position, error.pos)
                # The text may end inside the value: then the fault lies at its end, or at the start of what is cut.
                is_near_end = error.pos >= len(self._text) - _LONGEST_TOKEN
                may_be_cut = is_near_end or error.msg.startswith("Unterminated string")
                if may_be_cut and self._read_on():
                    continue
                if may_be_cut and self._position == len(self._text):
                    raise self.error("the array has no end") from error
                raise self.error(f"broken JSON: {error.msg}", line) from error
            except (ValueError, RecursionError) as error:
                raise self.error(f"broken JSON: {error}") from error
            if end < len(self._text) or not self._read_on():  # a number that ends with the text may go on after it
                self._advance(end)
                return value

    def error(self, found: str, line: int | None = None) -> DataError:
        """Returns the error of an array that cannot be read on."""
        return DataError(
            f"{self._path}:{self.line if line is None else line}: {found}. The file must be one whole JSON array of "
            "objects, or one JSON object a line. Write or fetch it again: what follows this place cannot be read."
        )

    def _advance(self, position: int) -> None:
        self.line += self._text.count("\n", self._position, position)
        self._position = position

    def _read_on(self) -> bool:
        """Adds to the text what follows in the file, as much again as is left to read; False at its end."""
        if self._is_complete:
            return False
        chunk = self._file.read(max(CHUNK_BYTES, len(self._text) - self._position))
        try:
            added = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            before = self._text.count("\n", self._position) + error.object.count(b"\n", 0, error.start)
            raise self.error("a byte is not UTF-8", self.line + before) from error
        self._is_complete = not chunk
        self._text = self._text[self._position :] + added
        self._position = 0
        return bool(chunk)
