"""How a start relates to what the run directory already holds: a new run, a run to go on with, or a finished one."""

import fcntl
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3v.config import TrainConfig
from phi3v.errors import CheckpointError, ConfigError
from phi3v.files import write_json
from phi3v.runlog import RunDirectory
from phi3v.train.checkpoints.identity import require_same_run
from phi3v.train.checkpoints.store import Checkpoint, CheckpointStore
from phi3v.train.room import keeps_best
from phi3v.train.scores import SCORE_KEY, Best, best_of, is_out_of_patience, scores_in

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run goes on.

    Attributes:
        checkpoint: the newest complete one; None: training starts at step 0.
        result_step: the step whose weights lie in ``RUN/model``; None while there is no result.
        is_scored: whether the result's score is there too, or not asked for.
        has_first_score: whether the score from before training is on record.
        lost: steps with a score whose checkpoint is no longer there or damaged: none of them can be the result.
    """

    checkpoint: Checkpoint | None = None
    result_step: int | None = None
    is_scored: bool = False
    has_first_score: bool = False
    lost: frozenset[int] = frozenset()

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
        if self.checkpoint is None or config.eval_steps is None:
            return False
        # Trainer takes one at the last step, too.
        is_last = self.checkpoint.step >= self.checkpoint.trainer_state()["max_steps"]
        if self.checkpoint.step % config.eval_steps and not is_last:
            return False
        return all(best.step != self.checkpoint.step for best in scores_in(self.log_history()))


@contextmanager
def sole_writer(run: RunDirectory) -> Iterator[None]:
    """Holds the run directory against a second process; the system lets go of it when this one dies.

    Raises:
        ConfigError: the folder cannot be made or written to.
        CheckpointError: another process has it.
    """
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        lock = (run.path / ".lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"output_dir {run.path} cannot be written to: {error.strerror}; choose another one"
        ) from error
    with lock as file:
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
        CheckpointError: what is there belongs to a run with other settings, or nobody knows to which.
    """
    store.root.mkdir(parents=True, exist_ok=True)
    store.clear_leftovers()
    place = run.identity_path
    stored = _read(place) if place.is_file() else None
    if run.model_dir.is_dir():
        if stored is None or not run.result_path.is_file():
            raise _unknown_run(run)
        _require_same(place, stored, identity)
        is_scored = not config.eval_data or run.evaluation("after") is not None
        return Start(result_step=_read(run.result_path)["step"], is_scored=is_scored)
    checkpoint = store.newest()
    if checkpoint is not None:
        _require_same(checkpoint.folder, checkpoint.identity, identity)
        run.truncate_after(checkpoint.step)
        logger.info("Going on from %s, step %d.", checkpoint.folder, checkpoint.step)
    elif run.steps():
        if stored is None:
            raise _unknown_run(run)
        _require_same(place, stored, identity)
        run.truncate_after(0)
        logger.warning("%s has no checkpoint: training starts again at step 0.", store.root)
    elif stored is not None and stored["decides"] == identity["decides"]:
        # Killed before its first step: the score from before training still holds.
        run.truncate_after(0)
    else:
        run.clear_logs()
    write_json(place, identity)
    best, lost = None, frozenset[int]()
    if checkpoint is not None and keeps_best(config):
        best, lost = best_whole(Start(checkpoint).log_history(), store, last=checkpoint.step)
    run.write_best(None if best is None else best.record(config.eval_metric))
    return Start(checkpoint=checkpoint, has_first_score=run.evaluation("before") is not None, lost=lost)


def _unknown_run(run: RunDirectory) -> CheckpointError:
    return CheckpointError(
        f"{run.path} holds a run, but not the {run.identity_path.name} and {run.result_path.name} that say which; "
        "use another output_dir, or delete it"
    )


def kept_sharing(run: RunDirectory, store: CheckpointStore) -> int | None:
    """Returns what ``shared_questions`` came to in the run that the directory holds; None where nothing goes on.

    It decides the order of the samples, and where the configuration leaves it open, is chosen from settings that a
    resume may change.
    """
    identity = store.newest_identity()
    path = run.identity_path
    if identity is None and path.is_file() and (run.model_dir.is_dir() or run.steps()):
        identity = _read(path)
    return None if identity is None else identity["decides"].get("shared_questions")


def best_whole(
    log_history: Sequence[Mapping[str, Any]],
    store: CheckpointStore,
    lost: frozenset[int] = frozenset(),
    *,
    last: int = -1,
) -> tuple[Best | None, frozenset[int]]:
    """Returns the best score whose checkpoint is whole, and the steps of the better ones whose checkpoint is not.

    Args:
        log_history: Trainer's.
        store: of the run.
        lost: steps that are known to have none.
        last: a step that needs no checkpoint, for its weights are at hand.
    """
    passed_over: list[Best] = []
    while (best := best_of(log_history, lost)) is not None and best.step != last and not store.is_whole(best.step):
        passed_over.append(best)
        lost |= {best.step}
    if passed_over:
        named = ", ".join(f"{one.step} ({one.score:.4f})" for one in passed_over)
        counts = "no score counts" if best is None else f"the best that counts is step {best.step}'s, {best.score:.4f}"
        logger.warning("Scores whose checkpoint is not there or damaged: of step %s; %s.", named, counts)
    return best, lost


def _require_same(place: Path, stored: dict[str, Any], identity: dict[str, Any]) -> None:
    for change in require_same_run(stored, identity, place):
        logger.warning("Going on, but no longer bit for bit: %s.", change)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
