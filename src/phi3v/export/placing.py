"""A folder that appears complete under its name, or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ..errors import CapacityError, CheckpointError, ConfigError
from ..files import is_full_disk, sync_file


def require_free(output_dir: Path) -> None:
    """Makes sure that a complete folder may take a name: nothing is lost by it.

    Args:
        output_dir: not there, or an empty folder.

    Raises:
        ConfigError: it holds something, is the current working directory, or cannot be looked at.
    """
    with _as_config_error(output_dir, "nothing can be written there", "give another output folder"):
        target = output_dir.resolve()
        if not target.exists():
            return
        if not target.is_dir() or any(target.iterdir()):
            raise ConfigError(f"{output_dir} is not empty; give another output folder")
        # It is another folder of this name at the end, and whoever stands in the former one stands nowhere.
        if Path.cwd() == target:
            raise ConfigError(f"{output_dir} is the folder this runs in; give a new folder inside it")


@contextmanager
def placed_when_complete(output_dir: Path) -> Iterator[Path]:
    """Yields where to write a folder, which gets the name ``output_dir`` when the body has ended without an error.

    Until then it lies in a hidden folder beside that name, on the same disk, so that a name is all that changes at the
    end; that this will be possible is tried before the body runs. Whatever the body leaves behind when it fails or is
    interrupted is removed; what a killed process left there is removed by the next one for the same name.

    Args:
        output_dir: not there, or an empty folder, which is replaced at the end; a link to one stays a link.

    Raises:
        ConfigError: it holds something, or cannot be written or replaced (a mount point, for instance).
        CapacityError: the disk is full.
        CheckpointError: the folder cannot be forced to the disk.
    """
    require_free(output_dir)
    target = output_dir.resolve()
    workshop = target.with_name(f".{target.name}.exporting")
    shutil.rmtree(workshop, ignore_errors=True)
    if target.exists():
        # As a mount point cannot: tried with the folder itself, which stays as it is until the end.
        with _as_config_error(output_dir, "cannot be replaced by a complete folder", "give a new folder inside it"):
            target.rename(workshop)
            workshop.rename(target)
    with _as_config_error(output_dir, "nothing can be written there", "give another output folder"):
        workshop.mkdir(parents=True)
    try:
        folder = workshop / target.name
        yield folder
        with explained_writing(folder):
            _force_to_disk(folder)
        with _as_config_error(output_dir, "cannot be put in place", "give another output folder"):
            with suppress(FileNotFoundError):
                target.rmdir()
            folder.rename(target)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _force_to_disk(folder: Path) -> None:
    for file in folder.iterdir():
        sync_file(file)


@contextmanager
def explained_writing(folder: Path) -> Iterator[None]:
    """Turns what a library raises when it cannot write into an error that says what to do.

    Args:
        folder: what is written; its name is shown.

    Raises:
        CapacityError: the disk is full.
        CheckpointError: anything else about files.
    """
    try:
        yield
    except Exception as error:
        # The tokenizers library raises Exception itself; any other that is not about files goes through.
        if type(error) is not Exception and not isinstance(error, OSError | SafetensorError):
            raise
        if is_full_disk(error):
            raise CapacityError(
                f"{folder.name} was not written: the disk is full ({error}). Make room, or choose an output folder on "
                "another disk"
            ) from error
        raise CheckpointError(
            f"{folder.name} was not written ({type(error).__name__}: {error}); try again, or choose an output folder "
            "on another disk"
        ) from error


@contextmanager
def _as_config_error(output_dir: Path, what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{output_dir}: {what} ({error.strerror or error}); {remedy}") from error
