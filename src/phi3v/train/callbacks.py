"""What happens around an optimizer step: the progress line, the run log, and when to save, to stop and to give up."""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from phi3v.errors import Phi3VError
from phi3v.runlog import RunDirectory
from phi3v.train.trainer import Phi3VTrainer

SCORE_KEY = "eval_score"
"""Name of a mid-run score in Trainer's log history."""

MOST_SKIPPED_STEPS = 50
"""fp16 steps in a row without a finite gradient after which it is no longer the loss scale looking for its place: it
starts at 65536 and halves each time."""

_STEP_FIELDS = (
    "loss", "learning_rate", "grad_norm", "samples_per_s", "tokens_per_s", "sharing", "memory_bytes", "elapsed_s",
)  # fmt: skip


class Best(NamedTuple):
    """The best mid-run score so far; the earliest of equals."""

    step: int
    score: float


def scores_in(log_history: Iterable[Mapping[str, Any]]) -> list[Best]:
    """Returns the mid-run scores of a run's log history, in order."""
    return [Best(entry["step"], entry[SCORE_KEY]) for entry in log_history if SCORE_KEY in entry]


def best_of(log_history: Iterable[Mapping[str, Any]]) -> Best | None:
    """Returns the best mid-run score, or None before the first.

    >>> best_of([{"step": 1, "loss": 2.0}, {"step": 1, "eval_score": 0.5}, {"step": 2, "eval_score": 0.5}])
    Best(step=1, score=0.5)
    """
    return max(scores_in(log_history), key=lambda best: best.score, default=None)


def is_out_of_patience(log_history: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Says whether the last ``patience`` mid-run scores brought no new best."""
    best = best_of(log_history)
    if best is None or patience is None:
        return False
    return sum(score.step > best.step for score in scores_in(log_history)) >= patience


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

    Both follow from the log history alone, which checkpoints hold: a resumed run decides as the uninterrupted one.

    Args:
        keep_best: whether a new best is saved.
        patience: scores in a row without a new best after which training stops; None: never.
    """

    def __init__(self, keep_best: bool, patience: int | None) -> None:
        self._keep_best = keep_best
        self._patience = patience

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        best = best_of(state.log_history)
        if self._keep_best and best is not None and best.step == state.global_step:
            control.should_save = True
        if is_out_of_patience(state.log_history, self._patience):
            control.should_training_stop = True


class NonFiniteGuard(TrainerCallback):
    """Stops the run before a loss or gradient that is not finite reaches the weights.

    A gradient overflow in fp16 is not an error: the gradient scaler skips the step and lowers its scale. A loss that
    is not finite is one, and so are ``MOST_SKIPPED_STEPS`` skipped steps in a row.

    Args:
        trainer: whose window is looked at.
        describe_samples: names the samples of an optimizer step, 0-based.
        last_checkpoint: describes the newest complete checkpoint.
    """

    def __init__(
        self, trainer: Phi3VTrainer, describe_samples: Callable[[int], str], last_checkpoint: Callable[[], str]
    ) -> None:
        self._trainer = trainer
        self._describe_samples = describe_samples
        self._last_checkpoint = last_checkpoint
        self._skipped_in_a_row = 0

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        window = self._trainer.window
        assert window is not None and optimizer is not None
        loss = window.loss
        if args.world_size > 1:
            # All processes must stop together, or those left wait for the others until they time out.
            reduced = self._trainer.accelerator.reduce(loss, reduction="mean")
            assert isinstance(reduced, torch.Tensor)
            loss = reduced
        loss_value, norm = float(loss), float(window.grad_norm or 0.0)
        is_skipped = args.fp16 and not math.isfinite(norm)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if is_skipped else 0
        found = None
        if not math.isfinite(loss_value):
            found = f"the loss is {loss_value}"
        elif not math.isfinite(norm) and not args.fp16:
            found = f"the loss is {loss_value:.4g}, but its gradient's norm is {norm}"
        elif self._skipped_in_a_row >= MOST_SKIPPED_STEPS:
            found = f"fp16 gradients overflowed in {MOST_SKIPPED_STEPS} steps in a row"
        if found is not None:
            raise Phi3VError(self._message(state.global_step, found, optimizer))

    def _message(self, step: int, found: str, optimizer: torch.optim.Optimizer) -> str:
        rates = ", ".join(f"{rate:g}" for rate in sorted({group["lr"] for group in optimizer.param_groups}))
        return (
            f"step {step + 1}: {found}, so the step was not taken and training stops. Learning rate: {rates}. "
            f"Samples of the step: {self._describe_samples(step)}. {self._last_checkpoint()} Lower the learning rate, "
            "warm up longer, or use precision bf16 or fp32; if the same samples come up again, look at them. A changed "
            "setting needs a new output_dir."
        )


class SpeedMeter(TrainerCallback):
    """Measures optimizer steps: data, forward, backward and update, but neither saving nor scoring.

    Args:
        trainer: whose windows are counted.
        earlier_s: seconds that the run trained before it was resumed.
    """

    def __init__(self, trainer: Phi3VTrainer, earlier_s: float) -> None:
        self._trainer = trainer
        self._elapsed_s = earlier_s
        self._samples = self._tokens = self._computed_tokens = 0
        self._seconds = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        window = self._trainer.window
        assert window is not None
        seconds = time.perf_counter() - window.started_s
        self._samples += window.plan.samples
        self._tokens += window.plan.tokens
        self._computed_tokens += window.plan.computed_tokens
        self._seconds += seconds
        self._elapsed_s += seconds

    def read(self) -> dict[str, float]:
        """Returns speed and sharing since the last call, over all processes, and this process's peak memory."""
        speed = {
            "samples_per_s": self._samples / self._seconds,
            "tokens_per_s": self._tokens / self._seconds,
            "sharing": self._tokens / self._computed_tokens,
            "memory_bytes": peak_memory_bytes(self._trainer.args.device),
            "elapsed_s": self._elapsed_s,
        }
        self._samples = self._tokens = self._computed_tokens = 0
        self._seconds = 0.0
        return speed


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the most memory held so far: a GPU's own, or on a CPU the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


class RunLog(TrainerCallback):
    """Writes ``steps.jsonl``.

    Args:
        run: the run directory; only the writing process has this callback.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            measured = {name: logs[name] for name in _STEP_FIELDS if name in logs}
            self._run.append_step({"step": state.global_step, "epoch": state.epoch, **measured})


class ProgressLine(TrainerCallback):
    """Shows loss, speed and memory: as a bar on a terminal, as plain lines elsewhere."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", unit=" steps", dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )  # fmt: skip

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self._bar is not None
        self._bar.update()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or self._bar is None:
            return
        text = (
            f"loss {logs['loss']:.4f}, {logs['samples_per_s']:.3g} samples/s, {logs['tokens_per_s']:,.0f} tokens/s, "
            f"{logs['memory_bytes'] / 1e9:.1f} GB"
        )
        if logs["sharing"] > 1:
            text += f", {logs['sharing']:.2f} x by sharing"
        if self._bar.disable:
            print(f"step {state.global_step}/{state.max_steps}: {text}", file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix_str(text)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._bar is not None
        self._bar.close()
