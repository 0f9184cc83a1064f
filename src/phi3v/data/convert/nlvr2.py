"""NLVR2: whether a sentence is true of two photographs."""

from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import DataError
from ..schema import SampleError, sample_error
from . import cauldron
from .records import SourceRecord, check_counts, release_files, release_image_folders, release_records
from .source_images import SourceImages
from .writer import Conversion, NativeWriter, OnBadSample

CAULDRON_PART = "nlvr2"

FILES = {"train": ("train.json",), "val": ("dev.json",), "test": ("test1.json",)}
"""Files of the release, by split."""

FOLDERS = (".", "data")
IMAGE_FOLDERS = {"train": ("images/train", "train"), "val": ("dev", "images/dev"), "test": ("test1", "images/test1")}
"""Where a split's images lie in the release's image folder."""

QUESTION = "Is this true of the two images? Answer True or False."
LABELS = ("True", "False")
"""Answers to ``QUESTION``. The first is the positive one wherever probabilities are scored."""


def convert_nlvr2(
    source: str | None,
    output_dir: Path,
    *,
    num_val_rows: int = 500,
    image_dir: Path | None = None,
    copy_images: bool = False,
    on_bad_sample: OnBadSample = "error",
    limit: int | None = None,
    progress: bool = True,
) -> Conversion:
    """Convert NLVR2, sentences about two photographs: from the hub (the Cauldron), or the original release on disk.

    A row of the Cauldron becomes one conversation, whose turns are the row's questions; of a row that is held out the
    first question is taken. Both are the published recipe's way. Every sentence of the release is a sample of its own.

    Args:
        source: folder or JSON file of the original release, folder of the Cauldron, or owner/name on the hub
            (default: the Cauldron on the hub).
        output_dir: folder of the converted data.
        num_val_rows: first rows of the Cauldron that become val, as in the published recipe; the release has a split
            of its own.
        image_dir: folder that holds the release's image folders "train", "dev" and "test1", or "images/train"
            (default: found near the JSON files).
        copy_images: copy a release's images into the output folder; otherwise its "images" is a link to them.
        on_bad_sample: end with the first bad record, or leave bad ones out and count them.
        limit: records of each split that are read, from the first (default: all).
        progress: show bars.

    Raises:
        ConfigError: a count below 1, or the ``datasets`` library is missing.
        DataError: the source cannot be read or is another data set; or a bad record, unless those are skipped.
    """
    check_counts(limit=limit, num_val_rows=num_val_rows)
    files = {} if source is None else release_files(source, FILES, FOLDERS)
    with NativeWriter(output_dir, "nlvr2", on_bad_sample=on_bad_sample) as writer:
        if files:
            _convert_release(files, writer, image_dir, copy_images, limit, progress)
        else:
            table = cauldron.open_part(source, CAULDRON_PART)
            for split, number, record in cauldron.held_out_rows(table, num_val_rows, limit=limit, progress=progress):
                _convert_row(record, number, split, writer)
    return writer.conversion


def _convert_row(record: SourceRecord, number: int, split: str, writer: NativeWriter) -> None:
    try:
        questions = cauldron.questions_of(record)
        images = cauldron.write_images_of(record, 2, writer)
    except SampleError as error:
        writer.skip(error)
        return
    turns: list[dict[str, Any]] = [
        {"user": question, "assistant": answer} for question, answer in (questions[:1] if split == "val" else questions)
    ]
    turns[0]["images"] = images
    writer.add(split, _sample(f"{split}-{number}", *turns), where=record.where)


def _convert_release(
    files: dict[str, Path],
    writer: NativeWriter,
    image_dir: Path | None,
    copy_images: bool,
    limit: int | None,
    progress: bool,
) -> None:
    files = _without_bare_test(files, writer, image_dir, limit)
    root, folders = release_image_folders(files, IMAGE_FOLDERS, image_dir, "images")
    images = SourceImages(writer, root, copy_images=copy_images)
    for split, file in files.items():
        for record in release_records(file, writer, limit=limit, progress=progress):
            try:
                name, turn = _turn(record, folders[split], images)
            except SampleError as error:
                writer.skip(error)
                continue
            writer.add(split, _sample(name, turn), where=record.where)


def _without_bare_test(
    files: dict[str, Path], writer: NativeWriter, image_dir: Path | None, limit: int | None
) -> dict[str, Path]:
    """Returns the files but for the test split's if its images are not there: the release has them apart.

    Its sentences are counted as left out. A file that was named itself stays.
    """
    if len(files) == 1 or "test" not in files:
        return files
    test = {"test": files["test"]}
    try:
        release_image_folders(test, IMAGE_FOLDERS, image_dir, "images")
    except DataError as error:
        for _ in release_records(files["test"], writer, limit=limit, progress=False):
            writer.leave_out(SampleError(str(error), "test split without its images"))
        return {split: file for split, file in files.items() if split != "test"}
    return files


def _turn(record: SourceRecord, folder: PurePosixPath, images: SourceImages) -> tuple[str, dict[str, Any]]:
    """Returns a sentence's identifier and its turn.

    Raises:
        SampleError: a field or an image is missing, or is not what it should be.
    """
    sentence, label, name = (record.get(key, str) for key in ("sentence", "label", "identifier"))
    if label not in LABELS:
        raise sample_error(record.where, f"'label' is {label!r}", f"It must be {' or '.join(LABELS)}.", "wrong label")
    pair, dash, _ = name.rpartition("-")
    if not dash:
        raise sample_error(
            record.where,
            f"'identifier' is {name!r}",
            "It must be like dev-850-0-0, whose last number is the sentence's.",
            "wrong identifier",
        )
    if "directory" in record.values:
        folder = folder / record.get_id("directory")
    shown = [images.place(str(folder / f"{pair}-img{side}.png"), record.where) for side in (0, 1)]
    turn = {"images": shown, "user": f"{sentence}\n{QUESTION}", "assistant": label, "labels": list(LABELS)}
    return name, turn


def _sample(name: str, *turns: dict[str, Any]) -> dict[str, Any]:
    return {"id": f"nlvr2-{name}", "source": "nlvr2", "conversations": list(turns)}
