"""Where every converter writes: native JSONL files, whole or not at all, and the folder of their images."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

from ...errors import DataError
from ..schema import SampleError, parse_sample

OnBadSample = Literal["error", "skip"]

MAX_LISTED_PROBLEMS = 10
"""Bad records that a summary names; the others are counted."""


@dataclass(slots=True)
class Conversion:
    """What a conversion wrote.

    Attributes:
        files: JSONL file by split.
        samples: samples written, by split.
        image_dir: folder that their image paths start from.
        skipped: records left out, by reason.
        problems: messages of the first of them.
    """

    files: dict[str, Path] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    image_dir: Path = Path()
    skipped: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.files[split]}: {count} samples" for split, count in self.samples.items()]
        lines.append(f"images: {self.image_dir}")
        if self.skipped:
            lines.append("left out: " + ", ".join(f"{count} x {reason}" for reason, count in self.skipped.items()))
            lines += [f"  {problem}" for problem in self.problems]
            hidden = sum(self.skipped.values()) - len(self.problems)
            lines += [f"  and {hidden} more"] if hidden > 0 else []
        return "\n".join(lines)


class NativeWriter:
    """Writes a data set: ``OUT/NAME_SPLIT.jsonl`` and ``OUT/images``; a context manager.

    Every record is checked as ``phi3v train`` will check it. JSONL files take their names when the block ends without
    an error; before that, and after a failure, files of an earlier conversion stand as they were. Images are written
    one by one and kept: a conversion that is started again finds them.

    Args:
        output_dir: made where missing.
        name: what the files' names start with, such as ``docvqa``.
        on_bad_sample: ``error``: the first bad record ends the conversion. ``skip``: it is left out and counted.

    Attributes:
        conversion: what was written; complete once the block has ended.

    >>> import tempfile
    >>> with NativeWriter(Path(tempfile.mkdtemp()), "trees") as writer:
    ...     image = writer.write_image("oak.png", b"...")
    ...     is_written = writer.add("train", {"id": "1", "conversations": [
    ...         {"images": [image], "user": "Which tree?", "assistant": "Oak"}]}, where="list.csv:2")
    >>> writer.conversion.samples
    {'train': 1}
    """

    def __init__(self, output_dir: Path, name: str, *, on_bad_sample: OnBadSample = "error") -> None:
        self.output_dir = Path(output_dir)
        self.image_dir = self.output_dir / "images"
        self.name = name
        self.on_bad_sample = on_bad_sample
        self.conversion = Conversion(image_dir=self.image_dir)
        self._skipped: Counter[str] = Counter()
        self._open: dict[str, tuple[BinaryIO, Path]] = {}
        self._has_linked = False

    def __enter__(self) -> Self:
        """Makes the output folder.

        Raises:
            DataError: it cannot be made.
        """
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{self.output_dir}: the folder cannot be made: {error.strerror}. Choose another output_dir."
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Completes the files, or removes what a failed conversion has begun.

        Raises:
            DataError: no sample was written.
        """
        self.conversion.skipped = dict(sorted(self._skipped.items()))
        is_complete = False
        try:
            if kind is None:
                self._complete()
                is_complete = True
        finally:
            for file, temporary in self._open.values():
                file.close()
                temporary.unlink(missing_ok=True)
            if self._has_linked and not is_complete:
                self.image_dir.unlink()  # the next attempt may have another folder to link to

    def _complete(self) -> None:
        if not self.conversion.samples:
            found = f"nothing to write to {self.output_dir}: no usable record was found. Check the source."
            raise DataError("\n".join([found, *(f"  {problem}" for problem in self.conversion.problems)]))
        for file, _ in self._open.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        for split, (_, temporary) in self._open.items():
            temporary.replace(self.conversion.files[split])

    def add(self, split: str, record: Mapping[str, Any], *, where: str) -> bool:
        """Checks one native record and appends it to the split's file; says whether it was written.

        Args:
            split: ``train``, ``val``, ``test`` or another name.
            record: as docs/data.md describes a line.
            where: the place in the source, ``file:line``, for messages.

        Raises:
            SampleError: a bad record, unless those are skipped.
        """
        line = json.dumps(record, ensure_ascii=False)
        try:
            parse_sample(line, where)
        except SampleError as error:
            self.skip(error)
            return False
        if split not in self._open:
            target = self.output_dir / f"{self.name}_{split}.jsonl"
            temporary = target.with_name(f".{target.name}.writing")
            self._open[split] = temporary.open("wb"), temporary
            self.conversion.files[split] = target
            self.conversion.samples[split] = 0
        self._open[split][0].write(line.encode() + b"\n")
        self.conversion.samples[split] += 1
        return True

    def skip(self, error: SampleError) -> None:
        """Counts a bad record, or raises its error where bad records are not to be left out."""
        if self.on_bad_sample == "error":
            raise error
        self.leave_out(error)

    def leave_out(self, error: SampleError) -> None:
        """Counts a record that is not converted, whatever ``on_bad_sample`` says: the source knows no answer to it."""
        self._skipped[error.reason] += 1
        if len(self.conversion.problems) < MAX_LISTED_PROBLEMS:
            self.conversion.problems.append(str(error))

    def write_image(self, name: str, content: bytes) -> str:
        """Writes an encoded image file to ``OUT/images/name``, whole or not at all, and returns ``name``.

        A file of the same size that is there already stays: it is an earlier conversion's.

        Raises:
            DataError: the file would lie in a folder that ``OUT/images`` is a link to, or elsewhere outside.
        """
        return self._keep(name, len(content), lambda file: file.write_bytes(content))

    def use_images(self, folder: Path) -> None:
        """Makes ``OUT/images`` a link to an existing image folder; nothing is copied. A failed conversion unmakes it.

        Raises:
            DataError: no such folder, ``OUT/images`` is something else already, or no link can be made.
        """
        if not folder.is_dir():
            raise DataError(
                f"{folder}: the image folder is not there. Name the folder that the image paths start from."
            )
        folder = folder.resolve()
        if self.image_dir.is_dir() and self.image_dir.resolve() == folder:
            return
        if self.image_dir.is_symlink() or self.image_dir.exists():
            raise DataError(
                f"{self.image_dir} is there already and is not {folder}. Take it away or choose another output_dir."
            )
        try:
            self.image_dir.symlink_to(folder, target_is_directory=True)
        except OSError as error:
            raise DataError(
                f"{self.image_dir}: no link can be made here: {error.strerror}. Set copy_images."
            ) from error
        self._has_linked = True

    def copy_image(self, source: Path, name: str) -> str:
        """Copies an image file to ``OUT/images/name`` unless a file of its size is there, and returns ``name``.

        Raises:
            DataError: as ``write_image``.
        """
        return self._keep(name, source.stat().st_size, lambda file: shutil.copyfile(source, file))

    def refuse_link(self) -> None:
        """Makes sure that ``OUT/images`` is this data set's own folder, before anything is written to it.

        Raises:
            DataError: it is a link.
        """
        if self.image_dir.is_symlink():
            raise DataError(
                f"{self.image_dir} is a link, which an earlier conversion may have made, and images are not written "
                "through it. Take the link away or choose another output_dir."
            )

    def _keep(self, name: str, num_bytes: int, write: Callable[[Path], object]) -> str:
        """Writes ``OUT/images/name`` whole or not at all, unless a file of its size is there; returns ``name``."""
        self.refuse_link()
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(
                f"image {name!r} would be written outside {self.image_dir}. Correct its name in the source."
            )
        target = self.image_dir / name
        if not (target.is_file() and target.stat().st_size == num_bytes):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{os.getpid()}.writing")
            write(temporary)
            temporary.replace(target)
        return name


def name_of_content(content: bytes) -> str:
    """Returns a file name without ending for an image that has none of its own; the same image gets the same."""
    return hashlib.sha256(content).hexdigest()[:32]
