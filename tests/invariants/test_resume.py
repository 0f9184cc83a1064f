"""kill -9 anywhere, start the same command again: losses, scores and final weights are those of the undisturbed run."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import phi3v.train.checkpoints.state as state
import phi3v.train.checkpoints.store as checkpoints
import phi3v.train.evaluation as evaluation
import phi3v.train.run as run
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.runlog import RunDirectory
from phi3v.train.trainer import Phi3VTrainer
from training import (
    die,
    final_weights,
    logged,
    make_config,
    train_in_child,
    write_shared_data,
    write_training_data,
)

FULL = {"eval_steps": 3, "eval_max_new_tokens": 2}
LORA = {"lora_rank": 2, "lora_dropout": 0.3, "save_steps": 1, "logging_steps": 5, "max_steps": 5}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_data(tmp_path_factory.mktemp("resume") / "data")


def patch(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[[], None]:
    """Returns what replaces ``owner.name`` in a child process."""
    return lambda: setattr(owner, name, make(getattr(owner, name)))


def die_at_call(number: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function kill its process at its call of this number, 1-based."""
    calls = iter(range(1, 1_000_000))

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: die() if next(calls) == number else function(*args, **kwargs)

    return make


def die_inside(owner: Any, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function kill its process when it calls ``owner.name``."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            patch(owner, name, die_at_call(1))()
            return function(*args)

        return call

    return make


def write_half_and_die(function: Callable[..., Any]) -> Callable[..., Any]:
    def save(tensors: Any, path: Path) -> None:
        function(tensors, path)
        if path.name.startswith("optimizer-"):
            os.truncate(path, path.stat().st_size // 2)
            die()

    return save


FULL_DEATHS = {
    "taking the score before training": patch(evaluation, "evaluate_model", die_at_call(1)),
    "in step 2, before any checkpoint": patch(Phi3VTrainer, "micro_step", die_at_call(3)),
    "in the middle of the optimizer's state": patch(state, "save_file", write_half_and_die),
    "before the manifest": patch(checkpoints, "_write_manifest", die_at_call(1)),
    "after the manifest, before the rename": patch(checkpoints, "sync_folder", die_at_call(1)),
    "in step 3, between two micro-batches": patch(Phi3VTrainer, "micro_step", die_at_call(6)),
    "deleting an old checkpoint": patch(checkpoints.CheckpointStore, "_discard", die_at_call(1)),
    "in step 6, beyond the checkpoint of step 4": patch(Phi3VTrainer, "micro_step", die_at_call(5)),
    "in the middle of the result": patch(run, "save_result", die_inside(Phi3VProcessor, "save_pretrained")),
    "after the result": patch(run, "write_report", die_at_call(1)),
}


SOME_DEATHS = [
    "in the middle of the optimizer's state",
    "in step 3, between two micro-batches",
    "after the manifest, before the rename",
]
"""Those of the default suite."""


@pytest.mark.parametrize("deaths", [SOME_DEATHS, pytest.param([*FULL_DEATHS], marks=pytest.mark.slow)], ids=len)
def test_full_run_killed_again_and_again(deaths: list[str], tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    settings = {**FULL, "eval_data": [data / "eval.jsonl"], "keep_checkpoints": 1}
    whole = make_config(tiny_dir, data, tmp_path / "whole", **settings)
    assert train_in_child(whole) == 0
    killed = make_config(tiny_dir, data, tmp_path / "killed", num_workers=2, **settings)
    for where in deaths:
        assert train_in_child(killed, FULL_DEATHS[where]) == -signal.SIGKILL, f"the run was not killed {where}"
    assert train_in_child(killed) == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(
    "method",
    [
        {"method": "lora"},
        pytest.param(
            {"method": "qlora", "use_dora": True, "use_rslora": True, "four_bit_parts": ["decoder", "vision"]},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["lora", "qlora"],
)
def test_adapters_with_dropout_killed_within_epochs(
    method: dict[str, Any], wide_dir: Path, data: Path, tmp_path: Path
) -> None:
    """Two micro-batches a step, three steps an epoch; the run ends in the middle of its second epoch."""
    if method["method"] == "qlora":
        pytest.importorskip("bitsandbytes")
    whole = make_config(wide_dir, data, tmp_path / "whole", **method, **LORA)
    assert train_in_child(whole) == 0
    killed = make_config(wide_dir, data, tmp_path / "killed", **method, **LORA)
    deaths = [patch(Phi3VTrainer, "micro_step", die_at_call(call)) for call in (4, 8)]
    for death in (*deaths, patch(run, "save_result", die_at_call(1))):
        assert train_in_child(killed, death) == -signal.SIGKILL
    assert train_in_child(killed) == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_shared_run_killed_within_epochs(tiny_dir: Path, tmp_path: Path) -> None:
    """Windows of 5, 5 and 3 samples in one to three micro-batches, which workers read ahead over the epochs' ends."""
    data = write_shared_data(tmp_path / "data")
    settings = {"batch_size": 5, "shared_questions": 4, "micro_batch_size": None, "micro_batch_tokens": 150}
    whole = make_config(tiny_dir, data, tmp_path / "whole", save_steps=1, **settings)
    assert train_in_child(whole) == 0
    killed = make_config(tiny_dir, data, tmp_path / "killed", save_steps=1, num_workers=2, **settings)
    for call in (2, 4, 3):
        assert train_in_child(killed, patch(Phi3VTrainer, "micro_step", die_at_call(call))) == -signal.SIGKILL
    assert train_in_child(killed) == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


def test_frequencies_may_change_when_a_run_goes_on(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    settings = {"eval_data": [data / "eval.jsonl"], "eval_max_new_tokens": 1, "eval_before": False}
    rare = {"save_steps": 2, "logging_steps": 2, "eval_steps": None}
    config = make_config(tiny_dir, data, tmp_path / "run", **settings, **rare)
    assert train_in_child(config, patch(Phi3VTrainer, "micro_step", die_at_call(6))) == -signal.SIGKILL
    often = {"save_steps": 1, "logging_steps": 1, "eval_steps": 2, "keep_checkpoints": 9}
    assert train_in_child(make_config(tiny_dir, data, tmp_path / "run", **settings, **often)) == 0
    run = RunDirectory(tmp_path / "run")
    assert [line["step"] for line in run.steps()] == [2, 3, 4, 5, 6]
    # The score of step 2 would have been due, so it is taken late. All are 0, and the earliest of equals is the best.
    scored = [(2, "during"), (4, "during"), (6, "during"), (2, "after")]
    assert [(line["step"], line["when"]) for line in run.evals()] == scored
    assert {path.name for path in run.checkpoints_dir.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in range(2, 7)}


@pytest.mark.slow
def test_command_killed_at_random_times(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    """The same through the real command, with real signals at moments nobody chose."""

    def command(name: str) -> subprocess.Popen[bytes]:
        config = make_config(tiny_dir, data, tmp_path / name, num_train_epochs=4, num_workers=2)
        file = tmp_path / f"{name}.yaml"
        file.write_text(config.to_yaml())
        return subprocess.Popen(
            [sys.executable, "-m", "phi3v", "train", str(file)], env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    assert command("whole").wait() == 0
    dice = random.Random(4)
    for _ in range(3):
        process = command("killed")
        before = len(RunDirectory(tmp_path / "killed").steps())
        while process.poll() is None and len(RunDirectory(tmp_path / "killed").steps()) <= before:
            time.sleep(0.01)
        time.sleep(dice.random())
        process.kill()
        process.wait()
    assert command("killed").wait() == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


def assert_equal_runs(whole: Path, killed: Path) -> None:
    assert logged(killed) == logged(whole)
    expected, found = final_weights(whole), final_weights(killed)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert RunDirectory(killed).prediction_steps() == RunDirectory(whole).prediction_steps()
    for step in RunDirectory(whole).prediction_steps():
        assert RunDirectory(killed).predictions(step) == RunDirectory(whole).predictions(step)
    folders = [{path.name for path in (one / "checkpoints").glob("*checkpoint-*")} for one in (whole, killed)]
    assert folders[0] == folders[1]
