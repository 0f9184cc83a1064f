"""Steps at which something is logged, saved or scored, and at which training ends."""

from collections.abc import Collection
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from phi3v.train.scores import best_of, is_out_of_patience
from phi3v.train.stopping import Stop
from phi3v.train.trainer import Phi3VTrainer


class LogAtMilestones(TrainerCallback):
    """Logs at every step that saves or takes a score, whatever ``logging_steps`` says.

    A logged loss is the mean since the last log, and a resumed run starts that mean anew: with a log at every
    checkpoint, its log lines are those of the uninterrupted run.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save or control.should_evaluate:
            control.should_log = True


class KeepBest(TrainerCallback):
    """Saves at every new best score; stops training when scores stay below the best for too long.

    Both follow from the log history, which checkpoints hold: a resumed run decides as the uninterrupted one. Patience
    counts all scores; what is saved counts those that could still be the result.

    Args:
        keep_best: whether a new best is saved.
        patience: scores in a row without a new best after which training stops; None: never.
        lost: steps whose checkpoint was gone when the run started again: a new best need not be better than they were.
    """

    def __init__(self, keep_best: bool, patience: int | None, lost: Collection[int] = ()) -> None:
        self._keep_best = keep_best
        self._patience = patience
        self._lost = lost

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        best = best_of(state.log_history, self._lost)
        if self._keep_best and best is not None and best.step == state.global_step:
            control.should_save = True
        if is_out_of_patience(state.log_history, self._patience):
            control.should_training_stop = True


class StopWhenAsked(TrainerCallback):
    """Ends training after the step in which the processes agreed to stop, with a checkpoint.

    A score that would be due is left to the resumed run: it may take longer than a scheduler waits.

    Args:
        stop: whether they agreed.
    """

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._stop.is_agreed:
            control.should_evaluate = False
            control.should_log = control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._stop.is_agreed:
            control.should_save = control.should_training_stop = True


class LateScore(TrainerCallback):
    """Enters into the log a score that the stopped run had left out and the resumed one took before its first step.

    Args:
        trainer: logs it.
        score: as ``Scorer.score_during`` gives it.
    """

    def __init__(self, trainer: Phi3VTrainer, score: dict[str, float]) -> None:
        self._trainer = trainer
        self._score = score

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.log(self._score)
