import json
import logging
from pathlib import Path

import pytest

from phi3v.errors import CheckpointError
from phi3v.train.checkpoints.store import MANIFEST, REQUIRED_FILES, CheckpointStore


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def save(store: CheckpointStore, step: int, names: tuple[str, ...] = (*REQUIRED_FILES, "model.safetensors")) -> None:
    folder = store.staging / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{name} of step {step}")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    store.commit(step, {"seed": 7})


def test_a_committed_checkpoint_is_found_with_what_was_said_about_it(store: CheckpointStore) -> None:
    save(store, 9)
    save(store, 10)
    newest = store.newest()
    assert newest is not None
    assert (newest.step, newest.identity, newest.trainer_state()) == (10, {"seed": 7}, {"global_step": 10})
    assert store.steps() == [9, 10] and not store.staging.exists()


def test_no_checkpoint(store: CheckpointStore) -> None:
    assert store.newest() is None
    assert store.describe_newest() == "There is no checkpoint yet."


@pytest.mark.parametrize("name", REQUIRED_FILES)
def test_a_checkpoint_without_what_resume_needs_is_refused_when_written(store: CheckpointStore, name: str) -> None:
    folder = store.staging / "checkpoint-1"
    folder.mkdir(parents=True)
    for other in REQUIRED_FILES:
        if other != name:
            (folder / other).parent.mkdir(exist_ok=True)
            (folder / other).touch()
    with pytest.raises(CheckpointError, match=name):
        store.commit(1, {})


def damage_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"format": 2, "fi')


def change_a_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"step", b"sten"))


def shorten(folder: Path) -> None:
    path = folder / "training" / "state.json"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "no manifest.json"),
        (damage_manifest, "cannot be read"),
        (lambda folder: (folder / "training" / "state.json").unlink(), "training/state.json is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (shorten, "training/state.json has 29 bytes instead of 30"),
        (change_a_byte, "model.safetensors does not have the content"),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, damage: object, reason: str
) -> None:
    save(store, 10)
    save(store, 20)
    assert callable(damage)
    damage(store.folder(20))
    with caplog.at_level(logging.WARNING):
        newest = store.newest()
    assert newest is not None and newest.step == 10
    assert reason in caplog.text
    assert (store.root / "checkpoint-20.incomplete").is_dir()
    save(store, 20)
    damage(store.folder(20))
    assert store.newest() == newest
    assert (store.root / "checkpoint-20.incomplete.2").is_dir()


def test_pruning_keeps_the_newest_and_the_protected(store: CheckpointStore) -> None:
    for step in (5, 10, 15, 100):
        save(store, step)
    store.prune(protect=[5])
    assert store.steps() == [5, 15, 100]
    store.prune()
    assert store.steps() == [15, 100]
    assert store.newest() is not None


def test_leftovers_of_a_killed_process_are_removed(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    save(store, 10)
    for folder in (store.staging / "checkpoint-20", store.root / ".removing-checkpoint-5", store.rehearsal):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
    store.clear_leftovers()
    assert "checkpoint-20" in caplog.text
    assert [path.name for path in store.root.iterdir()] == ["checkpoint-10"]


def test_a_step_can_be_committed_again(store: CheckpointStore) -> None:
    save(store, 10)
    save(store, 10)
    assert store.newest() is not None and store.steps() == [10]
