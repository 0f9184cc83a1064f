"""What happens around an optimizer step: the progress line, the run log, and when to save, to stop and to give up."""

import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from phi3v.errors import Phi3VError
from phi3v.runlog import RunDirectory
from phi3v.train.scores import best_of, is_out_of_patience
from phi3v.train.stopping import Stop
from phi3v.train.trainer import Phi3VTrainer
from phi3v.train.tripwire import Range, Tripwire

logger = logging.getLogger(__name__)

MOST_SKIPPED_STEPS = 50
"""fp16 steps in a row without a finite gradient after which it is no longer the loss scale looking for its place: it
starts at 65536 and halves each time."""

SAMPLES_NAMED = 8
"""Sample ids that a message names."""

_STEP_FIELDS = (
    "loss", "learning_rate", "grad_norm", "samples_per_s", "tokens_per_s", "sharing", "memory_bytes", "elapsed_s",
)  # fmt: skip


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


class StepReading(TrainerCallback):
    """Reads before every optimizer step what all processes must know alike: one small sum over them, the only one.

    Stands before the callbacks that use it.

    Args:
        trainer: whose window is read.
        stop: whether this process is asked to stop.

    Attributes:
        loss: of the whole window, nats per answer token.
        grad_norm: before clipping.
    """

    def __init__(self, trainer: Phi3VTrainer, stop: Stop) -> None:
        self._trainer = trainer
        self._stop = stop
        self.loss = self.grad_norm = 0.0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        window = self._trainer.window
        assert window is not None
        loss = window.loss.float()
        own = [window.grad_norm or 0.0, self._stop.is_asked]
        read = torch.stack([loss, *(torch.as_tensor(one, dtype=loss.dtype, device=loss.device) for one in own)])
        if args.world_size > 1:
            reduced = self._trainer.accelerator.reduce(read, reduction="mean")
            assert isinstance(reduced, torch.Tensor)
            read = reduced
        self.loss, self.grad_norm, share_asked = read.tolist()
        self._stop.is_agreed = self._stop.is_agreed or share_asked > 0


class NonFiniteGuard(TrainerCallback):
    """Stops the run before a loss or gradient that is not finite reaches the weights.

    A gradient overflow in fp16 is not an error: the gradient scaler skips the step and lowers its scale. A loss that
    is not finite is one, and so are ``MOST_SKIPPED_STEPS`` skipped steps in a row. All processes read the same, and
    stop together: those left would wait for the others until they time out.

    Args:
        reading: of the step.
        describe_samples: names the samples of an optimizer step, 0-based.
        last_checkpoint: describes the newest complete checkpoint.
    """

    def __init__(
        self, reading: StepReading, describe_samples: Callable[[int], str], last_checkpoint: Callable[[], str]
    ) -> None:
        self._reading = reading
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
        assert optimizer is not None
        loss, norm = self._reading.loss, self._reading.grad_norm
        is_skipped = args.fp16 and not math.isfinite(norm)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if is_skipped else 0
        found = None
        if not math.isfinite(loss):
            found = f"the loss is {loss}"
        elif not math.isfinite(norm) and not args.fp16:
            found = f"the loss is {loss:.4g}, but its gradient's norm is {norm}"
        elif self._skipped_in_a_row >= MOST_SKIPPED_STEPS:
            found = f"fp16 gradients overflowed in {MOST_SKIPPED_STEPS} steps in a row"
        if found is not None:
            raise Phi3VError(self._message(state.global_step, found, optimizer))

    def _message(self, step: int, found: str, optimizer: torch.optim.Optimizer) -> str:
        rates = ", ".join(f"{rate:g}" for rate in _learning_rates(optimizer))
        return (
            f"step {step + 1}: {found}, so the step was not taken and training stops. Learning rate: {rates}. "
            f"Samples of the step: {self._describe_samples(step)}. {self._last_checkpoint()} Lower the learning rate, "
            "warm up longer, or use precision bf16 or fp32; if the same samples come up again, look at them. A changed "
            "setting needs a new output_dir."
        )


class SpikeAlarm(TrainerCallback):
    """Reports a step whose loss or gradient norm is far above those before, with its samples; may stop the run first.

    Args:
        reading: of the step.
        tripwire: knows the steps before.
        culprits: finds the worst micro-batch.
        sample_ids: names all samples of an optimizer step, 0-based.
        record: writes a line of ``spikes.jsonl``; None on a process that does not write.
        stops: end the run before the step is taken.
        last_checkpoint: describes the newest complete checkpoint.
    """

    def __init__(
        self,
        reading: StepReading,
        tripwire: Tripwire,
        culprits: "Culprits",
        *,
        sample_ids: Callable[[int], list[str]],
        record: Callable[[Mapping[str, Any]], None] | None,
        stops: bool,
        last_checkpoint: Callable[[], str],
    ) -> None:
        self._reading = reading
        self._tripwire = tripwire
        self._culprits = culprits
        self._sample_ids = sample_ids
        self._record = record
        self._stops = stops
        self._last_checkpoint = last_checkpoint

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        assert optimizer is not None
        spike = self._tripwire.see(self._reading.loss, self._reading.grad_norm)
        if spike is None:
            return
        worst = self._culprits.worst()  # all processes take part
        rates = _learning_rates(optimizer)
        if self._record is not None:
            self._record(
                {
                    "step": state.global_step + 1,
                    "loss": spike.loss,
                    **_as_fields("loss", spike.loss_range),
                    "grad_norm": spike.grad_norm,
                    **_as_fields("grad_norm", spike.norm_range),
                    "learning_rate": rates[-1],
                    "worst_loss": worst.loss,
                    "worst_samples": worst.samples,
                    "samples": self._sample_ids(state.global_step),
                    "is_taken": not self._stops,
                }
            )
        text = (
            f"step {state.global_step + 1}: {spike}. Learning rate: {', '.join(f'{rate:g}' for rate in rates)}. "
            f"The worst micro-batch (loss {worst.loss:.4g}) holds {in_short(worst.samples)}; spikes.jsonl names all "
            "samples of the step."
        )
        if self._stops:
            raise Phi3VError(
                f"{text} The step was not taken, and training stops, for on_loss_spike is stop. "
                f"{self._last_checkpoint()} Look at the samples; the same command with --on_loss_spike warn goes on "
                "all the same. A lower learning rate, or other data, is another run and needs another output_dir."
            )
        logger.warning("%s", text)


class Worst(NamedTuple):
    """The micro-batch with the largest loss per sample, or per answer token, as the run weights them."""

    loss: float
    samples: list[str]


class Culprits(TrainerCallback):
    """Keeps what each micro-batch of the current step lost, to say afterwards which one a spike comes from.

    Args:
        trainer: whose windows these are.
        model: the model itself, not wrapped for distributed training.
        sample_id: names a sample by its position.
    """

    def __init__(self, trainer: Phi3VTrainer, model: nn.Module, sample_id: Callable[[int], str]) -> None:
        self._trainer = trainer
        self._sample_id = sample_id
        self._losses: list[torch.Tensor] = []
        model.register_forward_hook(self._keep)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._losses.clear()

    def worst(self) -> Worst:
        """Returns the worst micro-batch of the step so far, over all processes; all of them must ask."""
        trainer = self._trainer
        assert trainer.window is not None
        found = []
        for batch, loss in zip(trainer.window.plan.micro_batches, self._losses, strict=True):
            indices = [index for group in batch.groups for index in group] if batch.counts else []
            by_token = trainer.loss_weighting == "token_mean"
            weight = int(trainer.windows.costs.supervised[indices].sum()) if by_token else len(indices)
            if weight:
                found.append(Worst(float(loss) / weight, [self._sample_id(index) for index in indices]))
        if trainer.args.world_size > 1:
            found = gather_object(found)
        return max(found, key=lambda one: one.loss)

    def _keep(self, module: nn.Module, arguments: object, output: Any) -> None:
        if module.training:
            self._losses.append(output.loss.detach())


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


def in_short(names: Sequence[str]) -> str:
    """Returns the first ``SAMPLES_NAMED`` of some names, and how many more there are."""
    more = len(names) - SAMPLES_NAMED
    return ", ".join(names[:SAMPLES_NAMED]) + (f" and {more} more" if more > 0 else "")


def _learning_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return sorted({float(group["lr"]) for group in optimizer.param_groups})


def _as_fields(name: str, expected: Range | None) -> dict[str, float]:
    return {} if expected is None else {f"{name}_median": expected.median, f"{name}_limit": expected.limit}


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
    """Shows loss, speed and memory.

    Args:
        has_bar: as a progress bar; else as plain lines.
    """

    def __init__(self, *, has_bar: bool) -> None:
        self._has_bar = has_bar
        self._bar: tqdm[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", unit=" steps", dynamic_ncols=True,
            disable=not self._has_bar,
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
