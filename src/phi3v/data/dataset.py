"""JSONL files and their images as a data set that stays on disk, and the check that every sample passes beforehand."""

import hashlib
import os
from array import array
from bisect import bisect_right
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeVar

from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from ..errors import DataError
from .encode import OVERLONG, SampleEncoder
from .images import UnusableImageError, check_image, read_image
from .packing import CostRecorder
from .processes import default_num_workers
from .schema import Sample, SampleError, parse_sample, quoted, sample_error

MAX_LISTED_PROBLEMS = 10
"""Bad samples that an error or a summary names beside the first; enough to see a pattern."""

REMEMBERED_IMAGES = 65_536
"""Images whose findings the data check keeps, so that a page with many questions is decoded once."""

MAX_LINE_BYTES = 64 * 2**20
"""Longest line of a data file, bytes. A line is one conversation; a longer one is another format's file, a JSON array
on one line for instance, and would be held in memory whole."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _JsonlFile:
    """Where a file's samples lie.

    Attributes:
        path: as the user gave it.
        image_dir: resolved folder that its image paths may not leave.
        offsets: byte offset of each line that is not blank; 8 bytes a sample is all that memory holds.
        blanks: for every blank line, the number of samples before it; gives line numbers back.
        stamp: (size in bytes, modification time in ns) when the index was made.
        digest: SHA-256 of the content.
    """

    path: Path
    image_dir: Path
    offsets: array
    blanks: array
    stamp: tuple[int, int]
    digest: bytes

    def where(self, index: int) -> str:
        """Returns ``file:line`` of a sample."""
        return f"{self.path}:{index + 1 + bisect_right(self.blanks, index)}"

    def read(self, index: int) -> bytes:
        """Returns a sample's line. The file is opened anew each time: threads and processes may share an index.

        Raises:
            DataError: the file was changed or taken away after its index was made.
        """
        where = self.where(index)
        try:
            with self.path.open("rb") as file:
                if _stamp(file.fileno()) != self.stamp:
                    raise DataError(
                        f"{where}: the file was changed while it was in use. Start again with the new file."
                    )
                file.seek(self.offsets[index])
                return file.readline()
        except OSError as error:
            raise DataError(f"{where}: cannot be read any more: {error}. Put the file back and start again.") from error


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
        self._files = [_index_file(Path(path), None if image_dir is None else Path(image_dir)) for path in listed]
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
            text = file.read(index).removeprefix(_BYTE_ORDER_MARK).decode()
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

    def _locate(self, position: int) -> tuple[_JsonlFile, int]:
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


@dataclass(slots=True)
class DataSummary:
    """What the data check found. Sums are over the samples that stay.

    Attributes:
        samples: samples that stay.
        turns: their question and answer pairs.
        images: places of images in them; an image named twice counts twice.
        crops: crops that CLIP computes for them, global views included.
        tokens: their decoder positions, image tokens included.
        max_tokens: those of the longest.
        supervised_tokens: positions that the loss counts.
        skipped: bad samples left out, by reason.
        dropped: over-long samples left out.
        cut: over-long samples whose text is cut.
        problems: messages of the first samples skipped.
    """

    samples: int = 0
    turns: int = 0
    images: int = 0
    crops: int = 0
    tokens: int = 0
    max_tokens: int = 0
    supervised_tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    dropped: int = 0
    cut: int = 0
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain JSON values."""
        return asdict(self)


def check_dataset(
    dataset: ConversationDataset,
    encoder: SampleEncoder,
    *,
    on_bad_sample: Literal["error", "skip"] = "error",
    decode_images: bool = True,
    num_threads: int | None = None,
    progress: bool = True,
    recorder: CostRecorder | None = None,
) -> DataSummary:
    """Checks every sample before training: its line, images, tags and length.

    What cannot stay is left out of ``dataset`` and counted. The result does not depend on the number of threads.

    Args:
        dataset: left-out samples of an earlier check are looked at again.
        encoder: gives the lengths and what happens to over-long samples.
        on_bad_sample: ``error``: raise, naming the first bad samples. ``skip``: leave them out, counted by reason. An
            over-long sample is not a bad one: ``encoder.on_overlong`` alone decides about it.
        decode_images: decode every image, as training will; else look at headers and file ends only (fast, misses
            damage inside a file).
        num_threads: threads that read images; default one a core, 16 at most.
        progress: show a bar.
        recorder: gets the costs of every sample that stays, in order.

    Raises:
        DataError: a sample is bad or over-long and is not to be left out; the first is named with its place and
            remedy, up to ``MAX_LISTED_PROBLEMS`` further ones are listed. Or no sample stays.
    """
    if on_bad_sample not in ("error", "skip"):
        raise ValueError(f"on_bad_sample is {on_bad_sample!r}, must be error or skip")
    sized = _CheckedOnce(decode_images)

    def look(position: int) -> tuple[Sample, list[Path], list[tuple[int, int]]] | SampleError:
        paths: list[Path] = []

        def note(path: Path) -> tuple[int, int]:
            paths.append(path)
            return sized(path)

        try:
            sample = dataset.read_line(position)
            return sample, paths, dataset.image_sizes(sample, note)
        except SampleError as error:
            return error

    summary = DataSummary()
    skipped: Counter[str] = Counter()
    refused: list[SampleError] = []
    left_out: list[int] = []
    looks = _in_order(look, dataset.num_lines, num_threads or default_num_workers())
    for position, seen in enumerate(
        tqdm(looks, total=dataset.num_lines, desc="checking data", unit=" samples", disable=not progress)
    ):
        try:
            if isinstance(seen, SampleError):
                raise seen
            sample, paths, sizes = seen
            lengths = encoder.measure(sample, sizes)  # tokenizers are not safe to share between threads
        except SampleError as error:
            if on_bad_sample == "error" or error.reason == OVERLONG:
                refused.append(error)
                if len(refused) > MAX_LISTED_PROBLEMS:
                    break
                continue
            skipped[error.reason] += 1
            left_out.append(position)
            if len(summary.problems) < MAX_LISTED_PROBLEMS:
                summary.problems.append(str(error))
            continue
        if lengths.is_overlong and encoder.on_overlong == "drop":
            summary.dropped += 1
            left_out.append(position)
            continue
        if recorder is not None:
            recorder.add(lengths, paths)
        summary.samples += 1
        summary.turns += len(sample.turns)
        summary.images += len(sizes)
        summary.crops += lengths.crops
        summary.tokens += lengths.tokens
        summary.max_tokens = max(summary.max_tokens, lengths.tokens)
        summary.supervised_tokens += lengths.supervised
        summary.cut += lengths.is_overlong
    summary.skipped = dict(sorted(skipped.items()))
    if refused:
        raise DataError(_refusal(refused))
    if not summary.samples:
        raise DataError(_nothing_left(summary))
    dataset.leave_out(left_out)
    return summary


class _CheckedOnce:
    """Checks every image file once, whatever number of threads ask for it, and remembers the latest.

    Args:
        decode: as ``check_image`` takes it.
    """

    def __init__(self, decode: bool) -> None:
        self._decode = decode
        self._lock = Lock()
        self._known: OrderedDict[Path, _Finding] = OrderedDict()

    def __call__(self, path: Path) -> tuple[int, int]:
        """Returns an image's (h, w) px.

        Raises:
            UnusableImageError: as ``check_image``.
        """
        with self._lock:
            finding = self._known.setdefault(path, _Finding(Lock()))
            self._known.move_to_end(path)
            if len(self._known) > REMEMBERED_IMAGES:
                self._known.popitem(last=False)
        with finding.lock:  # who comes second waits for the first
            if finding.size is None and finding.error is None:
                try:
                    finding.size = check_image(path, self._decode)
                except UnusableImageError as error:
                    finding.error = error.found, error.remedy, error.reason
        if finding.size is None:
            assert finding.error is not None
            raise UnusableImageError(*finding.error)
        return finding.size


@dataclass(slots=True)
class _Finding:
    """What is known of an image file: its (h, w) px, or the arguments of its ``UnusableImageError``; or nothing yet."""

    lock: Lock
    size: tuple[int, int] | None = None
    error: tuple[str, str, str] | None = None


def _refusal(refused: Sequence[SampleError]) -> str:
    first, *others = [str(error) for error in refused]
    lines = [first]
    if others:
        more = ", and there may be more" if len(refused) > MAX_LISTED_PROBLEMS else ""
        lines += [f"{len(others)} further sample(s) cannot be used{more}:", *(f"  {other}" for other in others)]
    if any(error.reason != OVERLONG for error in refused):
        lines.append("Set on_bad_sample to skip to leave bad samples out and count them.")
    return "\n".join(lines)


def _nothing_left(summary: DataSummary) -> str:
    reasons = [f"{count} x {reason}" for reason, count in summary.skipped.items()]
    if summary.dropped:
        reasons.append(f"{summary.dropped} x {OVERLONG}")
    lines = [f"no sample is left to use: {', '.join(reasons)}. Mend the data, or raise max_length."]
    return "\n".join([*lines, *(f"  {problem}" for problem in summary.problems)])


def _in_order(function: Callable[[int], T], count: int, num_threads: int) -> Iterator[T]:
    """Yields ``function(0) .. function(count - 1)`` in order, a few of them computed ahead by threads."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="check-data")
    try:
        ahead: deque[Future[T]] = deque()
        for position in range(count):
            ahead.append(pool.submit(function, position))
            if len(ahead) > 4 * num_threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _index_file(path: Path, image_dir: Path | None) -> _JsonlFile:
    if image_dir is None:
        beside = path.parent / "images"
        image_dir = beside if beside.is_dir() else path.parent
    elif not image_dir.is_dir():
        raise DataError(f"{image_dir}: the image folder is not there. Set image_dir to the folder of the images.")
    offsets, blanks = array("Q"), array("Q")
    digest = hashlib.sha256()
    offset = 0
    try:
        with path.open("rb") as file:
            stamp = _stamp(file.fileno())
            while line := file.readline(MAX_LINE_BYTES + 1):
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{path}:{len(offsets) + len(blanks) + 1}: the line is longer than {MAX_LINE_BYTES // 2**20} "
                        "MiB, so this is no JSONL file. Write one JSON object a line, or convert the file "
                        "(phi3v data convert)."
                    )
                digest.update(line)
                if line.removeprefix(_BYTE_ORDER_MARK).strip():
                    offsets.append(offset)
                else:
                    blanks.append(len(offsets))
                offset += len(line)
    except OSError as error:
        raise DataError(
            f"{path}: the data file cannot be read: {error.strerror}. Name an existing JSONL file."
        ) from error
    return _JsonlFile(path, image_dir.resolve(), offsets, blanks, stamp, digest.digest())


def _stamp(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns
