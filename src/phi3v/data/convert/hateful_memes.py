"""Hateful Memes: whether a picture and the words on it are hateful together."""

from collections import Counter
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..schema import SampleError, sample_error
from . import cauldron
from .hub import HubDataset
from .records import SourceRecord, check_counts, release_files, release_records
from .source_images import SourceImages
from .writer import Conversion, NativeWriter, OnBadSample

CAULDRON_PART = "hateful_memes"

FILES = {
    "train": ("train.jsonl",),
    "val": ("dev_seen.jsonl", "dev.jsonl"),
    "val_unseen": ("dev_unseen.jsonl",),
    "test": ("test_seen.jsonl", "test.jsonl"),
    "test_unseen": ("test_unseen.jsonl",),
}
"""Files of the release, by split: of the challenge's second phase or, where those are not there, of its first."""

QUESTION = "Is this meme hateful? Answer Yes or No."
LABELS = ("Yes", "No")
"""Answers to ``QUESTION``. The first is the positive one wherever probabilities are scored."""


def convert_hateful_memes(
    source: str | None,
    output_dir: Path,
    *,
    use_text: bool = False,
    num_val_rows: int = 500,
    image_dir: Path | None = None,
    copy_images: bool = False,
    on_bad_sample: OnBadSample = "error",
    limit: int | None = None,
    progress: bool = True,
) -> Conversion:
    """Convert Hateful Memes: from the hub (the Cauldron), or the original release on disk.

    Args:
        source: folder or JSON lines file of the original release, folder of the Cauldron, or owner/name on the hub
            (default: the Cauldron on the hub).
        output_dir: folder of the converted data.
        use_text: write the words on a release's meme into the question as well.
        num_val_rows: first rows of the Cauldron that become val, as in the published recipe; the release has a split
            of its own.
        image_dir: folder that the release's image paths start from (default: the JSON lines file's).
        copy_images: copy a release's images into the output folder; otherwise its "images" is a link to them.
        on_bad_sample: end with the first bad record, or leave bad ones out and count them.
        limit: records of each split that are read, from the first (default: all).
        progress: show bars.

    Raises:
        ConfigError: a count below 1, or the ``datasets`` library is missing.
        DataError: the source cannot be read or is another data set; or a bad record, unless those are skipped.
    """
    check_counts(limit=limit, num_val_rows=num_val_rows)
    files = {} if source is None else release_files(source, FILES)
    with NativeWriter(output_dir, "hateful_memes", on_bad_sample=on_bad_sample) as writer:
        if files:
            folder = next(iter(files.values())).parent if image_dir is None else image_dir
            images = SourceImages(writer, folder, copy_images=copy_images)
            for split, file in files.items():
                for record in release_records(file, writer, limit=limit, progress=progress):
                    _convert_meme(record, split, images, writer, use_text)
        else:
            table = cauldron.open_part(source, CAULDRON_PART)
            _convert_cauldron(table, writer, num_val_rows, limit, progress)
    return writer.conversion


def _convert_cauldron(
    table: HubDataset, writer: NativeWriter, num_val_rows: int, limit: int | None, progress: bool
) -> None:
    labels = _labels(table, progress)
    for split, number, record in cauldron.held_out_rows(table, num_val_rows, limit=limit, progress=progress):
        try:
            question, answer = cauldron.questions_of(record)[0]
            names = cauldron.write_images_of(record, 1, writer)
        except SampleError as error:
            writer.skip(error)
            continue
        writer.add(split, _sample(f"{split}-{number}", names[0], question, answer, labels), where=record.where)


def _labels(table: HubDataset, progress: bool) -> list[str]:
    """Returns the answers to the rows' first questions, that which says yes first.

    Raises:
        DataError: there are not two of them.
    """
    table.choose_columns("train", cauldron.COLUMNS)
    counts: Counter[str] = Counter()
    for _, record in table.rows("train", ["texts"], progress=progress):
        try:
            counts[cauldron.questions_of(record)[0][1]] += 1
        except SampleError:
            continue  # the rows are read again, and the bad one is reported with its image
    if len(counts) != 2:
        found = ", ".join(f"{answer!r} ({count} x)" for answer, count in counts.most_common(5))
        raise DataError(
            f"the answers to the first question of each row must be two, and they are {len(counts)}: {found}. Name the "
            "Cauldron's part hateful_memes."
        )
    return sorted(counts, key=lambda answer: (not answer.lower().startswith("yes"), answer))


def _convert_meme(record: SourceRecord, split: str, images: SourceImages, writer: NativeWriter, use_text: bool) -> None:
    if split.startswith("test") and "label" not in record.values:
        writer.leave_out(
            sample_error(record.where, "no label was published with it", "It cannot be scored.", "no published answer")
        )
        return
    try:
        name, label = record.get_id("id"), record.get("label", int)
        if label not in (0, 1):
            raise sample_error(record.where, f"'label' is {label}", "It must be 0 or 1.", "wrong label")
        words = f'The words on it: "{record.get("text", str)}"\n' if use_text else ""
        image = images.place(record.get("img", str), record.where)
    except SampleError as error:
        writer.skip(error)
        return
    answer = LABELS[0] if label == 1 else LABELS[1]
    writer.add(split, _sample(f"{split}-{name}", image, words + QUESTION, answer, list(LABELS)), where=record.where)


def _sample(name: str, image: str, user: str, answer: str, labels: list[str]) -> dict[str, Any]:
    turn = {"images": [image], "user": user, "assistant": answer, "labels": labels}
    return {"id": f"hateful_memes-{name}", "source": "hateful_memes", "conversations": [turn]}
