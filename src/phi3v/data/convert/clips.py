"""Clips sorted into class folders: frames decoded by several processes, and a question about each clip.

What the converters of video sources share. Frames are JPEG files, ``images/NAME.0.jpg`` and so on. Frame 0 is written
last and removed first, so that it vouches for the others: a conversion killed at any moment can be started again, and
decodes only clips whose frames are not whole, are older than the clip, or are not as many as asked for.
"""

import errno
import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import parent_process
from pathlib import Path, PurePosixPath
from threading import Thread
from typing import Any, NoReturn

from tqdm import tqdm

from ...errors import CapacityError, DataError
from ..processes import default_num_workers, process_pool
from ..schema import parse_sample, sample_error
from .records import check_counts
from .video import VIDEO_SUFFIXES, UnusableVideoError, import_av, read_frames
from .writer import MAX_LISTED_PROBLEMS, Conversion, NativeWriter, OnBadSample

QUESTION = "Classify the video into one of the following classes: {classes}."
"""The published question; ``{classes}`` stands for the names of all classes."""

UNREADABLE_FILE = "unreadable.txt"
"""In the output folder, where there are such clips: one a line, path and reason with a tab between them."""

CLIPS_PER_WORKER = 32
"""Fewer clips than this are decoded sooner than a further process has started."""

MAX_FOLDER_DEPTH = 8
"""How deep clips are looked for: deeper than any layout that is accepted, and the end of links that go round."""


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip and what becomes of it.

    Attributes:
        id: the sample's.
        split: ``train``, ``val`` or another name.
        label: its class, the answer.
        name: what its frames' names start with, relative to the image folder: ``train/Archery/v_Archery_g01_c01``.
        path: the file to decode.
        where: how messages name it.
    """

    id: str
    split: str
    label: str
    name: str
    path: Path
    where: str


def find_clips(folder: Path) -> tuple[list[PurePosixPath], list[PurePosixPath]]:
    """Returns the video files of a tree and its other files, sorted, relative to it; hidden ones are passed over.

    Raises:
        DataError: none, a folder that may not be read, or a name that is not UTF-8.
    """

    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}). Give this user the right to.") from error

    clips: list[PurePosixPath] = []
    others: list[PurePosixPath] = []
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        path = Path(parent)
        is_deep = len(path.relative_to(folder).parts) >= MAX_FOLDER_DEPTH
        folders[:] = [] if is_deep else [name for name in folders if not name.startswith(".")]
        for name in files:
            file = PurePosixPath(path.relative_to(folder).as_posix()) / name
            if not name.startswith("."):
                (clips if file.suffix.lower() in VIDEO_SUFFIXES else others).append(file)
    if not clips:
        found = f", and {len(others)} other files, such as {str(min(others))!r}" if others else ""
        raise DataError(f"{folder}: holds no video file ({', '.join(VIDEO_SUFFIXES)}){found}. Check the path.")
    for clip in clips:
        try:
            str(clip).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{folder}: the name {str(clip)!r} is not UTF-8. Rename the file or its folder.") from error
    return sorted(clips), sorted(others)


def write_clips(
    clips: Sequence[Clip],
    others: Sequence[str],
    output_dir: Path,
    *,
    name: str,
    num_frames: int,
    question: str,
    limit: int | None,
    num_workers: int | None,
    on_bad_sample: OnBadSample,
    progress: bool,
) -> Conversion:
    """Writes every clip's frames and a question about it, with all classes to choose from; the converters' engine.

    Args:
        clips: in the order of the lines.
        others: files of other types, to be counted.
        output_dir: for ``NAME_SPLIT.jsonl``, ``images`` and ``unreadable.txt``.
        name: what the files' names start with; each line's ``source``.
        num_frames: images a clip.
        question: its text; ``{classes}`` stands for the classes.
        limit: most clips a split, spread evenly over it; None: all.
        num_workers: processes that decode; None: by the machine and the number of clips.
        on_bad_sample: ``error``: the first unreadable clip ends the conversion. ``skip``: it is left out and counted.
        progress: show a bar.

    Raises:
        ConfigError: a number below 1, or PyAV is missing.
        DataError: a single class, names or a question that no sample can hold, no readable clip, or an image folder
            that is a link.
        CapacityError: the disk is full.
    """
    import_av()
    check_counts(num_frames=num_frames, limit=limit, num_workers=num_workers)
    classes = sorted({clip.label for clip in clips})
    if len(classes) < 2:
        raise DataError(
            f"{clips[0].where}: its class, {classes[0]!r}, is the only one. Give clips of two classes or more."
        )
    _refuse_repeated_names(clips)

    def record(clip: Clip) -> dict[str, Any]:
        turn = {
            "images": [f"{clip.name}.{index}.jpg" for index in range(num_frames)],
            "user": question.replace("{classes}", ", ".join(classes)),
            "assistant": clip.label,
            "labels": classes,
        }
        return {"id": clip.id, "source": name, "conversations": [turn]}

    for clip in {clip.label: clip for clip in clips}.values():  # hours of decoding come after this
        parse_sample(json.dumps(record(clip)), clip.where)
    clips = clips if limit is None else _evenly(clips, limit)
    with NativeWriter(output_dir, name, on_bad_sample=on_bad_sample) as writer:
        writer.refuse_link()
        unreadable: dict[Clip, UnusableVideoError] = {}
        try:
            for clip, error in _write_frames(clips, writer.image_dir, num_frames, num_workers, progress):
                if error is not None:
                    unreadable[clip] = error
                    if on_bad_sample == "error":
                        break
        except OSError as error:
            kind = CapacityError if error.errno == errno.ENOSPC else DataError
            raise kind(
                f"{writer.image_dir}: a frame cannot be written ({error}). Give it room or the right to be written; "
                "started again, the conversion goes on from here."
            ) from error
        _list_unreadable(unreadable, Path(output_dir) / UNREADABLE_FILE)
        for clip in clips:
            if error := unreadable.get(clip):
                writer.skip(sample_error(clip.where, error.found, error.remedy, error.reason))
            else:
                writer.add(clip.split, record(clip), where=clip.where)
        if len(unreadable) > MAX_LISTED_PROBLEMS:
            writer.conversion.problems[-1] = f"all {len(unreadable)} are in {Path(output_dir) / UNREADABLE_FILE}"
        for file in others:
            where = file.encode(errors="backslashreplace").decode()
            remedy = f"Clips end in {', '.join(VIDEO_SUFFIXES)}."
            writer.leave_out(sample_error(where, "the file is no video by its name", remedy, "no video file"))
    return writer.conversion


def _refuse_repeated_names(clips: Sequence[Clip]) -> None:
    first: dict[str, Clip] = {}
    for clip in clips:
        if (other := first.setdefault(clip.name, clip)) is not clip:
            raise DataError(
                f"{clip.where}: {other.path.name} stands beside it, and frames are named without the ending. "
                "Rename one of the two, or take it out."
            )


def _evenly(clips: Sequence[Clip], limit: int) -> list[Clip]:
    """Returns at most ``limit`` clips of every split, spread over it so that every class has its share."""
    splits: dict[str, list[Clip]] = {}
    for clip in clips:
        splits.setdefault(clip.split, []).append(clip)
    return [
        split[k * len(split) // min(limit, len(split))]
        for split in splits.values()
        for k in range(min(limit, len(split)))
    ]


def _list_unreadable(unreadable: Mapping[Clip, UnusableVideoError], file: Path) -> None:
    if not unreadable:
        file.unlink(missing_ok=True)
        return
    lines = sorted(f"{clip.where}\t{error}\n" for clip, error in unreadable.items())
    temporary = file.with_name(f".{file.name}.writing")
    temporary.write_text("".join(lines), "utf-8")
    temporary.replace(file)


def _write_frames(
    clips: Sequence[Clip], image_dir: Path, num_frames: int, num_workers: int | None, progress: bool
) -> Iterator[tuple[Clip, UnusableVideoError | None]]:
    """Decodes the clips whose frames are not there yet; yields each, in any order, with what is wrong with it."""
    missing = [clip for clip in clips if not _has_frames(clip.path, image_dir / clip.name, num_frames)]
    if num_workers is None:
        num_workers = min(default_num_workers(), max(1, len(missing) // CLIPS_PER_WORKER))
    decode = _decode_here if num_workers == 1 else _decode_in_processes
    num_done = len(clips) - len(missing)
    with tqdm(total=len(clips), initial=num_done, desc="decoding", unit=" clips", disable=not progress) as bar:
        for result in decode(missing, image_dir, num_frames, num_workers):
            bar.update()
            yield result


def _decode_here(
    clips: Sequence[Clip], image_dir: Path, num_frames: int, num_workers: int
) -> Iterator[tuple[Clip, UnusableVideoError | None]]:
    for clip in clips:
        yield clip, _write_frames_of(clip.path, image_dir / clip.name, num_frames)


def _decode_in_processes(
    clips: Sequence[Clip], image_dir: Path, num_frames: int, num_workers: int
) -> Iterator[tuple[Clip, UnusableVideoError | None]]:
    waiting = iter(clips)
    running: dict[Future[UnusableVideoError | None], Clip] = {}
    try:
        with process_pool(num_workers, _begin_worker, is_spawned=True) as pool:
            while True:
                # Two a process: none waits for work, and little is decoded twice after an interruption.
                for clip in islice(waiting, 2 * num_workers - len(running)):
                    running[pool.submit(_write_frames_of, clip.path, image_dir / clip.name, num_frames)] = clip
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    error = future.result()
                    yield running.pop(future), error
    except BrokenProcessPool as error:
        raise DataError(
            "a process that decodes died; out of memory, or a clip that FFmpeg cannot survive, one of: "
            f"{', '.join(clip.where for clip in running.values())}. Try again with fewer num_workers, or take the clip "
            "out; frames that are written are kept."
        ) from error


def _begin_worker() -> None:
    """Leaves Ctrl-C to the parent, and sees to it that the process ends with the parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "runs in a worker only"
    parent.join()
    os._exit(1)


def _frame_files(target: Path, num_frames: int) -> list[Path]:
    return [target.with_name(f"{target.name}.{index}.jpg") for index in range(num_frames)]


def _has_frames(clip: Path, target: Path, num_frames: int) -> bool:
    """Whether exactly ``num_frames`` whole frames are there, none older than the clip."""
    *files, surplus = _frame_files(target, num_frames + 1)
    return (
        clip.is_file()
        and not surplus.exists()
        and all(_is_whole_jpeg(file) and file.stat().st_mtime_ns >= clip.stat().st_mtime_ns for file in files)
    )


def _is_whole_jpeg(file: Path) -> bool:
    """Whether a file ends as JPEG files do; a power cut can leave one of zeros behind."""
    if not file.is_file() or file.stat().st_size < 2:
        return False
    with file.open("rb") as handle:
        handle.seek(-2, os.SEEK_END)
        return handle.read() == b"\xff\xd9"


def _write_frames_of(clip: Path, target: Path, num_frames: int) -> UnusableVideoError | None:
    """Decodes one clip and writes its frames, with PIL's default JPEG quality as published; returns what is wrong."""
    first, *others = _frame_files(target, num_frames)
    first.unlink(missing_ok=True)
    surplus = num_frames
    while (file := target.with_name(f"{target.name}.{surplus}.jpg")).exists():
        file.unlink()
        surplus += 1
    try:
        images = read_frames(clip, num_frames)
    except UnusableVideoError as error:
        for file in others:
            file.unlink(missing_ok=True)
        return error
    first.parent.mkdir(parents=True, exist_ok=True)
    for file, image in zip([*others, first], [*images[1:], images[0]], strict=True):
        temporary = file.with_name(f".{file.name}.writing")
        image.save(temporary, "JPEG")
        temporary.replace(file)
    return None
