"""Asked by a signal, a run saves and exits with 75 wherever it is; the same command goes on as if undisturbed."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import phi3v.train.evaluation as evaluation
import phi3v.train.stopping as stopping
from commands import Command, kill
from phi3v.arguments import EXIT_STOPPED
from phi3v.runlog import RunDirectory
from phi3v.train.trainer import Phi3VTrainer
from training import final_weights, logged, make_config, train_in_child, write_training_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_data(tmp_path_factory.mktemp("stop") / "data")


def ask_at_call(owner: Any, name: str, number: int, signals: int = 1) -> Callable[[], None]:
    """Returns what makes a child process signal itself at a function's call of this number, 1-based."""
    calls = iter(range(1, 1_000_000))

    def prepare() -> None:
        function = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                for _ in range(signals):
                    os.kill(os.getpid(), signal.SIGTERM)
            return function(*args, **kwargs)

        setattr(owner, name, call)

    return prepare


STOPS = {
    "taking the score before training": (ask_at_call(evaluation, "evaluate_model", 1), []),
    # From the scheduler, and passed on by torchrun: one request.
    "in step 1, by two signals": (ask_at_call(Phi3VTrainer, "compute_loss", 1, signals=2), [1]),
    "in step 4, after which a score is due": (ask_at_call(Phi3VTrainer, "compute_loss", 5), [1, 4]),
    # In this start the score of step 4 is taken first.
    "taking the score that was left out": (ask_at_call(evaluation, "evaluate_model", 1), [1, 4]),
    "taking the score of step 6, due as the last one": (ask_at_call(evaluation, "evaluate_model", 2), [4, 6]),
    # First the score of step 6 is taken; the one after training is taken over from it.
}


def test_full_run_stopped_everywhere(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    settings = {"eval_data": [data / "eval.jsonl"], "eval_steps": 4, "eval_max_new_tokens": 2, "save_steps": None}
    whole = make_config(tiny_dir, data, tmp_path / "whole", **settings)
    assert train_in_child(whole) == 0
    stopped = make_config(tiny_dir, data, tmp_path / "stopped", num_workers=1, **settings)
    for where, (prepare, steps) in STOPS.items():
        assert train_in_child(stopped, prepare) == EXIT_STOPPED, f"the run was not stopped {where}"
        folders = (tmp_path / "stopped" / "checkpoints").glob("checkpoint-*")
        assert {int(path.name.removeprefix("checkpoint-")) for path in folders} == set(steps), where
    assert train_in_child(stopped) == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "stopped")
    assert RunDirectory(tmp_path / "stopped").best() == RunDirectory(tmp_path / "whole").best()


def test_a_stop_after_training_leaves_the_score_to_the_next_start(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    settings = {"eval_data": [data / "eval.jsonl"], "eval_max_new_tokens": 2, "max_steps": 1, "eval_before": False}
    config = make_config(tiny_dir, data, tmp_path / "run", **settings)
    run = RunDirectory(tmp_path / "run")
    assert train_in_child(config, ask_at_call(evaluation, "evaluate_model", 1)) == EXIT_STOPPED
    assert run.model_dir.is_dir() and run.evaluation("after") is None
    assert train_in_child(config) == 0
    after = run.evaluation("after")
    assert after is not None and after["step"] == 1


@pytest.mark.slow
def test_a_late_score_that_is_the_first_is_the_best_on_record(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    settings = {"eval_data": [data / "eval.jsonl"], "eval_steps": 2, "max_steps": 2, "eval_max_new_tokens": 1}
    config = make_config(tiny_dir, data, tmp_path / "run", eval_before=False, **settings)
    assert train_in_child(config, ask_at_call(evaluation, "evaluate_model", 1)) == EXIT_STOPPED
    run = RunDirectory(tmp_path / "run")
    assert run.best() is None
    assert train_in_child(config) == 0
    assert run.best() == {"step": 2, "score": 0.0, "metric": "accuracy"}
    assert [(line["step"], line["when"]) for line in run.evals()] == [(2, "during"), (2, "after")]


@pytest.mark.slow
def test_patience_that_a_late_score_uses_up_ends_training(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    settings = {"eval_data": [data / "eval.jsonl"], "eval_steps": 1, "eval_max_new_tokens": 1}
    settings |= {"early_stopping_patience": 2, "eval_before": False}
    whole = make_config(tiny_dir, data, tmp_path / "whole", **settings)
    assert train_in_child(whole) == 0
    assert [line["step"] for line in RunDirectory(tmp_path / "whole").steps()] == [1, 2, 3]  # all scores are 0
    stopped = make_config(tiny_dir, data, tmp_path / "stopped", **settings)
    assert train_in_child(stopped, ask_at_call(evaluation, "evaluate_model", 3)) == EXIT_STOPPED
    assert train_in_child(stopped) == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "stopped")


def test_a_second_request_ends_the_run_at_once(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(tiny_dir, data, tmp_path / "run")

    def prepare() -> None:
        stopping.AT_ONCE_AFTER_S = 0.3

        def ask_and_hang(*args: Any, **kwargs: Any) -> None:
            for pause_s in (0.0, 1.0):
                timer = threading.Timer(pause_s, os.kill, (os.getpid(), signal.SIGTERM))
                timer.start()
            time.sleep(60)

        Phi3VTrainer.compute_loss = ask_and_hang

    assert train_in_child(config, prepare, timeout_s=40) == -signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_processes", "whom", "parallel"),
    [
        (1, "the whole group", "ddp"),
        (2, "the launcher", "fsdp2"),
        (2, "the whole group", "ddp"),
        (2, "one rank, by SIGUSR1", "ddp"),
    ],
)
def test_command_stopped_by_a_scheduler(
    num_processes: int, whom: str, parallel: str, tiny_dir: Path, data: Path, tmp_path: Path
) -> None:
    """Processes that prepare samples get the signal too, and the step that is finished needs them."""
    settings = {"num_train_epochs": 4, "num_workers": 1, "save_steps": 100, "parallel": parallel}
    whole = make_config(tiny_dir, data, tmp_path / "whole", **settings)
    assert Command(whole, num_processes).wait() == 0
    stopped = make_config(tiny_dir, data, tmp_path / "stopped", **settings)
    for step in (2, 6):
        command = Command(stopped, num_processes)
        assert command.until_step(step)
        if whom == "the whole group":  # torchrun passes it on besides
            for pid in [*command.workers(), *command.ranks(), command.process.pid]:
                kill(pid, signal.SIGTERM)
        elif whom == "the launcher":
            kill(command.process.pid, signal.SIGTERM)
        else:
            kill(command.ranks()[-1], signal.SIGUSR1)
        code = command.wait()
        assert code == (EXIT_STOPPED if num_processes == 1 else 1)  # torchrun has a code of its own
        assert command.output.count("stopped: the run was asked to stop, and did after step") == 1
        assert command.output.count("The same command goes on.") == 1
    command = Command(stopped, num_processes)
    assert command.wait() == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "stopped")


def assert_equal_runs(whole: Path, stopped: Path) -> None:
    assert logged(stopped) == logged(whole)
    expected, found = final_weights(whole), final_weights(stopped)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
