"""A folder that appears complete under its name, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ..errors import CapacityError, CheckpointError, ConfigError
from ..files import is_full_disk


@contextmanager
def placed_when_complete(output_dir: Path) -> Iterator[Path]:
    """Yields where to write a folder, which gets the name ``output_dir`` when the body has ended without an error.

    Until then it lies in a hidden folder beside that name, on the same disk, so that a name is all that changes at the
    end; that this will be possible is tried before the body runs. Whatever the body leaves behind when it fails or is
    interrupted is removed; what a killed process left there is removed by the next one for the same name.

    Args:
        output_dir: not there, or an empty folder, which is replaced; a link to one stays a link.

    Raises:
        ConfigError: it holds something, or cannot be written or replaced (a mount point, for instance).
        CapacityError: the disk is full.
        CheckpointError: the body could not write.
    """
    target = output_dir.resolve()
    workshop = target.with_name(f".{target.name}.exporting")
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(f"{output_dir} is not empty; give another output folder")
        shutil.rmtree(workshop, ignore_errors=True)
        workshop.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"{output_dir}: nothing can be written there ({_reason(error)}); give another output folder"
        ) from error
    try:
        _take_away_empty(target, output_dir)
        folder = workshop / target.name
        with _explained(output_dir):
            yield folder
            _force_to_disk(folder)
        _rename(folder, target, output_dir)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _take_away_empty(target: Path, output_dir: Path) -> None:
    """Removes the empty folder that a complete one replaces: where that fails, it fails before the work is done."""
    try:
        with suppress(FileNotFoundError):
            target.rmdir()
    except OSError as error:
        raise ConfigError(
            f"{output_dir}: cannot be replaced by a complete folder ({_reason(error)}); give a new folder inside it"
        ) from error


def _force_to_disk(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _rename(folder: Path, target: Path, output_dir: Path) -> None:
    try:
        folder.rename(target)
    except OSError as error:
        raise ConfigError(
            f"{output_dir}: cannot be put in place ({_reason(error)}); give another output folder"
        ) from error


@contextmanager
def _explained(output_dir: Path) -> Iterator[None]:
    """Turns what a library raises when it cannot write into an error that says what to do."""
    try:
        yield
    except Exception as error:
        # The tokenizers library raises Exception itself; any other that is not about files goes through.
        if type(error) is not Exception and not isinstance(error, OSError | SafetensorError):
            raise
        if is_full_disk(error):
            raise CapacityError(
                f"{output_dir} was not written: the disk is full ({error}). Make room, or choose an output folder on "
                "another disk"
            ) from error
        raise CheckpointError(
            f"{output_dir} was not written ({type(error).__name__}: {error}); try again, or choose an output folder on "
            "another disk"
        ) from error


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
