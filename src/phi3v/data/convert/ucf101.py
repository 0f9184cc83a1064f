"""The UCF-101 subset of the published recipe: ten classes of actions, eight frames a clip."""

import errno
import lzma
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ...errors import CapacityError, ConfigError, DataError
from .clips import QUESTION, Clip, find_clips, write_clips
from .video import VIDEO_SUFFIXES, import_av
from .writer import Conversion, OnBadSample

REPOSITORY = "sayakpaul/ucf101-subset"
ARCHIVE = "UCF101_subset.tar.gz"
SPLITS = ("train", "val", "test")

_LAYOUT = "train|val|test/CLASS/CLIP.avi"
_ARCHIVE_ERRORS = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)
"""What Python's readers of archives raise on damaged ones, OSError aside."""


def convert_ucf101(
    source: str | None,
    output_dir: Path,
    *,
    num_frames: int = 8,
    num_workers: int | None = None,
    limit: int | None = None,
    on_bad_sample: OnBadSample = "skip",
    progress: bool = True,
    tmp_dir: Path | None = None,
) -> Conversion:
    """Write frames of the clips of UCF-101's subset, and a question about each: which of the classes is it?

    A sample's number runs on over train, val and test, and counts unreadable clips too.

    Args:
        source: the archive UCF101_subset.tar.gz, or a folder with train, val and test in it, each with class folders.
            Left out, the archive comes from the hub.
        output_dir: folder for ucf101_train.jsonl, ucf101_val.jsonl, ucf101_test.jsonl and images.
        num_frames: frames of every clip, evenly spaced.
        num_workers: processes that decode. Default: one a core, at most 16, fewer for few clips.
        limit: most clips of each split, spread evenly over it. Default: all.
        on_bad_sample: what an unreadable clip does: it is left out and listed in unreadable.txt, or it ends the
            conversion.
        progress: show a progress bar.
        tmp_dir: folder to unpack the archive in; it is emptied again. Default: the system's.

    Raises:
        ConfigError: PyAV is missing, or a number below 1.
        DataError: the source is missing, laid out differently or unsafe to unpack, the hub cannot be reached, or no
            clip can be read.
        CapacityError: the disk is full.
    """
    import_av()  # before anything is downloaded
    with _folder_of_splits(source, tmp_dir) as (folder, place):
        paths, others = find_clips(folder)
        return write_clips(
            _clips(folder, place, paths),
            [f"{place}/{path}" for path in others],
            output_dir,
            name="ucf101",
            num_frames=num_frames,
            question=QUESTION,
            limit=limit,
            num_workers=num_workers,
            on_bad_sample=on_bad_sample,
            progress=progress,
        )


def _clips(folder: Path, place: str, paths: Sequence[PurePosixPath]) -> list[Clip]:
    """Lists the clips of all splits in the order of their numbers.

    Raises:
        DataError: one that stands elsewhere.
    """
    for path in paths:
        if len(path.parts) != 3 or path.parts[0] not in SPLITS:
            raise DataError(f"{place}/{path}: stands in another place than {_LAYOUT}. Move it or take it out.")
    return [
        Clip(
            id=f"{path.parts[0]}-{number:010d}",
            split=path.parts[0],
            label=path.parts[1],
            name=str(path.with_suffix("")),
            path=folder / path,
            where=f"{place}/{path}",
        )
        for number, path in enumerate(sorted(paths, key=lambda path: (SPLITS.index(path.parts[0]), path)))
    ]


@contextmanager
def _folder_of_splits(source: str | None, tmp_dir: Path | None) -> Iterator[tuple[Path, str]]:
    """Yields the folder that holds train, val and test, and how messages name it; unpacks and downloads for it."""
    path = _download() if source is None else Path(source)
    if path.is_dir():
        yield _with_splits(path, str(path))
        return
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder. Give {ARCHIVE}, or a folder with {_LAYOUT} in it.")
    if tmp_dir is not None:
        try:
            tmp_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"tmp_dir {tmp_dir} cannot be made ({error}); choose another") from error
    with tempfile.TemporaryDirectory(prefix="phi3v-ucf101-", dir=tmp_dir) as temporary:
        _unpack_clips(path, Path(temporary))
        yield _with_splits(Path(temporary), str(path))


def _with_splits(folder: Path, place: str) -> tuple[Path, str]:
    """Finds the folder of the splits: this one or the only one in it that has some."""
    below = sorted(path for path in folder.iterdir() if path.is_dir())
    for candidate, name in ((folder, place), *((path, f"{place}/{path.name}") for path in below)):
        if any((candidate / split).is_dir() for split in SPLITS):
            return candidate, name
    raise DataError(
        f"{place}: holds no folder train, val or test. The layout is {_LAYOUT}; for class folders without splits, such "
        "as the whole UCF-101, use `phi3v data convert video-folders` with --val_share."
    )


def _unpack_clips(archive: Path, folder: Path) -> None:
    """Unpacks an archive's video files, and nothing else.

    Raises:
        DataError: not a tar archive, a damaged one, or one with a member that is no plain file or leaves the folder.
        CapacityError: the disk is full.
    """
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if not (member.isreg() or member.isdir()):
                    raise DataError(
                        f"{archive}: its member {member.name!r} is a link or a device, and a data set has none. "
                        "Fetch it from its source again, or unpack it yourself and give the folder."
                    )
                if PurePosixPath(member.name).suffix.lower() in VIDEO_SUFFIXES:
                    tar.extract(member, folder, filter="data")
    except tarfile.FilterError as error:
        raise DataError(f"{archive}: unsafe to unpack: {error}. Fetch it from its source again.") from error
    except _ARCHIVE_ERRORS as error:
        found = str(error).partition("\n")[0].rstrip(":")
        raise DataError(
            f"{archive}: is not a tar archive or is damaged ({type(error).__name__}: {found}). Fetch it again, or "
            "unpack it yourself and give the folder."
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CapacityError(
                f"{folder}: no room to unpack {archive}. Give another tmp_dir (--tmp_dir), or unpack it yourself and "
                "give the folder."
            ) from error
        raise DataError(f"{archive}: cannot be unpacked in {folder} ({error}). Fetch it again.") from error


def _download() -> Path:
    """Returns the archive in the hub's cache, downloaded where it is not there yet."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(REPOSITORY, ARCHIVE, repo_type="dataset"))
    except (OSError, huggingface_hub.errors.EntryNotFoundError) as error:
        found = str(error).partition("\n")[0]
        raise DataError(
            f"{ARCHIVE} does not come from the hub's data set {REPOSITORY} ({type(error).__name__}: {found}). "
            "Check the network, or download the file on another machine and give its path as the source."
        ) from error
