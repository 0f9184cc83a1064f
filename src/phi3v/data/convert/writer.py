"""Where every converter writes: native JSONL files, whole or not at all, and the folder of their images."""

import glob
import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

from ...errors import DataError
from ..schema import SampleError, parse_sample, quoted

OnBadSample = Literal["error", "skip"]

MAX_LISTED_PROBLEMS = 10
"""Bad records that a summary names; the others are counted."""

_SPLIT_FILE = r"_((?:train|val|test)(?:_unseen)?)\.jsonl"
"""Behind the data set's name: what conversions call their splits. Other files in the folder are somebody's own."""

_KEY_BYTES = 8


@dataclass(slots=True)
class Conversion:
    """What a conversion wrote.

    Attributes:
        files: JSONL file by split.
        samples: samples written, by split.
        image_dir: folder that their image paths start from.
        others: files of the data set that an earlier conversion wrote and this one did not; they share no sample.
        skipped: records left out, by reason.
        problems: messages of the first of them.
    """

    files: dict[str, Path] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    image_dir: Path = Path()
    others: list[Path] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.files[split]}: {count} samples" for split, count in self.samples.items()]
        lines.append(f"images: {self.image_dir}")
        if self.others:
            lines.append(f"left as they were, of an earlier conversion: {', '.join(map(str, self.others))}")
        if self.skipped:
            lines.append("left out: " + ", ".join(f"{count} x {reason}" for reason, count in self.skipped.items()))
            lines += [f"  {problem}" for problem in self.problems]
            hidden = sum(self.skipped.values()) - len(self.problems)
            lines += [f"  and {hidden} more"] if hidden > 0 else []
        return "\n".join(lines)


class NativeWriter:
    """Writes a data set: ``OUT/NAME_SPLIT.jsonl`` and ``OUT/images``; a context manager.

    Every record is checked as ``phi3v train`` will check it. JSONL files take their names when the block ends without
    an error; before that, and after a failure, files of an earlier conversion stand as they were. A split that only the
    earlier one wrote stays too, unless samples of it are now in another split: that is refused, for training on one and
    scoring on the other would go unnoticed. Images are written one by one and kept: a conversion that is started again
    finds them. One conversion at a time writes to a folder.

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
        self._lock: int | None = None

    def __enter__(self) -> Self:
        """Makes the output folder, and takes away what a killed conversion has begun in it.

        Raises:
            DataError: it cannot be made, or another conversion is writing to it.
        """
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"{self.output_dir}: the folder cannot be made: {error.strerror}. Choose another output_dir."
            ) from error
        self._lock = _lock_folder(self.output_dir)
        if self._lock is not None:  # else they may be a conversion's that is still going
            for left in self.output_dir.glob(f".{glob.escape(self.name)}_*.writing"):
                left.unlink()
            if not self.image_dir.is_symlink():
                for left in self.image_dir.rglob(".*.writing"):
                    left.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Completes the files, or removes what a failed conversion has begun.

        Raises:
            DataError: no sample was written, or some are in a file of an earlier conversion as well.
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
            if self._lock is not None:
                os.close(self._lock)

    def _complete(self) -> None:
        if not self.conversion.samples:
            found = f"nothing to write to {self.output_dir}: no usable record was found. Check the source."
            raise DataError("\n".join([found, *(f"  {problem}" for problem in self.conversion.problems)]))
        for file, _ in self._open.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._compare_with_others()
        for split, (_, temporary) in self._open.items():
            temporary.replace(self.conversion.files[split])

    def _compare_with_others(self) -> None:
        """Notes the files of splits that this conversion did not write, and refuses what would leak out of training.

        Raises:
            DataError: the same sample would stand in train and in another split.
        """
        files = set(self.conversion.files.values())
        name = re.compile(re.escape(self.name) + _SPLIT_FILE)
        for other in sorted(path for path in self.output_dir.iterdir() if path not in files):
            match = name.fullmatch(other.name)
            if match is None:
                continue
            theirs = {key for sample in _samples_in(other) for key in _keys_of(sample)}
            for split, (_, temporary) in self._open.items():
                if (split == "train") == (match.group(1) == "train"):
                    continue  # sets to score may overlap: the seen and the unseen of Hateful Memes do
                ours = _samples_in(temporary)
                if same := next((one for one in ours if not theirs.isdisjoint(_keys_of(one))), None):
                    raise DataError(
                        f"{other} is an earlier conversion's and holds samples that are now in {split}, such as "
                        f"{quoted(same['id'])}: one would be scored on what the other trains. Take the file away, or "
                        "choose another output_dir."
                    )
            self.conversion.others.append(other)

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
            temporary = target.with_name(f".{target.name}.{os.getpid()}.writing")
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

        A file of this content that is there already stays: it is an earlier conversion's.

        Raises:
            DataError: the file would lie in a folder that ``OUT/images`` is a link to, or elsewhere outside.
        """
        target = self._target(name)
        is_there = target.is_file() and target.stat().st_size == len(content) and target.read_bytes() == content
        if not is_there:
            with _whole(target) as temporary:
                temporary.write_bytes(content)
        return name

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
        """Copies an image file, its time of change included, to ``OUT/images/name``, and returns ``name``.

        A file of the same size and time that is there already stays: it is an earlier conversion's.

        Raises:
            DataError: as ``write_image``.
        """
        target, wanted = self._target(name), source.stat()
        found = target.stat() if target.is_file() else None
        if found is None or (found.st_size, found.st_mtime_ns) != (wanted.st_size, wanted.st_mtime_ns):
            with _whole(target) as temporary:
                shutil.copyfile(source, temporary)
                os.utime(temporary, ns=(wanted.st_atime_ns, wanted.st_mtime_ns))
        return name

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

    def _target(self, name: str) -> Path:
        """Returns where an image is to be written.

        Raises:
            DataError: that is outside ``OUT/images``, or behind a link.
        """
        self.refuse_link()
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(
                f"image {name!r} would be written outside {self.image_dir}. Correct its name in the source."
            )
        return self.image_dir / name


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """Gives a file to write, which becomes ``target`` at the end of the block; its folder is made where missing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.writing")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _lock_folder(folder: Path) -> int | None:
    """Keeps other conversions out of a folder until the file descriptor that it returns is closed.

    None: this system cannot lock folders, as some network file systems cannot. Names of files being written hold the
    process's id, so that two conversions do not write into one file then.

    Raises:
        DataError: another conversion has the folder.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise DataError(
            f"{folder}: another conversion is writing to this folder. Wait for its end, or choose another output_dir."
        ) from error
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _samples_in(file: Path) -> Iterator[dict[str, Any]]:
    """Yields the samples of a native file; lines that are none are passed over."""
    with file.open("rb") as lines:
        for line in lines:
            try:
                parse_sample(line.decode(), str(file))
            except (SampleError, UnicodeDecodeError):
                continue
            yield json.loads(line)


def _keys_of(sample: Mapping[str, Any]) -> list[bytes]:
    """Returns digests, one of which a later conversion of the same sample has too, also with other options.

    Those are the images with the id, or with the question; without images, the id with the question.
    """
    turns = sample["conversations"]
    images = [name for turn in turns for name in turn.get("images") or ()]
    named = [("id", sample["id"]), ("user", turns[0]["user"])]
    parts = [[images, one] for one in named] if images else [named]
    return [hashlib.blake2b(json.dumps(part).encode(), digest_size=_KEY_BYTES).digest() for part in parts]


def name_of_content(content: bytes) -> str:
    """Returns a file name without ending for an image that has none of its own; the same image gets the same."""
    return hashlib.sha256(content).hexdigest()[:32]
