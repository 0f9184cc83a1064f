"""DocVQA: questions about scanned pages, answered with text that stands on them."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from ...errors import DataError
from ..schema import SampleError, sample_error
from . import cauldron
from .hub import HubDataset, write_hub_image
from .records import SourceRecord, check_counts, release_files, release_image_folders
from .source_images import SourceImages
from .writer import Conversion, NativeWriter, OnBadSample

MINI = "nielsr/docvqa_1200_examples"
PUBLISHED = "lmms-lab/DocVQA"
CONFIGS = {cauldron.CAULDRON: "docvqa", PUBLISHED: "DocVQA"}
"""Which part of a hub data set is DocVQA, where it has several."""

TRAIN = {"mini": (MINI, "train"), "full": (cauldron.CAULDRON, "train")}
VALIDATION = {"mini": (MINI, "test"), "full": (PUBLISHED, "validation")}
"""Data set and split by the words of ``subset`` and ``validation``."""

FILES = {"train": ("train_v1.0_withQT.json", "train_v1.0.json"), "val": ("val_v1.0_withQT.json", "val_v1.0.json")}
"""Files of the release, by split; its test split has no answers."""

FOLDERS = (".", "spdocvqa_qas", "train", "val")
PAGE_FOLDERS = ("documents", "spdocvqa_images")
"""What the folder of the pages is called: in the pages' paths always the first, in the newer archives the second."""

_MINI_COLUMNS = ("image", "query", "answers")
_PUBLISHED_COLUMNS = ("image", "questionId", "question", "answers")


class _Part(NamedTuple):
    """One split of a hub data set, and the split that it becomes."""

    table: HubDataset
    split: str
    target: str


def convert_docvqa(
    source: str | None,
    output_dir: Path,
    *,
    subset: Literal["mini", "full"] = "mini",
    validation: Literal["mini", "full"] = "mini",
    suffix: str = "Answer briefly.",
    image_dir: Path | None = None,
    copy_images: bool = False,
    on_bad_sample: OnBadSample = "error",
    limit: int | None = None,
    progress: bool = True,
) -> Conversion:
    """Convert DocVQA, questions about scanned pages: from the hub, or the original release on disk.

    Every question is a sample of its own; questions about one page name the same image file.

    Args:
        source: folder or JSON file of the original release, folder of a hub data set, or owner/name on the hub
            (default: the hub data sets that subset and validation name).
        output_dir: folder of the converted data.
        subset: training set without a source: 1,000 questions (mini) or the Cauldron's 39,463 (full).
        validation: validation set without a source: 200 questions (mini) or the published 5,349 (full).
        suffix: instruction on a line of its own after every question; the Cauldron's questions hold theirs.
        image_dir: folder of the release's pages, or the one that holds its "documents" (default: found near the
            JSON file).
        copy_images: copy a release's pages into the output folder; otherwise its "images" is a link to them.
        on_bad_sample: end with the first bad record, or leave bad ones out and count them.
        limit: records of each split that are read, from the first (default: all).
        progress: show bars.

    Raises:
        ConfigError: a limit below 1, or the ``datasets`` library is missing.
        DataError: the source cannot be read or is another data set; or a bad record, unless those are skipped.
    """
    check_counts(limit=limit)
    files = {} if source is None else release_files(source, FILES, FOLDERS)
    with NativeWriter(output_dir, "docvqa", on_bad_sample=on_bad_sample) as writer:
        if files:
            _convert_release(
                files,
                writer,
                suffix=suffix,
                image_dir=image_dir,
                copy_images=copy_images,
                limit=limit,
                progress=progress,
            )
        else:
            parts = _published_parts(subset, validation) if source is None else _parts_of(source)
            for part in parts:
                _convert_part(part, writer, suffix, limit, progress)
    return writer.conversion


def _published_parts(subset: str, validation: str) -> list[_Part]:
    wanted = {"train": TRAIN[subset], "val": VALIDATION[validation]}
    tables = {path: HubDataset(path, CONFIGS.get(path)) for path, _ in wanted.values()}
    return [_Part(tables[path], split, target) for target, (path, split) in wanted.items()]


def _parts_of(source: str) -> list[_Part]:
    in_folder = (config for config in CONFIGS.values() if (Path(source) / config).is_dir())
    table = HubDataset(source, CONFIGS.get(source) or next(in_folder, None))
    # Where nothing is called validation, what is held out is called test.
    targets = {"train": "train", "validation": "val", "test": "test" if "validation" in table.columns else "val"}
    return [_Part(table, split, target) for split, target in targets.items() if split in table.columns] or [
        _Part(table, "train", "train")
    ]


def _convert_part(part: _Part, writer: NativeWriter, suffix: str, limit: int | None, progress: bool) -> None:
    table, split, target = part
    columns = table.choose_columns(split, cauldron.COLUMNS, _PUBLISHED_COLUMNS, _MINI_COLUMNS)
    unanswered = set()
    if split == "test" and columns == _PUBLISHED_COLUMNS:  # its answers may be secret: then no page need be read
        num_rows = 0
        for number, record in table.rows(split, ["answers"], limit=limit, progress=progress):
            num_rows += 1
            if not any(record.values["answers"] or ()):
                unanswered.add(number)
                found, remedy = "the answers of this question are not public", "It cannot be trained on or scored."
                writer.leave_out(sample_error(record.where, found, remedy, "no published answer"))
        if len(unanswered) == num_rows:
            return
    for number, record in table.rows(split, columns, limit=limit, progress=progress):
        if number in unanswered:
            continue
        try:
            samples = _samples_of_row(record, number, columns, target, suffix, writer)
        except SampleError as error:
            writer.skip(error)
            continue
        for sample in samples:
            writer.add(target, sample, where=record.where)


def _samples_of_row(
    record: SourceRecord, number: int, columns: tuple[str, ...], target: str, suffix: str, writer: NativeWriter
) -> list[dict[str, Any]]:
    if columns == cauldron.COLUMNS:
        questions = cauldron.questions_of(record)
        (page,) = cauldron.write_images_of(record, 1, writer)
        return [
            _sample(f"{target}-{number}-{place}", page, user, [answer])
            for place, (user, answer) in enumerate(questions)
        ]
    if columns == _MINI_COLUMNS:
        name = str(number)
        question = SourceRecord(record.get("query", dict), f"{record.where} 'query'").get("en", str)
    else:
        name, question = record.get_id("questionId"), record.get("question", str)
    answers = record.get_answers("answers")
    page = write_hub_image(writer, record.values["image"], record.where)
    return [_sample(f"{target}-{name}", page, _with_suffix(question, suffix), answers)]


def _convert_release(
    files: dict[str, Path],
    writer: NativeWriter,
    *,
    suffix: str,
    image_dir: Path | None,
    copy_images: bool,
    limit: int | None,
    progress: bool,
) -> None:
    names = PAGE_FOLDERS if image_dir is None else (*PAGE_FOLDERS, ".")
    root, folders = release_image_folders(files, dict.fromkeys(files, names), image_dir, "pages")
    images = SourceImages(writer, root, copy_images=copy_images)
    for target, file in files.items():
        records = islice(_release_questions(file), limit)
        for record in tqdm(records, desc=f"converting {file.name}", unit=" questions", disable=not progress):
            try:
                name = record.get_id("questionId")
                question, answers = record.get("question", str), record.get_answers("answers")
                page = record.get("image", str).removeprefix(f"{PAGE_FOLDERS[0]}/")
                page = images.place(str(folders[target] / page), record.where)
            except SampleError as error:
                writer.skip(error)
                continue
            sample = _sample(f"{target}-{name}", page, _with_suffix(question, suffix), answers)
            writer.add(target, sample, where=record.where)


def _release_questions(file: Path) -> Iterator[SourceRecord]:
    """Yields the questions of a release's JSON file: ``{"data": [question, ..]}``.

    Raises:
        DataError: the file is not of that form.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}. Name a file that this user may read.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: broken JSON: {error.msg}. Fetch the release again.") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, nested too deeply
        raise DataError(f"{file}: broken JSON: {error}. Fetch the release again.") from error
    questions = content.get("data") if isinstance(content, dict) else None
    if not isinstance(questions, list):
        keys = f"an object with the keys {', '.join(content)}" if isinstance(content, dict) else "no object"
        raise DataError(f"{file}: it holds {keys}; the release's has a list of questions, 'data'. Name that file.")
    for number, question in enumerate(questions):
        where = f"{file}: data[{number}]"
        yield SourceRecord(question if isinstance(question, dict) else {}, where)


def _with_suffix(question: str, suffix: str) -> str:
    return f"{question}\n{suffix}" if suffix else question


def _sample(name: str, page: str, user: str, answers: list[str]) -> dict[str, Any]:
    turn = {"images": [page], "user": user, "assistant": answers[0], "answers": answers}
    return {"id": f"docvqa-{name}", "source": "docvqa", "conversations": [turn]}
