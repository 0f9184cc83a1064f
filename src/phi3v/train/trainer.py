"""transformers' Trainer with our loss weighting, our sample order, our checkpoints and evaluation by generation."""

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from phi3v.data.collate import LossWeighting
from phi3v.errors import CheckpointError
from phi3v.geometry import num_image_tokens
from phi3v.model.checkpoint import base_of
from phi3v.model.packed import PackedBatch
from phi3v.model.parts import part_of
from phi3v.train.batches import WindowPlan, WindowReader, Windows
from phi3v.train.checkpoints.state import (
    load_random_states,
    load_training,
    training_folder,
    write_averages,
    write_random_states,
    write_training,
)
from phi3v.train.checkpoints.weights import restore_weights
from phi3v.train.engines.engine import Engine
from phi3v.train.feature_cache import FeatureCache, compute_missing
from phi3v.train.tuning import IMAGE_PARTS

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Window:
    """The current optimizer step.

    Attributes:
        plan: what it trains on.
        started_s: ``time.perf_counter()`` when the step began to wait for its data.
        loss: this rank's share of the step's loss so far, on the device.
        grad_norm: the gradient's norm before clipping; None until it is known.
    """

    plan: WindowPlan
    started_s: float
    loss: torch.Tensor
    grad_norm: torch.Tensor | float | None = None


class Phi3VTrainer(Trainer):
    """Trains on windows of samples whose weighting does not depend on how a window is split.

    The loss of an optimizer step is the weighted sum over its whole window, divided once: by the window's samples
    (``sample_mean``; the batches' weights make each sample's tokens sum to its mean) or by its supervised tokens
    (``token_mean``). Micro-batches and processes only cut that sum into pieces. To Trainer a window is one batch and a
    step without accumulation; how many micro-batches it is made of differs from window to window.

    Args:
        model: prepared for training, on its device.
        args: schedule, clipping, logging and saving, for Trainer.
        windows: what each step trains on.
        reader: makes the micro-batches.
        cache: keeps the rows of a frozen vision encoder; None: there is none.
        loss_weighting: what the window's sum is divided by.
        make_engine: makes what takes the steps, of the model and Trainer's accelerator; called when training starts, on
            a model that has a checkpoint's weights already.
        save_folder: writes the model folder of a checkpoint; called on every rank, one writes.
        commit_checkpoint: called on the writing rank with the step when everything of its checkpoint lies in
            ``staging``.
        staging: folder in which ``checkpoint-N`` is written before it is complete.
        evaluate_now: takes a score at a step; returns Trainer's metrics.
        callbacks: ours, after Trainer's own.

    Attributes:
        window: the current optimizer step; None before the first.
        engine: takes the steps; from when training starts.
        measure_speed: read at every logged step; its numbers go to all reporters.

    Source: transformers 5.17 to 5.24; what is relied on is named at each override.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: TrainingArguments,
        *,
        windows: Windows,
        reader: WindowReader,
        cache: FeatureCache | None = None,
        loss_weighting: LossWeighting,
        make_engine: Callable[[nn.Module, Accelerator], Engine],
        save_folder: Callable[[Path], object],
        commit_checkpoint: Callable[[int], object],
        staging: Path,
        evaluate_now: Callable[[int], dict[str, float]] | None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        super().__init__(
            model=model,  # pyright: ignore[reportArgumentType]  # a PeftModel is what Trainer documents
            args=args,
            train_dataset=_Steps(windows),
            # Trainer wants one when it is to evaluate; ``evaluate`` below never looks at it.
            eval_dataset=_Steps(windows) if evaluate_now else None,
            callbacks=list(callbacks),
        )
        self.windows = windows
        self.reader = reader
        self.cache = cache
        self.loss_weighting = loss_weighting
        self.window: Window | None = None
        self.measure_speed: Callable[[], dict[str, float]] = dict
        self._make_engine = make_engine
        self._engine: Engine | None = None
        self._save_folder = save_folder
        self._commit_checkpoint = commit_checkpoint
        self._staging = staging
        self._evaluate_now = evaluate_now
        self._image_parameters = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and part_of(name) in IMAGE_PARTS
        ]

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "training has not started"
        return self._engine

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Leaves the model where its engine wants it: Trainer would have it whole on the device."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; then ends the workers that read ahead."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.reader.close()

    def get_train_dataloader(self) -> "DataLoader[int]":
        """Returns the numbers of an epoch's windows.

        By them Trainer knows how long an epoch is, and leaves out what a resumed one has done. What a window holds
        follows from the optimizer step. Not prepared by accelerate, which would deal the numbers out to the processes.
        """
        assert isinstance(self.train_dataset, _Steps)
        return DataLoader(self.train_dataset, generator=torch.Generator())

    def num_examples(self, dataloader: object) -> int:
        """Returns the samples of an epoch; Trainer's own looks at the loader, which holds windows."""
        return len(self.windows.order)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Iterator[PackedBatch]], int]:
        """Starts a window: returns its micro-batches of this rank, still to be made, and what its loss is divided by.

        Every process knows the whole window, so that no counts have to be exchanged.
        """
        assert num_batches == 1
        started = time.perf_counter()
        next(epoch_iterator)
        step = self.state.global_step
        plan = self.windows.plan(step)
        self.window = Window(plan, started, loss=torch.zeros((), device=device))
        count = plan.samples if self.loss_weighting == "sample_mean" else plan.supervised
        return [self.reader.read(step, self.state.max_steps)], count

    def training_step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: nn.Module, inputs: Iterator[PackedBatch], num_items_in_batch: int
    ) -> torch.Tensor:
        """Runs a window's micro-batches forward and backward; keeps its loss, for the guard to look at."""
        assert self.window is not None
        model.train()
        number_of_last = len(self.window.plan.micro_batches)
        for number, batch in enumerate(inputs, start=1):
            self.window.loss += self.micro_step(model, batch, num_items_in_batch, is_last=number == number_of_last)
        return self.window.loss

    def micro_step(
        self, model: nn.Module, batch: PackedBatch, num_items_in_batch: int, *, is_last: bool
    ) -> torch.Tensor:
        """Runs one micro-batch forward and backward; returns its share of the loss, without a gradient."""
        on_device = self._prepared(batch)
        return self.engine.run(
            lambda: self.compute_loss(model, on_device, num_items_in_batch=num_items_in_batch), is_last=is_last
        )

    def _prepared(self, batch: PackedBatch) -> PackedBatch:
        """Returns a micro-batch as the model takes it, on the device."""
        on_device = batch.to(self.args.device, non_blocking=True)
        assert self.model is not None
        base = base_of(self.model)
        if self.cache is not None:
            on_device = compute_missing(on_device, self.cache, base)
        if (
            on_device.crops is None
            and self.engine.needs_one_path
            and (self._image_parameters or not self.engine.is_whole)
        ):
            on_device = with_blank_image(on_device, base.config.crop_px, base.config.tokens_per_side)
        return on_device

    def compute_loss(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model: nn.Module,
        inputs: PackedBatch,
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> torch.Tensor:
        """Returns a micro-batch's share of its window's loss.

        Multiplied by the number of processes: they are going to average their gradients, and the losses they log.
        """
        assert num_items_in_batch is not None and not return_outputs
        loss = model(packed=inputs).loss
        if inputs.crops is None and self._image_parameters:
            # Every micro-batch reaches every trained parameter. Otherwise a process whose last micro-batch has no
            # image keeps its gradients of CLIP to itself, and the processes' weights drift apart.
            loss = loss + 0.0 * torch.stack([parameter.sum() for parameter in self._image_parameters]).sum()
        return loss * (self.args.world_size / num_items_in_batch)

    def floating_point_ops(self, inputs: object) -> int:
        """Returns 0: Trainer's estimate looks for token ids, and nothing reads the sum."""
        return 0

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self.engine.clip(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Trainer asks for the norm right before ``on_pre_optimizer_step``, and tells callbacks only after the step.
        assert self.window is not None
        self.window.grad_norm = self.engine.clip(self.args.max_grad_norm) if grad_norm is None else grad_norm
        return self.window.grad_norm

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
        self._save_folder(Path(output_dir))
        # The other processes write beside the weights, into a folder that is there by now.
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        started = time.perf_counter()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._commit_checkpoint(self.state.global_step)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(self._staging, ignore_errors=True)  # what is written half would keep a full disk full
            raise CheckpointError(
                f"the checkpoint of step {self.state.global_step} could not be written to {self._staging}: {error}. "
                "Earlier checkpoints are whole: make room, and start the same command again."
            ) from error
        self.accelerator.wait_for_everyone()
        logger.info("Step %d is saved as a checkpoint (%.1f s).", self.state.global_step, time.perf_counter() - started)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Trainer's own loader warns about missing and unknown names, and trains on.
        restore_weights(self.model if model is None else model, Path(resume_from_checkpoint))  # pyright: ignore[reportArgumentType]

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        # Trainer takes the frequencies of logs, scores and checkpoints from a checkpoint, warns, and leaves the run's.
        level = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        try:
            done = super()._init_training_state(max_steps, *args, **kwargs)
        finally:
            transformers_logging.set_verbosity(level)
        self.state.compute_steps(self.args, max_steps)
        return done

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        # Trainer's own prepares for engines by accelerate's means. What it leaves behind is the same.
        self._engine = self._make_engine(self.model, self.accelerator)  # pyright: ignore[reportArgumentType]
        self.optimizer = self.engine.optimizer
        self.create_scheduler(num_training_steps=max_steps)
        self.model_wrapped = self.engine.module
        if resume_from_checkpoint is not None:
            load_training(self.engine, self.lr_scheduler, training_folder(resume_from_checkpoint))
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        return self.engine.module, train_dataloader

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        rank, world_size = self.args.process_index, self.args.world_size
        folder = training_folder(output_dir)
        write_averages(self.engine, folder, rank=rank, world_size=world_size)
        if self.args.should_save:
            write_training(self.engine, self.lr_scheduler, folder, world_size=world_size)

    def _save_scaler(self, output_dir: str) -> None:
        """Does nothing: the loss scale is part of the training file."""

    def _save_rng_state(self, output_dir: str) -> None:
        write_random_states(training_folder(output_dir), self.args.device, rank=self.args.process_index)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if not load_random_states(training_folder(checkpoint), self.args.device, rank=self.args.process_index):
            rank = self.args.process_index
            logger.warning("%s has no random state of process %d: its dropout draws anew.", checkpoint, rank)


def with_blank_image(batch: PackedBatch, crop_px: int, tokens_per_side: int) -> PackedBatch:
    """Adds a white image that no position shows to a batch without crops.

    Args:
        batch: on its device; rows of images that are at hand stay.
        crop_px: edge of a crop.
        tokens_per_side: image tokens along it.
    """
    grid = (1, 1)
    crops = torch.ones(2, 3, crop_px, crop_px, device=batch.input_ids.device)
    return replace(
        batch,
        crops=crops,
        grids=(grid,),
        image_rows=batch.image_rows + num_image_tokens(grid, tokens_per_side),
    )


class _Steps(Dataset[int]):
    """The numbers of an epoch's windows."""

    def __init__(self, windows: Windows) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, number: int) -> int:
        return number
