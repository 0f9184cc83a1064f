"""transformers' Trainer with our loss weighting, our sample order, our checkpoints and evaluation by generation."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from phi3v.data.collate import Collator
from phi3v.data.encode import IGNORED_LABEL, Encoded
from phi3v.errors import CheckpointError
from phi3v.model.parts import part_of
from phi3v.train.batches import TrainingSamples, WindowSampler
from phi3v.train.tuning import IMAGE_PARTS
from phi3v.train.weights import restore_weights

Batch = dict[str, torch.Tensor]
Weighting = Literal["sample_mean", "token_mean"]


@dataclass(slots=True)
class Window:
    """What the current optimizer step trains on, over all ranks.

    Attributes:
        samples: samples that count.
        tokens: decoder positions, image tokens included and padding not.
        started_s: ``time.perf_counter()`` when the step began to wait for its data.
        loss: this rank's share of the step's loss so far, on the device.
        grad_norm: the gradient's norm before clipping; None until it is known.
    """

    samples: int
    tokens: int
    started_s: float
    loss: torch.Tensor
    grad_norm: torch.Tensor | float | None = None


class Phi3VTrainer(Trainer):
    """Trains on windows of samples whose weighting does not depend on how a window is split.

    The loss of an optimizer step is the weighted sum over its whole window, divided once: by the window's samples
    (``sample_mean``; the collator's weights make each sample's tokens sum to its mean) or by its supervised tokens
    (``token_mean``). Micro-batches, accumulation steps and processes only cut that sum into pieces.

    Args:
        model: prepared for training, on its device.
        args: schedule, clipping, logging and saving, for Trainer.
        samples: what a :class:`~phi3v.train.batches.Draw` is encoded from.
        sampler: this rank's order.
        collator: makes micro-batches; gives the loss weights of ``loss_weighting``.
        loss_weighting: what the window's sum is divided by.
        optimizer: over the model's trainable parameters.
        save_folder: writes a model folder; called on the writing rank only.
        commit_checkpoint: called on the writing rank with the step when everything of its checkpoint lies in
            ``staging``.
        staging: folder in which ``checkpoint-N`` is written before it is complete.
        evaluate_now: takes a score at a step; returns Trainer's metrics.
        callbacks: ours, after Trainer's own.

    Attributes:
        window: what the current optimizer step trains on; None before the first.
        measure_speed: read at every logged step; its numbers go to all reporters.

    Source: transformers 5.17 to 5.23; what is relied on is named at each override.
    """

    # 5.23: the loss of ``compute_loss`` is final; Trainer must not divide it by the accumulation steps again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: TrainingArguments,
        *,
        samples: TrainingSamples,
        sampler: WindowSampler,
        collator: Collator,
        loss_weighting: Weighting,
        optimizer: torch.optim.Optimizer,
        save_folder: Callable[[Path], object],
        commit_checkpoint: Callable[[int], object],
        staging: Path,
        evaluate_now: Callable[[int], dict[str, float]] | None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        super().__init__(
            model=model,  # pyright: ignore[reportArgumentType]  # a PeftModel is what Trainer documents
            args=args,
            train_dataset=samples,
            # Trainer wants one when it is to evaluate; ``evaluate`` below never looks at it.
            eval_dataset=samples if evaluate_now else None,
            data_collator=collator,
            optimizers=(optimizer, None),
            callbacks=[_EpochOrder(sampler), *callbacks],
        )
        # 5.17 decides by this flag what 5.23 decides by ``loss_is_scaled_for_ga``.
        self.model_accepts_loss_kwargs = True
        self.sampler = sampler
        self.loss_weighting = loss_weighting
        self.window: Window | None = None
        self.measure_speed: Callable[[], dict[str, float]] = dict
        self._save_folder = save_folder
        self._commit_checkpoint = commit_checkpoint
        self._staging = staging
        self._evaluate_now = evaluate_now
        self._image_parameters = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and part_of(name) in IMAGE_PARTS
        ]

    def get_train_dataloader(self) -> DataLoader[Encoded]:
        """Returns this rank's micro-batches.

        Not prepared by accelerate: the sampler has dealt out the ranks' shares already, where accelerate would fill
        the last window up with samples from the first. The loader draws its workers' seeds from a generator of its
        own, so that starting an epoch leaves the global random state as it is.
        """
        assert isinstance(self.train_dataset, TrainingSamples)
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.args.seed),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor]:
        """Fetches a window's micro-batches of this rank; counts, over all ranks, what its loss is divided by."""
        started = time.perf_counter()
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        counts = torch.tensor(
            [
                sum(_num_samples(batch) for batch in batches),
                sum(_num_supervised(batch) for batch in batches),
                sum(int(batch["attention_mask"].sum()) for batch in batches),
            ],
            device=device,
        )
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        assert isinstance(counts, torch.Tensor)
        samples, _, tokens = counts.tolist()
        self.window = Window(samples, tokens, started, loss=torch.zeros((), device=device))
        return batches, counts[0 if self.loss_weighting == "sample_mean" else 1]

    def compute_loss(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns a micro-batch's share of its window's loss.

        Multiplied by the number of processes: they are going to average their gradients, and the losses they log.
        """
        assert num_items_in_batch is not None and not return_outputs
        loss = model(**inputs, supervised_only=True, use_cache=False).loss
        if "pixel_values" not in inputs and self._image_parameters:
            # Every micro-batch reaches every trained parameter. Otherwise a process whose last micro-batch has no
            # image keeps its gradients of CLIP to itself, and the processes' weights drift apart.
            loss = loss + 0.0 * torch.stack([parameter.sum() for parameter in self._image_parameters]).sum()
        return loss * (self.args.world_size / num_items_in_batch)

    def training_step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Runs one micro-batch forward and backward; keeps its loss, for the guard to look at."""
        loss = super().training_step(model, inputs, num_items_in_batch)  # pyright: ignore[reportArgumentType]
        assert self.window is not None
        self.window.loss += loss
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Trainer computes the norm right before ``on_pre_optimizer_step``, and tells callbacks only after the step.
        grad_norm = super()._get_grad_norm(model, grad_norm)
        assert self.window is not None
        self.window.grad_norm = grad_norm
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, for every reporter; a training step's line also gets its speed and memory."""
        if "loss" in logs:
            logs.update(self.measure_speed())
        super().log(logs, start_time)

    def evaluate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, eval_dataset: object = None, ignore_keys: object = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Takes a score by generating answers; logs it as ``eval_score``."""
        assert self._evaluate_now is not None
        metrics = self._evaluate_now(self.state.global_step)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model folder of a checkpoint, as every other model folder is written."""
        assert output_dir is not None
        if self.args.should_save:
            self._save_folder(Path(output_dir))
        # The other processes write their random states beside the weights, into a folder that is there by now.
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._commit_checkpoint(self.state.global_step)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the checkpoint of step {self.state.global_step} could not be written to {self._staging}: {error}. "
                "Earlier checkpoints are whole: make room, and start the same command again."
            ) from error
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Trainer's own loader warns about missing and unknown names, and trains on.
        restore_weights(self.model if model is None else model, Path(resume_from_checkpoint))  # pyright: ignore[reportArgumentType]


class _EpochOrder(TrainerCallback):
    """Tells the sampler its epoch, also when an epoch is resumed in its middle: Trainer's own call misses that."""

    def __init__(self, sampler: WindowSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._sampler.set_epoch(state.global_step // self._sampler.num_windows)


def _num_samples(batch: Batch) -> int:
    """Counts the rows that have something to learn; fillers have not."""
    return int((batch["labels"][:, 1:] != IGNORED_LABEL).any(dim=1).sum())


def _num_supervised(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
