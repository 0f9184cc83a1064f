"""Original releases on disk: their files, and records whose missing and mistyped fields are named with their place."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from tqdm import tqdm

from ...errors import ConfigError, DataError
from ..schema import sample_error
from .json_records import read_json_records
from .writer import NativeWriter

T = TypeVar("T")

_KINDS = {str: "text", int: "a whole number", list: "a list", dict: "an object"}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_MAX_SHOWN_CHARS = 60


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """One record of a source: a line of JSON, an element of an array, a row of a table.

    Attributes:
        values: what it holds, by name.
        where: its place, for messages.
    """

    values: Mapping[str, Any]
    where: str

    def get(self, key: str, kind: type[T]) -> T:
        """Returns a field that must be there.

        Raises:
            SampleError: it is not, or is of another type.
        """
        if key not in self.values:
            raise sample_error(
                self.where,
                f"there is no {key!r} among {', '.join(map(repr, self.values)) or 'no fields at all'}",
                "Convert the release as it was published, or add the field.",
                "missing key",
            )
        value = self.values[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            shown = repr(value) if len(repr(value)) <= _MAX_SHOWN_CHARS else repr(value)[:_MAX_SHOWN_CHARS] + ".."
            raise sample_error(
                self.where, f"{key!r} is {shown}", f"It must be {_KINDS[kind]}, as in the release.", "wrong type"
            )
        return value

    def get_id(self, key: str) -> str:
        """Returns a field that names the record: text, or a whole number.

        Raises:
            SampleError: as ``get``.
        """
        value = self.values.get(key)
        return value if isinstance(value, str) else str(self.get(key, int))

    def get_answers(self, key: str) -> list[str]:
        """Returns a list of accepted answers, white space around them taken off: a chat would lose it.

        Raises:
            SampleError: as ``get``; or there is none, or one of them is no text or empty.
        """
        answers = self.get(key, list)
        if not answers:
            raise sample_error(
                self.where, f"{key!r} is empty", "A question needs an answer; leave it out.", "empty answer"
            )
        for answer in answers:
            if not isinstance(answer, str):
                raise sample_error(self.where, f"{key!r} holds {answer!r}", "Answers must be text.", "wrong type")
            if not answer.strip():
                raise sample_error(
                    self.where, f"{key!r} holds an empty answer", "Take it out of the list.", "empty answer"
                )
        return [answer.strip() for answer in answers]


def check_counts(**counts: int | None) -> None:
    """Refuses numbers of records that are not whole and at least 1; None stands for all.

    Raises:
        ConfigError: such a number.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"{name} is {count}; give a whole number, at least 1")


def release_files(source: str, names: Mapping[str, Sequence[str]], folders: Sequence[str] = (".",)) -> dict[str, Path]:
    """Finds the files of an original release on disk.

    Args:
        source: the release's folder, or one of its files.
        names: the names that a split's file may have, the preferred one first.
        folders: folders of the release that may hold them.

    Returns:
        File by split; none where ``source`` is to be read as a hub data set: a folder with Parquet files, or no path
        on this machine.

    Raises:
        DataError: a file that is none of the release's, a folder that holds none, or a path that leads nowhere.
    """
    path = Path(source)
    listed = ", ".join(name for of_split in names.values() for name in of_split)
    if path.is_file():
        for split, of_split in names.items():
            if path.name in of_split:
                return {split: path}
        raise DataError(f"{source}: not a file of the release. Its files are named {listed}.")
    if not path.is_dir():
        if not _HUB_NAME.fullmatch(source):
            raise DataError(
                f"{source}: no such file or folder. Name the release's folder, or a data set as owner/name."
            )
        return {}
    found: dict[str, Path] = {}
    for split, of_split in names.items():
        places = (path / folder / name for name in of_split for folder in folders)
        if file := next((place for place in places if place.is_file()), None):
            found[split] = file
    if not found and next(path.rglob("*.parquet"), None) is None:
        raise DataError(
            f"{source}: the release's files are not there ({listed}), nor any Parquet file. Name the folder that "
            "holds one of them."
        )
    return found


def release_image_folders(
    files: Mapping[str, Path], names: Mapping[str, Sequence[str]], image_dir: Path | None, what: str
) -> tuple[Path, dict[str, PurePosixPath]]:
    """Finds where the images of a release's files lie: in a folder beside the file, or beside the file's folder.

    Args:
        files: file by split, at least one.
        names: what a split's folder may be called, the preferred name first.
        image_dir: look in this folder alone.
        what: the images, in a message's words.

    Returns:
        A folder that holds them all, and each split's folder relative to it.

    Raises:
        DataError: a split has no such folder.
    """
    folders: dict[str, Path] = {}
    for split, file in files.items():
        beside = file.absolute().parent
        around = [beside, beside.parent] if image_dir is None else [image_dir.absolute()]
        places = [folder / name for folder in around for name in names[split]]
        found = next((place for place in places if place.is_dir()), None)
        if found is None:
            raise DataError(
                f"{file}: the folder of its {what} is not there (looked for {', '.join(map(str, places))}). Unpack the "
                "release's images, or set image_dir to the folder that holds them."
            )
        folders[split] = found
    root = image_dir or Path(os.path.commonpath([folder.parent for folder in folders.values()]))
    return root, {
        split: PurePosixPath(Path(os.path.relpath(folder, root)).as_posix()) for split, folder in folders.items()
    }


def release_records(path: Path, writer: NativeWriter, *, limit: int | None, progress: bool) -> Iterator[SourceRecord]:
    """Yields the objects of a JSON lines file, or of a JSON array; bad lines go to ``writer.skip``.

    Args:
        path: the file.
        writer: takes the bad lines.
        limit: how many to read, from the first.
        progress: show a bar.

    Raises:
        DataError: the file cannot be read; or a bad line, unless those are skipped.
    """
    records = islice(read_json_records(path, writer.skip), limit)
    for where, value in tqdm(records, desc=f"converting {path.name}", unit=" records", disable=not progress):
        if isinstance(value, dict):
            yield SourceRecord(value, where)
        else:
            writer.skip(sample_error(where, "the record is no JSON object", "Write one object a line.", "wrong type"))
