"""A folder appears complete or not at all, and where it cannot appear is told before the work is done."""

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from phi3v.errors import CapacityError, CheckpointError, ConfigError
from phi3v.export.placing import explained_writing, placed_when_complete


def write(folder: Path) -> None:
    folder.mkdir()
    (folder / "weights").write_text("all of them")


def test_it_has_its_name_when_it_is_complete(tmp_path: Path) -> None:
    with placed_when_complete(tmp_path / "new" / "out") as folder:
        write(folder)
        assert not (tmp_path / "new" / "out").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert (tmp_path / "new" / "out" / "weights").read_text() == "all of them"


def test_a_link_to_an_empty_folder_stays_one(tmp_path: Path) -> None:
    (tmp_path / "large-disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large-disk")
    with placed_when_complete(tmp_path / "out") as folder:
        write(folder)
    assert (tmp_path / "out").is_symlink() and (tmp_path / "large-disk" / "weights").is_file()


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), ValueError("a fault"), CheckpointError("damaged")])
def test_nothing_stays_of_what_was_not_completed(interruption: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(interruption)), placed_when_complete(tmp_path / "out") as folder:
        write(folder)
        (folder.parent / ".out.writing").mkdir()  # as another writer leaves it behind
        raise interruption
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.exporting" / "out").mkdir(parents=True)
    with placed_when_complete(tmp_path / "out") as folder:
        write(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_written_or_replaced_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for place, told in ((tmp_path / "file" / "out", "nothing can be written"), (tmp_path / "file", "is not empty")):
        with pytest.raises(ConfigError, match=told), placed_when_complete(place):
            pytest.fail("the work was done")

    def busy(folder: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(folder))

    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(ConfigError, match="new folder inside it"), placed_when_complete(tmp_path / "mounted"):
        pytest.fail("the work was done")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mounted"]


def test_a_name_that_was_taken_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be put in place"), placed_when_complete(tmp_path / "out") as folder:
        write(folder)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]


def test_an_empty_folder_stays_where_nothing_completes(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o700)
    with pytest.raises(ValueError, match="a fault"), placed_when_complete(tmp_path / "out"):
        assert (tmp_path / "out").is_dir()
        raise ValueError("a fault")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("place", [".", "..", "../../out"])
def test_the_folder_it_runs_in_is_not_replaced(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "out" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    told = "the folder this runs in" if place == "." else "is not empty"
    with pytest.raises(ConfigError, match=told), placed_when_complete(Path(place)):
        pytest.fail("the work was done")
    assert here.is_dir() and Path.cwd() == here


def test_only_what_writes_is_said_not_to_have_been_written(tmp_path: Path) -> None:
    """Another OSError of the body, such as one of reading the base, is not about the folder."""
    with pytest.raises(FileNotFoundError, match="weights"), placed_when_complete(tmp_path / "out"):
        (tmp_path / "weights").read_bytes()


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), CapacityError),
        (SafetensorError("I/O error: No space left on device (os error 28)"), CapacityError),
        (Exception("No space left on device (os error 28)"), CapacityError),  # of the tokenizers library
        (OSError(errno.EIO, "Input/output error"), CheckpointError),
        (SafetensorError("I/O error: Input/output error (os error 5)"), CheckpointError),
    ],
)
def test_why_it_was_not_written_is_told(failure: Exception, kind: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(kind, match=r"out was not written.*on another disk"), explained_writing(tmp_path / "out"):
        raise failure
