"""How a start relates to what the run directory already holds: a new run, a run to go on with, or a finished one."""

import fcntl
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3v.config import TrainConfig
from phi3v.errors import CheckpointError
from phi3v.runlog import RunDirectory, write_json
from phi3v.train.callbacks import SCORE_KEY, is_out_of_patience, scores_in
from phi3v.train.checkpoints import Checkpoint, CheckpointStore
from phi3v.train.identity import require_same_run

logger = logging.getLogger(__name__)

IDENTITY_FILE = "identity.json"
RESULT_FILE = "result.json"


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run goes on.

    Attributes:
        checkpoint: the newest complete one; None: training starts at step 0.
        result_step: the step whose weights lie in ``RUN/model``; None while there is no result.
        is_scored: whether the result's score is there too, or not asked for.
    """

    checkpoint: Checkpoint | None = None
    result_step: int | None = None
    is_scored: bool = False

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.result_step is not None and self.is_scored

    def is_training_over(self, config: TrainConfig, late_score: float | None = None) -> bool:
        """Whether the checkpoint is the last that training would take: steps or patience are used up.

        Args:
            config: of the run.
            late_score: of the checkpoint's step, if it was taken only now.
        """
        if self.checkpoint is None:
            return False
        state = self.checkpoint.trainer_state()
        if state["global_step"] >= state["max_steps"]:
            return True
        return is_out_of_patience(self.log_history(late_score), config.early_stopping_patience)

    def log_history(self, late_score: float | None = None) -> list[dict[str, Any]]:
        """Returns the checkpoint's log history, with a late score at its end; empty without a checkpoint."""
        if self.checkpoint is None:
            return []
        history = self.checkpoint.trainer_state()["log_history"]
        return history if late_score is None else [*history, {"step": self.checkpoint.step, SCORE_KEY: late_score}]

    def lacks_score(self, config: TrainConfig) -> bool:
        """Whether a score was due at the checkpoint's step and not taken: the run was asked to stop."""
        if self.checkpoint is None or config.eval_steps is None or self.checkpoint.step % config.eval_steps:
            return False
        return all(best.step != self.checkpoint.step for best in scores_in(self.log_history()))


@contextmanager
def sole_writer(run: RunDirectory) -> Iterator[None]:
    """Holds the run directory against a second process; the system lets go of it when this one dies.

    Raises:
        CheckpointError: another process has it.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    with (run.path / ".lock").open("w") as file:
        try:
            # Not flock, whose lock would live on in the loader workers of a killed process.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(
                f"{run.path}: another process is training in this directory; wait for it, or use another output_dir"
            ) from error
        yield


def refuse_existing_run(config: TrainConfig, run: RunDirectory, store: CheckpointStore) -> None:
    """Refuses, with ``resume=never``, a directory that holds a run.

    Raises:
        CheckpointError: names what is there.
    """
    if config.resume == "never" and (run.has_logs or store.steps() or run.model_dir.exists()):
        raise CheckpointError(
            f"{run.path} already holds a run, and resume is never; use another output_dir, or resume: auto to go on"
        )


def decide_start(config: TrainConfig, run: RunDirectory, store: CheckpointStore, identity: dict[str, Any]) -> Start:
    """Finds out where to go on, and makes the directory ready for it: leftovers removed, logs cut back.

    Raises:
        CheckpointError: what is there belongs to a run with other settings.
    """
    store.root.mkdir(parents=True, exist_ok=True)
    store.clear_leftovers()
    stored_path = store.root / IDENTITY_FILE
    if run.model_dir.is_dir() and stored_path.is_file():
        _require_same(stored_path, _read(stored_path), identity)
        result_step = _read(store.root / RESULT_FILE)["step"]
        is_scored = not config.eval_data or run.evaluation("after") is not None
        return Start(result_step=result_step, is_scored=is_scored)
    checkpoint = store.newest()
    if checkpoint is not None:
        _require_same(checkpoint.folder, checkpoint.identity, identity)
        run.truncate_after(checkpoint.step)
        logger.info("Going on from %s, step %d.", checkpoint.folder, checkpoint.step)
    elif stored_path.is_file() and _read(stored_path)["decides"] == identity["decides"]:
        # Killed before its first checkpoint: the score from before training still holds.
        run.truncate_after(0)
    else:
        run.clear_logs()
    write_json(stored_path, identity)
    return Start(checkpoint=checkpoint)


def _require_same(place: Path, stored: dict[str, Any], identity: dict[str, Any]) -> None:
    for change in require_same_run(stored, identity, place):
        logger.warning("Going on, but no longer bit for bit: %s.", change)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
