"""Rows of the Cauldron, the collection that the published recipes take their data from: images, and questions on them.

Source: HuggingFaceM4/the_cauldron; images [..], texts [{user, assistant, source}, ..].
"""

from collections.abc import Iterator
from pathlib import Path

from ...errors import DataError
from ..schema import sample_error
from .hub import HubDataset, write_hub_image
from .records import SourceRecord
from .writer import NativeWriter

CAULDRON = "HuggingFaceM4/the_cauldron"
COLUMNS = ("images", "texts")


def open_part(source: str | None, name: str) -> HubDataset:
    """Opens one part of the collection.

    Args:
        source: a folder of the whole collection or of the part alone, or a data set on the hub; None: the collection's.
        name: of the part.

    Raises:
        DataError: as ``HubDataset``.
    """
    path = source or CAULDRON
    is_whole = path == CAULDRON or (Path(path) / name).is_dir()
    return HubDataset(path, name if is_whole else None)


def questions_of(record: SourceRecord) -> list[tuple[str, str]]:
    """Returns a row's questions, instruction included, as they stand, and their answers.

    Raises:
        SampleError: no question, or one that is not as the collection writes them.
    """
    texts = record.get("texts", list)
    if not texts:
        raise sample_error(record.where, "'texts' is empty", "Leave the row out.", "missing key")
    questions = []
    for number, text in enumerate(texts):
        if not isinstance(text, dict):
            raise sample_error(record.where, f"text {number} is no object", "Leave the row out.", "wrong type")
        one = SourceRecord(text, f"{record.where} text {number}")
        questions.append((one.get("user", str), one.get("assistant", str).strip()))
    return questions


def write_images_of(record: SourceRecord, num_images: int, writer: NativeWriter) -> list[str]:
    """Writes a row's images and returns their names.

    Raises:
        SampleError: there are more or fewer than ``num_images``, or one cannot be used.
    """
    images = record.get("images", list)
    if len(images) != num_images:
        raise sample_error(
            record.where, f"it has {len(images)} image(s), not {num_images}", "Leave the row out.", "number of images"
        )
    return [write_hub_image(writer, image, record.where) for image in images]


def held_out_rows(
    table: HubDataset, num_val_rows: int, *, limit: int | None, progress: bool
) -> Iterator[tuple[str, int, SourceRecord]]:
    """Yields ``(split, row number, row)``: the first rows of ``train`` are ``val``, the others ``train``.

    Args:
        table: a part of the collection, which has a single split.
        num_val_rows: rows that are held out.
        limit: how many rows of each split, from its first.
        progress: show a bar.

    Raises:
        DataError: no row is left to train on, or as ``HubDataset.rows``.
    """
    columns = table.choose_columns("train", COLUMNS)
    number = -1
    for number, record in table.rows(
        "train", columns, limit=None if limit is None else num_val_rows + limit, progress=progress
    ):
        is_val = number < num_val_rows
        if limit is None or (number if is_val else number - num_val_rows) < limit:
            yield "val" if is_val else "train", number, record
    if number < num_val_rows:
        raise DataError(
            f"the source has {number + 1} rows, and the first {num_val_rows} are held out: none is left to train on. "
            "Set a lower num_val_rows."
        )
