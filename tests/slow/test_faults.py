"""Faults from outside: killed processes, damaged checkpoints, a full disk, lost images.

What lies beyond the last checkpoint is lost and nothing else, the message says what to do, and the same command goes on
and ends as if undisturbed.
"""

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from commands import Forked, kill, small_disk
from phi3v.runlog import RunDirectory
from phi3v.train.checkpoints.store import MANIFEST, CheckpointStore, find_problem
from training import final_weights, logged, make_config, train_in_child, write_training_data

pytestmark = pytest.mark.slow

KILLS = 10
"""By number of processes; so 20 in all."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_data(tmp_path_factory.mktemp("faults") / "data")


def saved_steps(run: RunDirectory) -> list[int]:
    return CheckpointStore(run.checkpoints_dir, keep=1).steps()


def is_saving(run: RunDirectory) -> bool:
    return any(run.checkpoints_dir.glob(".saving/*"))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_at_random_points(num_processes: int, tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    """Half of the kills meet a checkpoint that is being written; with two processes, half of them kill only one."""
    settings = {"num_train_epochs": 14, "save_steps": 1, "num_workers": 1}
    assert set(Forked(make_config(tiny_dir, data, tmp_path / "whole", **settings), num_processes).wait()) == {0}
    killed = make_config(tiny_dir, data, tmp_path / "killed", **settings)
    dice = random.Random(num_processes)
    kills_in_saves = 0
    for number in range(KILLS):
        start = Forked(killed, num_processes)
        already = max((line["step"] for line in start.run.steps()), default=0)
        assert start.until(lambda run=start.run, step=already: max([0, *saved_steps(run)]) > step), start.output
        if number % 2:
            assert start.until(lambda run=start.run: is_saving(run)), start.output
            time.sleep(0.1 * dice.random())
        else:
            time.sleep(0.5 * dice.random())
        victims = start.ranks()
        if number % 4 >= 2:
            victims = [dice.choice(victims)]
        saved = max(saved_steps(start.run))
        for pid in victims:
            kill(pid)
        codes = start.wait(60)  # one that is left notices, and ends
        assert -signal.SIGKILL in codes and set(codes) <= {-signal.SIGKILL, 1}, start.output
        if len(victims) < num_processes:
            assert "another process of the run ended" in start.output
            assert "Start the same command again." in start.output and "The last checkpoint is" in start.output
        kills_in_saves += is_saving(start.run)
        assert max(saved_steps(start.run)) >= saved
    assert kills_in_saves >= KILLS // 4
    final = Forked(killed, num_processes)
    assert set(final.wait()) == {0}, final.output
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


def cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_a_high_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 128
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


def test_every_damaged_file_of_a_checkpoint_is_noticed(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(tiny_dir, data, tmp_path / "run", save_steps=1, keep_checkpoints=2)
    assert train_in_child(config) == 0
    newest = CheckpointStore(tmp_path / "run" / "checkpoints", keep=2).folder(6)
    names = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file()]
    assert len(names) > 5
    for number, name in enumerate(names):
        for damage in (cut_in_half, flip_a_bit, flip_a_high_bit, remove):
            if (name.name, damage) == (MANIFEST, flip_a_high_bit):
                continue  # see the next test
            root = tmp_path / f"{number}-{damage.__name__}"
            shutil.copytree(newest.parent, root, copy_function=os.link)
            damaged = root / newest.name / name
            damaged.unlink()
            shutil.copy(newest / name, damaged)
            damage(damaged)
            store = CheckpointStore(root, keep=2)
            found = store.newest()
            assert found is not None and found.step == 5, (name, damage.__name__)
            assert (root / "checkpoint-6.incomplete").is_dir() and store.steps() == [5]
            shutil.rmtree(root)


def test_any_flipped_bit_of_a_manifest_is_noticed(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    """Also one in a setting, which would make the run another one, and one that makes it no text."""
    config = make_config(tiny_dir, data, tmp_path / "run", max_steps=1, save_steps=1)
    assert train_in_child(config) == 0
    folder = CheckpointStore(tmp_path / "run" / "checkpoints", keep=1).folder(1)
    whole = (folder / MANIFEST).read_bytes()
    dice = random.Random(0)
    for position in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << dice.randrange(8)
        (folder / MANIFEST).write_bytes(flipped)
        place = bytes(flipped[max(0, position - 20) : position + 20])
        assert find_problem(folder) is not None or json.loads(flipped) == json.loads(whole), (
            place
        )  # a blank for another
    (folder / MANIFEST).write_bytes(whole)
    assert find_problem(folder) is None


@pytest.mark.parametrize("damage", [cut_in_half, flip_a_bit])
def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(
    damage: Callable[[Path], None], tiny_dir: Path, data: Path, tmp_path: Path
) -> None:
    settings = {"save_steps": 1, "num_train_epochs": 3}
    assert train_in_child(make_config(tiny_dir, data, tmp_path / "whole", **settings)) == 0
    config = make_config(tiny_dir, data, tmp_path / "run", **settings)
    start = Forked(config)
    assert start.until(lambda: max([0, *saved_steps(start.run)]) >= 4)
    start.kill()
    newest = max(saved_steps(start.run))
    weights = next((start.run.checkpoints_dir / f"checkpoint-{newest}").glob("model*.safetensors"))
    damage(weights)
    again = Forked(config)
    assert again.wait() == [0]
    assert f"checkpoint-{newest} is not complete ({weights.name} " in again.output
    assert f"Going on from {start.run.checkpoints_dir}/checkpoint-{newest - 1}" in again.output
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_full_disk_costs_what_lies_beyond_the_checkpoint(
    num_processes: int, tiny_dir: Path, data: Path, tmp_path: Path
) -> None:
    settings = {"num_train_epochs": 12, "save_steps": 8, "keep_checkpoints": 1, "report_to": ["tensorboard"]}
    whole = Forked(make_config(tiny_dir, data, tmp_path / "whole", **settings), num_processes)
    try:
        with small_disk(tmp_path / "disk", 100_000_000) as disk:
            config = make_config(tiny_dir, data, disk / "run", **settings)
            start = Forked(config, num_processes)
            assert start.until(lambda: saved_steps(start.run) == [8])
            filler = disk / "filler"
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - 10_000_000)
            codes = start.wait()
            assert set(codes) == {1}
            (message,) = re.findall("error: the checkpoint.*", start.output)
            assert "No space left on device" in message and "make room, and start the same command again" in message
            newest = CheckpointStore(start.run.checkpoints_dir, keep=1).newest()
            assert newest is not None and newest.step == 8
            filler.unlink()
            assert set(Forked(config, num_processes).wait()) == {0}
            assert set(whole.wait()) == {0}
            assert_equal_runs(tmp_path / "whole", disk / "run")
    except PermissionError as error:
        whole.kill()
        pytest.skip(str(error))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_dead_data_worker_ends_the_run_with_advice(
    num_processes: int, tiny_dir: Path, data: Path, tmp_path: Path
) -> None:
    settings = {"num_train_epochs": 8, "save_steps": 2, "num_workers": 1}
    assert set(Forked(make_config(tiny_dir, data, tmp_path / "whole", **settings), num_processes).wait()) == {0}
    config = make_config(tiny_dir, data, tmp_path / "run", **settings)
    start = Forked(config, num_processes)
    assert start.until(lambda: max([0, *saved_steps(start.run)]) >= 4)
    kill(start.workers()[-1])
    assert set(start.wait(90)) == {1}
    (message,) = re.findall("error: a process that prepares samples died.*", start.output)
    assert "lower num_workers" in message and "The last checkpoint is" in message
    assert set(Forked(config, num_processes).wait()) == {0}
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_goes_while_it_trains_is_named(num_workers: int, tiny_dir: Path, tmp_path: Path) -> None:
    data = write_training_data(tmp_path / "data")
    settings = {"num_train_epochs": 8, "save_steps": 4, "num_workers": num_workers}
    whole = make_config(tiny_dir, data, tmp_path / "whole", **settings)
    assert train_in_child(whole) == 0
    config = make_config(tiny_dir, data, tmp_path / "run", **settings)
    start = Forked(config)
    assert start.until(lambda: max([0, *saved_steps(start.run)]) >= 4)
    image = data / "images" / "2-1.png"
    kept = image.read_bytes()
    image.write_bytes(kept[: len(kept) // 2])
    assert start.wait() == [1]
    again = Forked(config)  # nothing has changed
    assert again.wait() == [1]
    for output in (start.output, again.output):
        (message,) = re.findall("error: .*", output)
        assert "train.jsonl:3: sample 'sample-2': image '2-1.png' is damaged or cut short" in message
        assert "Put it back, and the same command goes on. The last checkpoint is" in message
        assert "Traceback" not in output
    image.write_bytes(kept)
    assert Forked(config).wait() == [0]
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def assert_equal_runs(whole: Path, disturbed: Path) -> None:
    assert logged(disturbed) == logged(whole)
    expected, found = final_weights(whole), final_weights(disturbed)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
