"""Tables: one question about one or several images a row, from CSV, TSV or what a spreadsheet exports."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from ...errors import ConfigError, DataError
from ...files import BYTE_ORDER_MARK
from ..schema import SampleError, sample_error
from .source_images import SourceImages, SplitChoice, data_set_name, source_file
from .writer import Conversion, NativeWriter, OnBadSample

MAX_LABELS = 1000
"""Most different answers that ``labels`` takes for a closed set; every sample repeats them all."""

MAX_CELL_CHARS = 2**24
"""Longest cell that is read, characters: longer than any sample that can be trained on. A quote that never ends makes
the rest of a table one cell."""

_DELIMITERS = {".tsv": "\t", ".tab": "\t"}
_DELIMITER_NAMES = {"tab": "\t", "\\t": "\t"}
_OTHER_DELIMITERS = (",", ";", "\t", "|")


def convert_csv(
    source: str,
    output_dir: Path,
    *,
    image_column: str = "image",
    question_column: str = "question",
    question: str | None = None,
    answer_column: str = "answer",
    answers_column: str | None = None,
    id_column: str | None = None,
    labels: bool = False,
    separator: str = "|",
    delimiter: str | None = None,
    image_dir: Path | None = None,
    split: str = "train",
    val_share: float = 0.0,
    on_bad_sample: OnBadSample = "error",
    copy_images: bool = False,
    progress: bool = True,
) -> Conversion:
    """A CSV or TSV table with a header: an image, a question and an answer a row.

    Args:
        source: the table, UTF-8.
        output_dir: folder for the JSONL files and ``images``.
        image_column: column of image paths; several in a cell are shown in order.
        question_column: column of questions.
        question: one question for all rows, instead of a column.
        answer_column: column of answers to learn.
        answers_column: column of further answers that scoring accepts.
        id_column: column of ids (default: the file's name and the row's line).
        labels: take the table's different answers as the closed set that every question allows.
        separator: what stands between several images, and between further answers, in a cell.
        delimiter: what stands between cells; ``tab`` for a tab (default: a tab in .tsv and .tab files, else a comma).
        image_dir: folder that image paths start from (default: the table's).
        split: name of the split, and of its file.
        val_share: share of the images, 0 to below 1, whose samples go to ``val`` instead; the same ones every time.
        on_bad_sample: ``error`` ends at the first bad row, ``skip`` leaves bad ones out and counts them.
        copy_images: copy the images into the output folder; otherwise ``images`` is a link to image_dir.
        progress: show a bar.

    Raises:
        DataError: no such column, a bad row that is not to be skipped, no usable one, a broken table, or a file or
            folder that is not there.
        ConfigError: options that cannot be used.
    """
    path = source_file(source)
    choice = SplitChoice(split, val_share)
    if not separator:
        raise ConfigError("separator is empty. Give what stands between several images in a cell.")
    wanted = {"image_column": image_column, "answer_column": answer_column}
    if question is None:
        wanted["question_column"] = question_column
    wanted |= {"answers_column": answers_column} if answers_column else {}
    wanted |= {"id_column": id_column} if id_column else {}
    table = _Table(path, _delimiter(path, delimiter), wanted)
    classes = _distinct_answers(table, answer_column) if labels else None

    def to_native(row: "_Row", images: SourceImages) -> dict[str, Any]:
        cells = row.cells(table.columns)
        sample_id = cells[id_column].strip() if id_column else f"{path.stem}-{row.line}"
        label = f"{row.where}: sample {sample_id!r}"
        names = [images.place(name, label) for name in _listed(cells[image_column], separator)]
        if not names:
            raise sample_error(
                label, f"its cell {image_column!r} is empty", "Name an image, or take the row out.", "missing image"
            )
        turn: dict[str, Any] = {
            "images": names,
            "user": cells[question_column].strip() if question is None else question,
            "assistant": cells[answer_column].strip(),
        }
        if answers_column and (further := _listed(cells[answers_column], separator)):
            turn["answers"] = further
        if classes:
            turn["labels"] = classes
        return {"id": sample_id, "conversations": [turn]}

    with NativeWriter(output_dir, data_set_name(path.stem, split, "csv"), on_bad_sample=on_bad_sample) as writer:
        images = SourceImages(writer, path.parent if image_dir is None else image_dir, copy_images=copy_images)
        for row in tqdm(table.rows(), desc=f"converting {path.name}", unit=" rows", disable=not progress):
            try:
                native = to_native(row, images)
            except SampleError as error:
                writer.skip(error)
                continue
            shown_images = native["conversations"][0]["images"]
            writer.add(choice.choose(shown_images, native["id"]), native, where=row.where)
    return writer.conversion


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of a table.

    Attributes:
        path: the table.
        line: number of the line in the file on which it begins.
        values: its cells; lines in them end with a line feed alone.
    """

    path: Path
    line: int
    values: list[str]

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"

    def cells(self, columns: list[str]) -> dict[str, str]:
        """Returns the cells by column.

        Raises:
            SampleError: more or fewer cells than columns.
        """
        if len(self.values) != len(columns):
            raise sample_error(
                self.where,
                f"the row has {len(self.values)} cells and the header {len(columns)}",
                'Put cells that hold the delimiter into quotes, "..", or mend the row.',
                "wrong number of cells",
            )
        return dict(zip(columns, self.values, strict=True))


class _Table:
    """A CSV file with a header, read row by row.

    Args:
        path: the file.
        delimiter: one character.
        wanted: columns that must be there, by the option that names them.

    Attributes:
        path: the file.
        columns: names of all columns, in order.

    Raises:
        DataError: an empty file, or a column that is missing or there twice.
    """

    def __init__(self, path: Path, delimiter: str, wanted: dict[str, str]) -> None:
        self.path = path
        self._delimiter = delimiter
        header = next(self._read(), None)
        if header is None:
            raise DataError(f"{path}: the table is empty. Its first row names the columns.")
        self.columns = [name.strip() for name in header.values]
        for option, name in wanted.items():
            if self.columns.count(name) != 1:
                raise DataError(f"{header.where}: {self._missing(option, name)}")

    def rows(self) -> Iterator[_Row]:
        """Yields every row after the header that has text in any cell.

        Raises:
            DataError: a quote that never ends, or text that is not UTF-8.
        """
        rows = self._read()
        next(rows)
        return rows

    def _read(self) -> Iterator[_Row]:
        with self.path.open("rb") as file:
            reader = csv.reader(self._lines(file), delimiter=self._delimiter, strict=True)
            while True:
                line = reader.line_num + 1
                others_limit = csv.field_size_limit(MAX_CELL_CHARS)  # one limit for all readers of the process
                try:
                    values = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    raise DataError(
                        f"{self.path}:{line}: the row that begins here cannot be read, up to line {reader.line_num}: "
                        f'{error}. A quote that stands for itself is written twice, ""; a quoted cell ends with a '
                        "quote."
                    ) from error
                finally:
                    csv.field_size_limit(others_limit)
                if any(value.strip() for value in values):
                    yield _Row(self.path, line, [value.replace("\r\n", "\n") for value in values])

    def _lines(self, file: BinaryIO) -> Iterator[str]:
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            try:
                yield content.decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{self.path}:{number}: byte {error.start + 1} of the line is not UTF-8. Save the table as UTF-8 "
                    "(in a spreadsheet: CSV UTF-8)."
                ) from error

    def _missing(self, option: str, name: str) -> str:
        if self.columns.count(name) > 1:
            return f"the header has the column {name!r} twice. Rename one of the two."
        only = self.columns[0]
        others = [mark for mark in _OTHER_DELIMITERS if mark != self._delimiter and mark in only]
        if len(self.columns) == 1 and others:
            return f"the header is one cell, {only!r}. Its cells may be separated by {others[0]!r}: set delimiter."
        remedy = f"Name the right one with {option}" + (
            ", or give one question for all rows with question." if option == "question_column" else "."
        )
        return f"the table has no column {name!r}. Its columns are {', '.join(map(repr, self.columns))}. {remedy}"


def _delimiter(path: Path, given: str | None) -> str:
    if given is None:
        return _DELIMITERS.get(path.suffix.lower(), ",")
    delimiter = _DELIMITER_NAMES.get(given, given)
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise ConfigError(f"delimiter is {given!r}. It must be one character other than a quote, or the word tab.")
    return delimiter


def _listed(cell: str, separator: str) -> list[str]:
    return [item.strip() for item in cell.split(separator) if item.strip()]


def _distinct_answers(table: _Table, answer_column: str) -> list[str]:
    """Returns the different answers of a table in sorted order; rows of a wrong width have none."""
    position = table.columns.index(answer_column)
    found: set[str] = set()
    for row in table.rows():
        if len(row.values) == len(table.columns) and (answer := row.values[position].strip()):
            found.add(answer)
        if len(found) > MAX_LABELS:
            raise DataError(
                f"{row.where}: the column {answer_column!r} holds more than {MAX_LABELS} different answers, which "
                "is no closed set. Convert the table without labels."
            )
    if len(found) < 2:
        raise DataError(
            f"{table.path}: labels needs at least two different answers, and the column {answer_column!r} has "
            f"{len(found)}. Convert the table without labels."
        )
    return sorted(found)
