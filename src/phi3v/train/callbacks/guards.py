"""What looks at every step before it is taken: its loss and gradient, what they say, and whose samples they are."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from phi3v.errors import Phi3VError
from phi3v.train.stopping import Stop
from phi3v.train.trainer import Phi3VTrainer
from phi3v.train.tripwire import Range, Tripwire

logger = logging.getLogger(__name__)

MOST_SKIPPED_STEPS = 50
"""fp16 steps in a row without a finite gradient after which it is no longer the loss scale looking for its place: it
starts at 65536 and halves each time."""

SAMPLES_NAMED = 8
"""Sample ids that a message names."""


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


def in_short(names: Sequence[str]) -> str:
    """Returns the first ``SAMPLES_NAMED`` of some names, and how many more there are."""
    more = len(names) - SAMPLES_NAMED
    return ", ".join(names[:SAMPLES_NAMED]) + (f" and {more} more" if more > 0 else "")


def _learning_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return sorted({float(group["lr"]) for group in optimizer.param_groups})


def _as_fields(name: str, expected: Range | None) -> dict[str, float]:
    return {} if expected is None else {f"{name}_median": expected.median, f"{name}_limit": expected.limit}
