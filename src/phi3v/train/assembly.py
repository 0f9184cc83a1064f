"""A run's trainer with everything that hangs on it: engine, checkpoints, guards, reporters, scores."""

import logging
import math
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from transformers import PrinterCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from phi3v.config import TrainConfig
from phi3v.data.packing import Budget, Packing
from phi3v.model.checkpoint import (
    save_model,
)
from phi3v.model.placement import DTYPE_NAMES
from phi3v.runlog import RunDirectory
from phi3v.train.batches import WindowReader, Windows
from phi3v.train.callbacks.guards import Culprits, NonFiniteGuard, SpikeAlarm, StepReading, in_short
from phi3v.train.callbacks.milestones import KeepBest, LogAtMilestones, StopWhenAsked
from phi3v.train.callbacks.reporters import ProgressLine, RunLog, SpeedMeter
from phi3v.train.checkpoints.state import gather
from phi3v.train.engines.choose import open_engine
from phi3v.train.evaluation import Scorer, random_states_kept
from phi3v.train.feature_cache import FeatureCache
from phi3v.train.room import (
    Model,
    Room,
    build_model,
    compute_of,
    keeps_best,
    training_samples,
)
from phi3v.train.scores import Best, best_of
from phi3v.train.start import Start
from phi3v.train.stopping import Stop
from phi3v.train.trainer import Phi3VTrainer
from phi3v.train.tripwire import Tripwire
from phi3v.train.tuning import (
    Precision,
)

logger = logging.getLogger(__name__)

MOST_WARMUP_STEPS = 50
"""The published recipes' warm-up."""

SHARE_OF_WARMUP = 10
"""Of a run's steps one in so many raises the learning rate, where that is fewer."""


def build_trainer(
    room: Room, model: Model, scorer: Scorer | None, start: Start, stop: Stop, cache: FeatureCache | None = None
) -> Phi3VTrainer:
    """Puts the trainer together, with its optimizer and callbacks."""
    config, args, store = room.config, room.args, room.store
    windows = Windows(
        room.order,
        room.data.costs,
        batch_size=config.batch_size,
        packing=Packing(
            Budget(room.policy.micro_batch_tokens, room.policy.micro_batch_crops, config.micro_batch_size),
            shared_questions=room.sharing.shared_questions,
            short_positions=room.short_positions,
            num_ranks=args.world_size,
        ),
        rank=args.process_index,
    )
    args.warmup_steps = warmup_steps(config, total_steps(config, len(windows)))
    reader = WindowReader(
        windows, training_samples(room, cache), num_workers=config.num_workers, pin_memory=args.device.type == "cuda"
    )

    def evaluate_now(step: int) -> dict[str, float]:
        assert scorer is not None
        return score_during(room, trainer, model, scorer, step)

    trainer = Phi3VTrainer(
        model,
        args,
        windows=windows,
        reader=reader,
        cache=cache,
        loss_weighting=config.loss_weighting,
        make_engine=partial(open_engine, config, room.precision),
        save_folder=lambda folder: save_checkpoint_model(room, trainer, model, folder),
        commit_checkpoint=lambda step: commit_checkpoint(room, step, start.lost),
        staging=store.staging,
        evaluate_now=evaluate_now if scorer is not None and config.eval_steps is not None else None,
        callbacks=[LogAtMilestones(), KeepBest(keeps_best(config), config.early_stopping_patience, start.lost)],
    )
    trainer.remove_callback(PrinterCallback)
    add_guards(trainer, room, start, stop)
    meter = SpeedMeter(trainer, earlier_s=seconds_trained(room.run))
    trainer.measure_speed = meter.read
    trainer.add_callback(meter)
    if room.is_writer:
        add_reporters(trainer, room, start)
    return trainer


def total_steps(config: TrainConfig, steps_an_epoch: int) -> int:
    """Returns the optimizer steps of a run, as Trainer counts them."""
    return config.max_steps or math.ceil(config.num_train_epochs * steps_an_epoch)


def warmup_steps(config: TrainConfig, num_steps: int) -> int:
    """Returns the steps over which the learning rate rises; warns of a run that ends before it is there.

    >>> warmup_steps(TrainConfig(model="m", output_dir=Path("r"), train_data=[Path("t.jsonl")]), 120)
    12
    """
    if config.warmup_steps is None:
        return min(MOST_WARMUP_STEPS, num_steps // SHARE_OF_WARMUP)
    if config.warmup_steps >= num_steps:
        logger.warning(
            "warmup_steps is %d, and the run has %d steps: the learning rate rises to %.3g and never reaches %.3g. "
            "Lower warmup_steps, or leave it out.",
            config.warmup_steps,
            num_steps,
            config.learning_rate * (num_steps - 1) / config.warmup_steps,
            config.learning_rate,
        )
    return config.warmup_steps


def add_guards(trainer: Phi3VTrainer, room: Room, start: Start, stop: Stop) -> None:
    """Adds what looks at every step before it is taken, and what ends training because a signal asks for it."""

    def sample_id(index: int) -> str:
        return room.data.train[index].id

    def sample_ids(step: int) -> list[str]:
        return [sample_id(index) for index in trainer.windows.window(step)]

    assert trainer.model is not None
    last_checkpoint = room.store.describe_newest
    reading = StepReading(trainer, stop)
    culprits = Culprits(trainer, trainer.model, sample_id)
    guards = [
        reading,
        NonFiniteGuard(reading, lambda step: in_short(sample_ids(step)), last_checkpoint),
        culprits,
        SpikeAlarm(
            reading,
            Tripwire(start.log_history()),
            culprits,
            sample_ids=sample_ids,
            record=room.run.append_spike if room.is_writer else None,
            stops=room.config.on_loss_spike == "stop",
            last_checkpoint=last_checkpoint,
        ),
        StopWhenAsked(stop),
    ]
    for guard in guards:
        trainer.add_callback(guard)


def add_reporters(trainer: Phi3VTrainer, room: Room, start: Start) -> None:
    """Adds what shows and records the run; W&B and others come through Trainer's ``report_to``."""
    if "tensorboard" in room.config.report_to:
        # What a killed run logged beyond its checkpoint is hidden, for the resumed run logs it again.
        first_step = 0 if start.checkpoint is None else start.checkpoint.step + 1
        writer = SummaryWriter(log_dir=str(room.run.tensorboard_dir), purge_step=first_step)
        trainer.add_callback(TensorBoardCallback(writer))
    trainer.add_callback(RunLog(room.run))
    trainer.add_callback(ProgressLine(has_bar=room.config.progress and sys.stderr.isatty()))


def score_during(room: Room, trainer: Phi3VTrainer, model: Model, scorer: Scorer, step: int) -> dict[str, float]:
    """Takes a mid-run score, of a copy where the model itself lies in parts; returns what Trainer logs."""
    weights = None if trainer.engine.is_whole else trainer.engine.weights(has_frozen=False)
    if weights is None:
        return scorer.score_during(model, step)
    logger.info("Putting a whole model together for the score of step %d ...", step)
    return scorer.score_during(copy_in_16_bit(room, weights), step)


def on_device(room: Room, model: Model) -> Model:
    """Returns the model where it lies on its device; else a copy there, in 16 bit, of what waits for its engine."""
    if room.config.parallel == "ddp":
        return model
    weights = ((name, one.detach()) for name, one in model.named_parameters() if one.requires_grad)
    return copy_in_16_bit(room, weights)


def copy_in_16_bit(room: Room, weights: Iterable[tuple[str, torch.Tensor]]) -> Model:
    """Returns a model for audit and scores on the device, in 16 bit unless the run computes in float32."""
    precision = replace(room.precision, weights=DTYPE_NAMES[room.precision.name])
    return whole_model(room, weights, precision, room.args.device)


def whole_model(
    room: Room, weights: Iterable[tuple[str, torch.Tensor]], precision: Precision, device: torch.device
) -> Model:
    """Returns a model that holds trained weights, whole, in ``precision``.

    Args:
        room: of the run.
        weights: by name; an engine's come only if all processes ask for them.
        precision: of all weights.
        device: where to.
    """
    compute = replace(compute_of(room), accumulates_in_place=False, is_sharded=False)
    with random_states_kept(room.args.device):
        model = build_model(room.config, precision, device, compute)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in weights:
            own[name].copy_(tensor)
    return model


def save_checkpoint_model(room: Room, trainer: Phi3VTrainer, model: Model, folder: Path) -> None:
    """Writes a checkpoint's model folder; all processes take part, the first one writes."""
    weights = trainer.engine.weights(has_frozen=not room.config.trains_adapters)
    state = None if weights is None else gather(weights, keeps=room.is_writer)
    if room.is_writer:
        save_model(model, room.processor, folder, state=state)


def commit_checkpoint(room: Room, step: int, lost: Collection[int]) -> None:
    """Completes a checkpoint, notes the best one, and only then deletes what is no longer kept."""
    checkpoint = room.store.commit(step, room.identity)
    best = note_best(room, checkpoint.trainer_state()["log_history"], lost)
    room.store.prune(protect=() if best is None else (best.step,))


def note_best(room: Room, log_history: Sequence[Mapping[str, Any]], lost: Collection[int]) -> Best | None:
    """Brings ``best.json`` up to date, on the writing process; returns the best score if the run keeps it.

    Args:
        room: of the run.
        log_history: Trainer's.
        lost: as in ``Start``.
    """
    best = best_of(log_history, lost) if keeps_best(room.config) else None
    if room.is_writer:
        room.run.write_best(None if best is None else best.record(room.config.eval_metric))
    return best


def seconds_trained(run: RunDirectory) -> float:
    """Returns the training time that the run's log ends with."""
    steps = run.steps()
    return float(steps[-1].get("elapsed_s") or 0.0) if steps else 0.0
