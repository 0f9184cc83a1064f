"""Where every converter writes: native JSONL files, whole or not at all, and the folder of their images."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
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

    def __enter__(self) -> Self:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Completes the files, or removes what a failed conversion has begun.

        Raises:
            DataError: no sample was written.
        """
        self.conversion.skipped = dict(sorted(self._skipped.items()))
        for file, _ in self._open.values():
            if kind is None:
                file.flush()
                os.fsync(file.fileno())
            file.close()
        for split, (_, temporary) in self._open.items():
            if kind is None:
                temporary.replace(self.conversion.files[split])
            else:
                temporary.unlink(missing_ok=True)
        if kind is None and not self.conversion.samples:
            raise DataError(
                "\n".join(
                    [
                        f"nothing to write to {self.output_dir}: no usable record was found. Check the source.",
                        *(f"  {problem}" for problem in self.conversion.problems),
                    ]
                )
            )

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
        self._skipped[error.reason] += 1
        if len(self.conversion.problems) < MAX_LISTED_PROBLEMS:
            self.conversion.problems.append(str(error))

    def write_image(self, name: str, content: bytes) -> str:
        """Writes an encoded image file to ``OUT/images/name``, whole or not at all, and returns ``name``.

        A file of the same size that is there already stays: it is an earlier conversion's.
        """
        target = self.image_dir / name
        if not (target.is_file() and target.stat().st_size == len(content)):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{os.getpid()}.writing")
            temporary.write_bytes(content)
            temporary.replace(target)
        return name

    def use_images(self, folder: Path) -> None:
        """Makes ``OUT/images`` a link to an existing image folder; nothing is copied.

        Raises:
            DataError: no such folder, or ``OUT/images`` is something else already.
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
        self.image_dir.symlink_to(folder, target_is_directory=True)

    def copy_image(self, source: Path, name: str) -> str:
        """Copies an image file to ``OUT/images/name`` unless a file of its size is there, and returns ``name``."""
        target = self.image_dir / name
        if not (target.is_file() and target.stat().st_size == source.stat().st_size):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{os.getpid()}.writing")
            shutil.copyfile(source, temporary)
            temporary.replace(target)
        return name
