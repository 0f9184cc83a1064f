"""Folders of images, one a class: ``CLASS/IMAGE``, or ``SPLIT/CLASS/IMAGE``, as torchvision's ImageFolder has them."""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ...errors import ConfigError, DataError
from ..images import IMAGE_FORMATS
from ..schema import SampleError, sample_error
from .csv_table import MAX_LABELS
from .source_images import SourceImages, SplitChoice, data_set_name
from .writer import Conversion, NativeWriter, OnBadSample

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""Folders that are splits and not classes, where all folders of a tree are, and the splits they become."""

_MAX_LINK_DEPTH = 2
"""Folders below which links to folders are not followed: classes may be links, and links in circles end."""


def convert_image_folders(
    source: str,
    output_dir: Path,
    *,
    question: str = "Classify the image.",
    labels: bool = True,
    underscores_to_spaces: bool = False,
    split: str = "train",
    val_share: float = 0.0,
    on_bad_sample: OnBadSample = "error",
    copy_images: bool = False,
    progress: bool = True,
) -> Conversion:
    """A folder of images for each class, with or without a folder for each split around them.

    Args:
        source: the folder that holds the class folders, or the folders train, val and test that do.
        output_dir: folder for the JSONL files and ``images``.
        question: what every sample asks; ``{classes}`` in it becomes the list of classes.
        labels: write the classes into every sample as the closed set of its answers, which scoring reads.
        underscores_to_spaces: answer ``golden retriever`` for the folder ``golden_retriever``.
        split: name of the split of a tree without split folders.
        val_share: share of the train images, 0 to below 1, that go to ``val`` instead; the same ones every time.
        on_bad_sample: ``error`` ends at the first image outside a class folder, ``skip`` leaves those out and counts
            them. Files of other types are always left out and counted.
        copy_images: copy the images into the output folder; otherwise ``images`` is a link to the source.
        progress: show a bar.

    Raises:
        DataError: a misplaced image that is not to be skipped, fewer than two classes, two classes of one name, or no
            such folder.
        ConfigError: val_share or split cannot be used.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(f"{source}: is no folder. Name the folder that holds the class folders.")
    if output_dir.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"output_dir {output_dir} lies in {source}, among the classes. Choose a folder outside it.")
    choice = SplitChoice(split, val_share)
    paths, others = _scan(folder)
    tops = {path.partition("/")[0] for path in paths if "/" in path}
    has_splits = bool(tops) and all(top.lower() in SPLIT_NAMES for top in tops)
    if has_splits:
        choice = SplitChoice("train", val_share)
        if val_share and any(SPLIT_NAMES[top.lower()] == "val" for top in tops):
            raise ConfigError(f"val_share is {val_share}, but {source} has a folder of validation images already.")
    depth = 2 if has_splits else 1
    classes = _class_names(
        {path.split("/")[depth - 1] for path in paths if path.count("/") == depth}, underscores_to_spaces, source
    )
    answers = list(classes.values())
    if labels and len(answers) > MAX_LABELS:
        raise DataError(
            f"{source}: {len(answers)} classes are too many to repeat in every sample (over {MAX_LABELS}). Convert it "
            "without labels; scores then compare the answers that the model writes."
        )
    closed_set = {"labels": answers} if labels else {}
    user = question.replace("{classes}", ", ".join(answers))
    with NativeWriter(
        output_dir, data_set_name(folder.resolve().name, choice.split, "images"), on_bad_sample=on_bad_sample
    ) as writer:
        images = SourceImages(writer, folder, copy_images=copy_images)
        for path in tqdm(paths, desc=f"converting {folder.name}", unit=" images", disable=not progress):
            where = str(folder / path)
            try:
                if path.count("/") != depth:
                    raise _misplaced_error(where, "SPLIT/CLASS/IMAGE" if has_splits else "CLASS/IMAGE")
                name = images.place(path, where)
            except SampleError as error:
                writer.skip(error)
                continue
            *before, class_folder, _ = path.split("/")
            own_split = SPLIT_NAMES[before[0].lower()] if before else split
            turn = {"images": [name], "user": user, "assistant": classes[class_folder], **closed_set}
            writer.add(
                choice.choose([name], path) if own_split == choice.split else own_split,
                {"id": path, "conversations": [turn]},
                where=where,
            )
        for path in others:
            writer.leave_out(_other_file_error(str(folder / path)))
    return writer.conversion


def _scan(folder: Path) -> tuple[list[str], list[str]]:
    """Returns images and other files below a folder, as sorted paths relative to it with / between their parts.

    Hidden files and folders are passed over.
    """
    images, others = [], []
    for path in _files(folder, "", 0):
        (images if Path(path).suffix.lower() in _image_suffixes() else others).append(path)
    return sorted(images), sorted(others)


def _files(folder: Path, prefix: str, depth: int) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):  # what editors and systems leave behind, copies of images among it
                continue
            if entry.is_dir() and (depth < _MAX_LINK_DEPTH or not entry.is_symlink()):
                yield from _files(folder / entry.name, f"{prefix}{entry.name}/", depth + 1)
            else:
                yield prefix + entry.name


@cache
def _image_suffixes() -> frozenset[str]:
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in IMAGE_FORMATS)


def _class_names(folders: set[str], underscores_to_spaces: bool, source: str) -> dict[str, str]:
    """Returns the answer for each class folder, in sorted order."""
    if len(folders) < 2:
        found = f"only {', '.join(folders)}" if folders else "none"
        raise DataError(
            f"{source}: a classification needs images in at least two class folders, and there is {found}. "
            "Name the folder that holds CLASS/IMAGE or SPLIT/CLASS/IMAGE."
        )
    names: dict[str, str] = {}
    for folder in sorted(folders):
        name = folder.replace("_", " ").strip() if underscores_to_spaces else folder
        if name in names.values():
            raise DataError(f"{source}: two class folders are called {name!r} without underscores. Rename one.")
        names[folder] = name
    return names


def _other_file_error(where: str) -> SampleError:
    return sample_error(
        where,
        "the file is no image by its name",
        f"Images end in {', '.join(sorted(_image_suffixes()))}.",
        "no image file",
    )


def _misplaced_error(where: str, layout: str) -> SampleError:
    return sample_error(
        where, "the image is not in a class folder", f"Move it so that its path is {layout}.", "misplaced image"
    )
