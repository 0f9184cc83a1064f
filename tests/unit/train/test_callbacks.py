from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import TrainerControl, TrainerState

from phi3v.errors import Phi3VError
from phi3v.train.batches import WindowPlan
from phi3v.train.callbacks.guards import MOST_SKIPPED_STEPS, NonFiniteGuard, StepReading
from phi3v.train.callbacks.milestones import KeepBest, LogAtMilestones, StopWhenAsked
from phi3v.train.scores import best_of, is_out_of_patience
from phi3v.train.stopping import Stop
from phi3v.train.trainer import Phi3VTrainer, Window


def history(*scores: float) -> list[dict[str, Any]]:
    """A log history with a score every 10 steps, other entries between."""
    entries: list[dict[str, Any]] = [{"step": 1, "loss": 2.0}]
    for number, score in enumerate(scores, start=1):
        entries += [{"step": 10 * number, "loss": 1.0}, {"step": 10 * number, "eval_score": score}]
    return entries


@pytest.mark.parametrize(
    ("scores", "best"),
    [([], None), ([0.0], (10, 0.0)), ([0.1, 0.5, 0.5, 0.2], (20, 0.5)), ([0.3, 0.1, 0.4], (30, 0.4))],
)
def test_best_is_the_earliest_of_the_highest(scores: list[float], best: tuple[int, float] | None) -> None:
    assert best_of(history(*scores)) == best


@pytest.mark.parametrize(
    ("scores", "patience", "is_out"),
    [
        ([0.5, 0.4], 2, False),
        ([0.5, 0.4, 0.5], 2, True),
        ([0.5, 0.4, 0.6], 2, False),
        ([0.5, 0.4], 1, True),
        ([0.5, 0.4, 0.3, 0.2], None, False),
        ([], 1, False),
    ],
)
def test_patience_counts_scores_since_the_best(scores: list[float], patience: int | None, is_out: bool) -> None:
    assert is_out_of_patience(history(*scores), patience) is is_out


@pytest.mark.parametrize(("scores", "saves"), [([0.1, 0.2], True), ([0.2, 0.2], False), ([0.2, 0.1], False)])
@pytest.mark.parametrize("keep_best", [True, False])
def test_a_new_best_is_saved(scores: list[float], saves: bool, keep_best: bool) -> None:
    state = TrainerState(global_step=20, log_history=history(*scores))
    control = TrainerControl()
    KeepBest(keep_best, patience=None).on_evaluate(cast(Any, None), state, control)
    assert control.should_save is (saves and keep_best)
    assert not control.should_training_stop


@pytest.mark.parametrize("milestone", ["should_save", "should_evaluate"])
def test_milestones_are_logged(milestone: str) -> None:
    control = TrainerControl(**{milestone: True})
    LogAtMilestones().on_step_end(cast(Any, None), TrainerState(), control)
    assert control.should_log
    quiet = TrainerControl()
    LogAtMilestones().on_step_end(cast(Any, None), TrainerState(), quiet)
    assert not quiet.should_log


def test_a_step_that_all_agreed_to_stop_after_is_saved_and_its_score_left_to_the_resumed_run() -> None:
    stop = Stop()
    control = TrainerControl(should_evaluate=True)
    StopWhenAsked(stop).on_step_end(cast(Any, None), TrainerState(), control)
    assert control.should_evaluate and not control.should_save and not control.should_training_stop
    stop.is_agreed = True
    StopWhenAsked(stop).on_step_end(cast(Any, None), TrainerState(), control)
    assert not control.should_evaluate
    assert control.should_log and control.should_save and control.should_training_stop


class Steps:
    """Feeds losses and gradient norms to the guard, as a trainer would."""

    def __init__(self, is_fp16: bool) -> None:
        self.trainer = SimpleNamespace(window=None)
        self.reading = StepReading(cast(Phi3VTrainer, self.trainer), Stop())
        self.guard = NonFiniteGuard(self.reading, lambda step: f"samples of {step}", lambda: "Checkpoint 3 is there.")
        self.args: Any = SimpleNamespace(fp16=is_fp16, world_size=1)
        self.optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.25)

    def step(self, loss: float, norm: float) -> None:
        self.trainer.window = Window(WindowPlan((), 1, 1, 1, 1), 0.0, torch.tensor(loss), torch.tensor(norm))
        state = TrainerState(global_step=4)
        for callback in (self.reading, self.guard):
            callback.on_pre_optimizer_step(self.args, state, TrainerControl(), optimizer=self.optimizer)


@pytest.mark.parametrize(
    ("is_fp16", "loss", "norm", "found"),
    [
        (False, float("nan"), 1.0, "the loss is nan"),
        (True, float("inf"), 1.0, "the loss is inf"),
        (False, 1.5, float("nan"), "the loss is 1.5, but its gradient's norm is nan"),
        (False, 1.5, float("inf"), "norm is inf"),
    ],
)
def test_the_guard_says_step_samples_rate_and_checkpoint(is_fp16: bool, loss: float, norm: float, found: str) -> None:
    with pytest.raises(Phi3VError) as caught:
        Steps(is_fp16).step(loss, norm)
    message = str(caught.value)
    assert message.startswith("step 5: ") and found in message
    for fact in ("Learning rate: 0.25", "samples of 4", "Checkpoint 3 is there."):
        assert fact in message


def test_fp16_may_skip_steps_but_not_forever() -> None:
    steps = Steps(is_fp16=True)
    for _ in range(2):
        for _ in range(MOST_SKIPPED_STEPS - 1):
            steps.step(1.0, float("inf"))
        steps.step(1.0, 1.0)
    for _ in range(MOST_SKIPPED_STEPS - 1):
        steps.step(1.0, float("nan"))
    with pytest.raises(Phi3VError, match="overflowed in 50 steps in a row"):
        steps.step(1.0, float("inf"))
