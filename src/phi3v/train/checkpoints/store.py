"""Training checkpoints that are whole or not there at all.

A checkpoint is written in a staging folder, then its manifest (every file's size and SHA-256) is written last and
synced, then the folder is renamed into place. A process killed at any moment leaves either the old state or the new
one; what resume reads was verified byte by byte. A half-written checkpoint would otherwise train on with a fresh
optimizer, without an error: Trainer skips an optimizer file that is missing.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from phi3v.errors import CheckpointError
from phi3v.files import sync_file, sync_folder

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""Name of the file that makes a checkpoint complete."""

REQUIRED_FILES = ("training/state.json", "trainer_state.json")
"""Without one of these a run could not go on."""

_FORMAT = 2
_NAME = re.compile(r"checkpoint-(\d+)")
_STAGING = ".saving"
_REMOVING = ".removing-"
_REHEARSAL = "rehearsal"
_SET_ASIDE = ".incomplete"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        folder: where it lies; holds the model, the optimizer, the scheduler, the RNG states and the manifest.
        step: optimizer steps done when it was taken.
        identity: what the run was, as given to :meth:`CheckpointStore.commit`.
    """

    folder: Path
    step: int
    identity: dict[str, Any]

    def trainer_state(self) -> dict[str, Any]:
        """Reads Trainer's own state: ``global_step``, ``max_steps``, ``log_history`` and the rest."""
        return json.loads((self.folder / "trainer_state.json").read_text(encoding="utf-8"))


class CheckpointStore:
    """The checkpoints of one run: ``checkpoint-N`` folders, complete ones only, under one root.

    Only one process may write to a store; in a distributed run that is rank 0.

    Args:
        root: the run's ``checkpoints`` folder.
        keep: how many of the newest checkpoints stay, at least 1.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.root = root
        self.keep = keep

    @property
    def staging(self) -> Path:
        """Where a checkpoint is written before it is complete; as ``staging/checkpoint-N``."""
        return self.root / _STAGING

    @property
    def rehearsal(self) -> Path:
        """Where the rehearsal before step 1 writes a model, and deletes it again."""
        return self.root / _REHEARSAL

    def folder(self, step: int) -> Path:
        """Returns where the checkpoint of ``step`` lies once it is complete."""
        return self.root / f"checkpoint-{step}"

    def clear_leftovers(self) -> None:
        """Removes what a killed process left half-written or half-deleted, and says so."""
        if self.staging.exists():
            names = ", ".join(sorted(path.name for path in self.staging.iterdir())) or "nothing yet"
            logger.warning("Removing a checkpoint that was being written when the last run stopped (%s).", names)
            shutil.rmtree(self.staging)
        for pattern in (f"{_REMOVING}*", f"{_REHEARSAL}*", f".{_REHEARSAL}*"):
            for path in self.root.glob(pattern):
                shutil.rmtree(path)

    def commit(self, step: int, identity: Mapping[str, Any]) -> Checkpoint:
        """Completes the staged checkpoint of ``step`` and moves it into place.

        Args:
            step: its optimizer step; ``staging/checkpoint-step`` must hold its files.
            identity: JSON values that a later resume compares with its own run.

        Raises:
            CheckpointError: a file that resume cannot do without was not written.
        """
        staged = self.staging / f"checkpoint-{step}"
        _write_manifest(staged, step, identity)
        target = self.folder(step)
        if target.exists():
            self._discard(target)
        staged.rename(target)
        self.staging.rmdir()
        sync_folder(self.root)
        return Checkpoint(target, step, dict(identity))

    def newest(self) -> Checkpoint | None:
        """Returns the newest checkpoint whose every byte is as its manifest says; None without one.

        A checkpoint that fails is renamed to ``checkpoint-N.incomplete`` with a warning, and the next older one is
        tried: it is the user's to look at or to delete, and no later run takes it for a good one.
        """
        for step in sorted(self.steps(), reverse=True):
            if self.is_whole(step):
                return Checkpoint(self.folder(step), step, _read_manifest(self.folder(step))["identity"])
        return None

    def newest_identity(self) -> dict[str, Any] | None:
        """Returns what the newest checkpoint says of its run, not verified yet; None where none can be read."""
        for step in sorted(self.steps(), reverse=True):
            with suppress(OSError, ValueError, RecursionError, CheckpointError):
                return _read_manifest(self.folder(step))["identity"]
        return None

    def is_whole(self, step: int) -> bool:
        """Says whether the checkpoint of ``step`` is there and its every byte as its manifest says.

        One that is there and fails is set aside, as ``newest`` says.
        """
        folder = self.folder(step)
        if not folder.is_dir():
            return False
        problem = find_problem(folder)
        if problem is not None:
            aside = _unused_name(folder.with_name(folder.name + _SET_ASIDE))
            folder.rename(aside)
            logger.warning("Checkpoint %s is not complete (%s): set aside as %s.", folder, problem, aside.name)
        return problem is None

    def steps(self) -> list[int]:
        """Lists the steps that have a checkpoint folder, in ascending order, without looking inside."""
        return sorted(step for _, step in self._folders())

    def describe_newest(self) -> str:
        """Says in a sentence where a run could go on from."""
        steps = self.steps()
        return f"The last checkpoint is {self.folder(steps[-1])}." if steps else "There is no checkpoint yet."

    def prune(self, protect: Collection[int] = ()) -> None:
        """Deletes all but the ``keep`` newest checkpoints.

        Call it after a newer one is complete.

        Args:
            protect: steps that stay whatever their age: the best one's.
        """
        for step in self.steps()[: -self.keep]:
            if step not in protect:
                self._discard(self.folder(step))

    def size_bytes(self) -> int:
        """Counts the bytes of the checkpoints; not of those set aside, which no later one takes the place of."""
        return sum(path.stat().st_size for folder, _ in self._folders() for path in folder.rglob("*") if path.is_file())

    def _folders(self) -> Iterator[tuple[Path, int]]:
        if not self.root.is_dir():
            return
        for path in self.root.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir():
                yield path, int(match.group(1))

    def _discard(self, folder: Path) -> None:
        # Renamed first: a process killed while deleting must not leave a folder that looks like a checkpoint.
        doomed = _unused_name(self.root / f"{_REMOVING}{folder.name}")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def find_problem(folder: Path) -> str | None:
    """Says what makes a checkpoint folder incomplete, or None when every file is as its manifest says."""
    if not (folder / MANIFEST).is_file():
        return f"it has no {MANIFEST}: the process stopped while writing it"
    try:
        files: dict[str, dict[str, Any]] = _read_manifest(folder)["files"]
    except (OSError, ValueError, RecursionError, CheckpointError) as error:
        return f"its {MANIFEST} cannot be read: {error}"
    missing = [name for name in (*REQUIRED_FILES, *files) if name not in files or not (folder / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    for name, record in files.items():
        found = (folder / name).stat().st_size
        if found != record["bytes"]:
            return f"{name} has {found} bytes instead of {record['bytes']}"
    digests = _digests([folder / name for name in files])
    for (name, record), digest in zip(files.items(), digests, strict=True):
        if digest != record["sha256"]:
            return f"{name} does not have the content that was written"
    return None


def _write_manifest(folder: Path, step: int, identity: Mapping[str, Any]) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    absent = [name for name in REQUIRED_FILES if name not in names]
    if absent:
        raise CheckpointError(f"{folder}: {', '.join(absent)} was not written, so this checkpoint could not be resumed")
    for path in paths:
        sync_file(path)
    records = {
        name: {"bytes": path.stat().st_size, "sha256": digest}
        for name, path, digest in zip(names, paths, _digests(paths), strict=True)
    }
    manifest = {"format": _FORMAT, "step": step, "identity": dict(identity), "files": records}
    manifest["sha256"] = _digest_of(manifest)
    target = folder / MANIFEST
    target.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    sync_file(target)
    sync_folder(folder)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Reads a manifest; what it says of files is not compared with them yet.

    Raises:
        CheckpointError: not one that `_write_manifest` wrote, or one that was changed since.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise CheckpointError(f"format {str(found)[:80]!r}, this version reads {_FORMAT}")
    files = manifest.get("files")
    if manifest.pop("sha256", None) != _digest_of(manifest) or not isinstance(files, dict):
        raise CheckpointError("it does not have the content that was written")
    for name, record in files.items():
        # A manifest from elsewhere must not have files of any place read, or a pipe that never ends.
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not isinstance(record, dict):
            raise CheckpointError(f"it names {name[:80]!r}, which is no file of a checkpoint")
    return manifest


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _digests(paths: list[Path]) -> list[str]:
    # hashlib releases the interpreter lock, so a few threads hash several gigabytes a second.
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(_digest, paths))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unused_name(path: Path) -> Path:
    """Returns ``path``, or the first ``path.2``, ``path.3``, ... that does not exist."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate
