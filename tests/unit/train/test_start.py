"""What a start finds in its directory: a finished run, one to go on with, or something not to be overwritten."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from phi3v.config import TrainConfig
from phi3v.errors import CheckpointError
from phi3v.files import write_json
from phi3v.runlog import RunDirectory
from phi3v.train.checkpoints.store import CheckpointStore
from phi3v.train.scores import SCORE_KEY
from phi3v.train.start import Start, best_whole, decide_start, kept_sharing

IDENTITY: dict[str, Any] = {"decides": {"learning_rate": 1.0}, "rounds": {}}
OTHER: dict[str, Any] = {"decides": {"learning_rate": 2.0}, "rounds": {}}


class Directory:
    """A run directory, filled as a run would leave it."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.config = TrainConfig(model="m", output_dir=folder, train_data=[Path("t.jsonl")], **changes)
        self.run = RunDirectory(folder)
        self.store = CheckpointStore(self.run.checkpoints_dir, keep=9)
        folder.mkdir()

    def decide(self, identity: dict[str, Any] = IDENTITY) -> Start:
        return decide_start(self.config, self.run, self.store, identity)

    def finish(self, step: int = 3) -> None:
        write_json(self.run.identity_path, IDENTITY)
        write_json(self.run.result_path, {"step": step})
        self.run.model_dir.mkdir()

    def checkpoint(
        self, step: int, history: Sequence[Mapping[str, Any]] = (), identity: dict[str, Any] = IDENTITY
    ) -> None:
        staged = self.store.staging / f"checkpoint-{step}"
        (staged / "training").mkdir(parents=True)
        write_json(staged / "training" / "state.json", {})
        state = {"global_step": step, "max_steps": 9, "log_history": list(history)}
        write_json(staged / "trainer_state.json", state)
        self.store.commit(step, identity)


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    return Directory(tmp_path / "run")


def test_nothing_there(directory: Directory) -> None:
    assert directory.decide() == Start()
    assert directory.decide() == Start()


def test_a_finished_run_needs_no_checkpoints(directory: Directory) -> None:
    directory.finish()
    assert not directory.store.root.exists()
    assert directory.decide() == Start(result_step=3, is_scored=True)


def test_a_model_of_an_unknown_run_is_not_overwritten(directory: Directory) -> None:
    directory.run.model_dir.mkdir()
    with pytest.raises(CheckpointError, match=r"holds a run, but not the identity.json and result.json"):
        directory.decide()


def test_steps_of_a_run_with_other_settings_are_not_thrown_away(directory: Directory) -> None:
    directory.decide()
    directory.run.append_step({"step": 1, "loss": 1.0})
    with pytest.raises(CheckpointError, match=r"learning_rate: 1.0 there, 2.0 now"):
        directory.decide(OTHER)
    assert len(directory.run.steps()) == 1


def test_steps_without_a_checkpoint_are_taken_again_and_that_is_told(
    directory: Directory, caplog: pytest.LogCaptureFixture
) -> None:
    directory.decide()
    directory.run.append_step({"step": 1, "loss": 1.0})
    with caplog.at_level(logging.WARNING):
        assert directory.decide() == Start()
    assert "has no checkpoint: training starts again at step 0" in caplog.text
    assert directory.run.steps() == []


def test_before_the_first_step_settings_may_change(directory: Directory) -> None:
    directory.decide()
    directory.run.append_eval({"step": 0, "when": "before", "score": 0.5})
    directory.decide()
    assert len(directory.run.evals()) == 1
    directory.decide(OTHER)
    assert directory.run.evals() == []


SCORES = [{"step": 1, SCORE_KEY: 0.9}, {"step": 2, SCORE_KEY: 0.5}, {"step": 3, SCORE_KEY: 0.7}]


def test_scores_without_a_whole_checkpoint_are_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = Directory(tmp_path / "run", eval_data=[Path("e.jsonl")], eval_steps=1)
    for step in (2, 3, 4):
        directory.checkpoint(step, SCORES[:step])
    (directory.store.folder(3) / "training" / "state.json").write_text("changed")
    with caplog.at_level(logging.WARNING):
        start = directory.decide()
    assert start.checkpoint is not None and start.checkpoint.step == 4
    assert start.lost == {1, 3}
    assert not directory.store.folder(3).exists()  # set aside
    best, lost = best_whole(SCORES, directory.store, start.lost)
    assert best is not None and best.step == 2 and lost == {1, 3}
    best, lost = best_whole(SCORES, directory.store, last=1)
    assert best is not None and best.step == 1 and lost == frozenset()


def test_the_choice_of_sharing_is_the_runs_that_goes_on(directory: Directory) -> None:
    shared = {**IDENTITY, "decides": {"shared_questions": 8}}
    assert kept_sharing(directory.run, directory.store) is None
    directory.decide(shared)
    assert kept_sharing(directory.run, directory.store) is None  # nothing is trained yet
    directory.run.append_step({"step": 1, "loss": 1.0})
    assert kept_sharing(directory.run, directory.store) == 8
    directory.checkpoint(2, identity={**IDENTITY, "decides": {"shared_questions": 4}})
    assert kept_sharing(directory.run, directory.store) == 4


def test_scores_are_not_looked_at_where_none_is_kept(tmp_path: Path) -> None:
    directory = Directory(tmp_path / "run", eval_data=[Path("e.jsonl")], eval_steps=1, keep_best=False)
    directory.checkpoint(4, SCORES)
    assert directory.decide().lost == frozenset()
