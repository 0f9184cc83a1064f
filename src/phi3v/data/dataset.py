"""JSONL files and their images as a data set that stays on disk."""

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

from PIL import Image
from torch.utils.data import Dataset

from ..errors import DataError
from .images import UnusableImageError, check_image, read_image
from .jsonl import JsonlFile, index_file
from .schema import Sample, parse_sample, quoted, sample_error

T = TypeVar("T")


class ConversationDataset(Dataset[Sample]):
    """Samples of one or several JSONL files, in file order.

    Only byte offsets are held, so memory does not grow with the length of the lines. Safe to share between threads and
    to hand to worker processes, forked or spawned.

    Args:
        paths: JSONL files.
        image_dir: folder that image paths are relative to and may not leave. Default, for each file: ``images`` beside
            it where that exists, else the file's own folder.

    Attributes:
        left_out: positions, among all lines that hold a sample, of those left out by ``check_dataset`` or
            ``leave_out``; ascending. They count neither in ``len`` nor in indices.

    Raises:
        DataError: a file or the image folder is missing, a line is over ``MAX_LINE_BYTES``, or there is no sample at
            all.
    """

    def __init__(self, paths: Path | str | Sequence[Path | str], image_dir: Path | str | None = None) -> None:
        listed = [paths] if isinstance(paths, str | Path) else list(paths)
        if not listed:
            raise DataError("no data file was given. Name at least one JSONL file.")
        self._files = [index_file(Path(path), None if image_dir is None else Path(image_dir)) for path in listed]
        self._ends = list(accumulate(len(file.offsets) for file in self._files))
        if not self._ends[-1]:
            raise DataError(f"{', '.join(map(str, listed))}: no sample found. Write one JSON object a line.")
        self._image_dirs = {str(file.path): file.image_dir for file in self._files}
        self._kept: array | None = None
        self.left_out: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.num_lines if self._kept is None else len(self._kept)

    def __getitem__(self, index: int) -> Sample:
        """Returns a sample that was not left out.

        Raises:
            IndexError: ``index`` is not in 0 .. len - 1.
            SampleError: the line is bad; ``check_dataset`` finds that beforehand.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.read_line(index if self._kept is None else self._kept[index])

    @property
    def num_lines(self) -> int:
        """Lines that hold a sample, left out or not."""
        return self._ends[-1]

    def read_line(self, position: int) -> Sample:
        """Returns the sample at a position among all lines, left out or not.

        Raises:
            SampleError: the line is bad.
        """
        file, index = self._locate(position)
        where = file.where(index)
        try:
            text = file.read(index).decode()
        except UnicodeDecodeError as error:
            raise sample_error(
                where,
                f"byte {error.start + 1} of the line is not UTF-8",
                "Save the file as UTF-8.",
                "broken text",
            ) from error
        return parse_sample(text, where)

    @property
    def image_dirs(self) -> list[str]:
        """Folders that images may lie in, absolute and with links followed, each once, in the order of the files."""
        return list(dict.fromkeys(str(file.image_dir) for file in self._files))

    def leave_out(self, positions: Iterable[int]) -> None:
        """Leaves out the samples at these positions among all lines, and only those."""
        left_out = frozenset(positions)
        self.left_out = tuple(sorted(left_out))
        kept = (position for position in range(self.num_lines) if position not in left_out)
        self._kept = array("Q", kept) if left_out else None

    def image_path(self, sample: Sample, name: str) -> Path:
        """Returns where an image of a sample lies, links followed.

        Raises:
            SampleError: the path leaves the image folder, by itself or through a link.
        """
        folder = self._image_dirs[sample.where.rpartition(":")[0]]
        try:
            path = (folder / name).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a link to itself, a null byte
            raise sample_error(
                sample.label, f"image path {quoted(name)} leads nowhere ({error})", "Correct the path.", "missing image"
            ) from error
        if not path.is_relative_to(folder):
            raise sample_error(
                sample.label,
                f"image path {quoted(name)} leads outside the image folder {folder}, to {path}",
                "Move or copy the image into that folder, or set image_dir to a folder that holds all images.",
                "image outside the image folder",
            )
        return path

    def load_images(self, sample: Sample, upto_turn: int | None = None) -> list[Image.Image]:
        """Decodes a sample's images as ``read_image`` does, in the order of ``sample.images``.

        Args:
            sample: a sample of this data set.
            upto_turn: only those of the turns up to and including this zero-based one, as a prompt needs them.

        Raises:
            SampleError: an image is missing, damaged, too large or outside the image folder.
        """
        turns = sample.turns if upto_turn is None else sample.turns[: upto_turn + 1]
        return [self.load_image(sample, name) for turn in turns for name in turn.images]

    def load_image(self, sample: Sample, name: str) -> Image.Image:
        """Decodes one image of a sample as ``read_image`` does.

        Raises:
            SampleError: as ``load_images``.
        """
        return self._open(sample, name, read_image)

    def image_size(self, sample: Sample, name: str) -> tuple[int, int]:
        """Returns the (h, w) px of one image of a sample from its header.

        Raises:
            SampleError: as ``load_images``.
        """
        return self._open(sample, name, lambda path: check_image(path, decode=False))

    def image_sizes(
        self, sample: Sample, check: Callable[[Path], tuple[int, int]] = lambda path: check_image(path, decode=False)
    ) -> list[tuple[int, int]]:
        """Returns the (h, w) px of a sample's images, in the order of ``sample.images``.

        Args:
            sample: a sample of this data set.
            check: reads one file's size; default from its header alone.

        Raises:
            SampleError: as ``load_images``.
        """
        return [self._open(sample, name, check) for name in sample.images]

    def fingerprint(self) -> str:
        """Returns a hash of the files' contents in order, and of what was left out: equal means the same samples.

        Paths, times and the images' pixels do not enter.
        """
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(file.digest)
        if self._kept is not None:
            digest.update(self._kept.tobytes())
        return digest.hexdigest()

    def _locate(self, position: int) -> tuple[JsonlFile, int]:
        file_index = bisect_right(self._ends, position)
        first = self._ends[file_index - 1] if file_index else 0
        return self._files[file_index], position - first

    def _open(self, sample: Sample, name: str, read: Callable[[Path], T]) -> T:
        path = self.image_path(sample, name)
        try:
            return read(path)
        except UnusableImageError as error:
            raise sample_error(
                sample.label, f"image {quoted(name)} {error.found}", error.remedy, error.reason
            ) from error
