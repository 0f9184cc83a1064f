"""The check that every sample passes before a run: its line, images, tags and length."""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeVar

from tqdm import tqdm

from ..errors import DataError
from .dataset import ConversationDataset
from .encode import OVERLONG, SampleEncoder
from .images import UnusableImageError, check_image
from .packing import CostRecorder
from .processes import default_num_workers
from .schema import Sample, SampleError

MAX_LISTED_PROBLEMS = 10
"""Bad samples that an error or a summary names beside the first; enough to see a pattern."""

REMEMBERED_IMAGES = 65_536
"""Images whose findings the data check keeps, so that a page with many questions is decoded once."""

T = TypeVar("T")


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
