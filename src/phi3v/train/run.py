"""The assembly of a training run: from a configuration to ``RUN/model``, in stages, each of which may be killed."""

import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list, set_seed
from peft import PeftModel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import PrinterCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.utils.logging import disable_progress_bar

from phi3v.config import TrainConfig
from phi3v.credentials import without_secrets
from phi3v.data.collate import PackCollator
from phi3v.data.packing import Budget, MicroBatch, Packing, SampleCosts, load_of
from phi3v.errors import ConfigError, StoppedError
from phi3v.model.checkpoint import (
    base_of,
    dtype_of_folder,
    is_adapter,
    load_config,
    load_four_bit_model,
    load_model,
    load_processor,
    save_model,
)
from phi3v.model.compute import Compute
from phi3v.model.four_bit import require_four_bit
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.packed import PackedBatch
from phi3v.model.packed_attention import row_alignment
from phi3v.model.placement import DTYPE_NAMES, resolve_device
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.report import write_report
from phi3v.runlog import RunDirectory, environment, write_json
from phi3v.train.activations import ActivationPolicy, DataLoad, choose_activation_policy
from phi3v.train.audit import audit
from phi3v.train.batches import TrainingSamples, WindowReader, Windows
from phi3v.train.callbacks import (
    SCORE_KEY,
    Best,
    Culprits,
    KeepBest,
    LateScore,
    LogAtMilestones,
    NonFiniteGuard,
    ProgressLine,
    RunLog,
    SpeedMeter,
    SpikeAlarm,
    StepReading,
    StopWhenAsked,
    best_of,
    in_short,
)
from phi3v.train.checkpoints import CheckpointStore
from phi3v.train.data import CheckedData, Sharing, check_data, choose_sharing
from phi3v.train.engines.choose import is_sharded, open_engine, require_engine
from phi3v.train.evaluation import Scorer
from phi3v.train.faults import explained
from phi3v.train.feature_cache import FeatureCache, open_cache, require_frozen, require_room
from phi3v.train.identity import identify
from phi3v.train.order import EpochOrder, epoch_order
from phi3v.train.rehearsal import rehearse_saving, require_disk_space
from phi3v.train.start import RESULT_FILE, Start, decide_start, refuse_existing_run, sole_writer
from phi3v.train.state import gather
from phi3v.train.stopping import Stop
from phi3v.train.trainer import Phi3VTrainer
from phi3v.train.tripwire import Tripwire
from phi3v.train.tuning import (
    IMAGE_PARTS,
    Precision,
    choose_precision,
    select_trainable,
    wrap_lora,
)
from phi3v.train.weights import restore_weights

logger = logging.getLogger(__name__)

Model = Phi3VForCausalLM | PeftModel

PROCESSES_WAIT_S = 4 * 3600
"""How long processes wait for each other: one may still be answering its share of the questions."""

CHECK_FILE = "data-check.json"
"""What the data check found, beside the checkpoints."""


class Room(NamedTuple):
    """What every stage of a run works with.

    ``policy`` is what a device computes at once; ``sharing`` and ``order`` say which samples a step draws;
    ``short_positions`` is the longest sequence that the short LongRoPE factors reach.
    """

    config: TrainConfig
    args: TrainingArguments
    precision: Precision
    run: RunDirectory
    store: CheckpointStore
    processor: Phi3VProcessor
    data: CheckedData
    sharing: Sharing
    order: EpochOrder
    short_positions: int
    policy: ActivationPolicy
    identity: dict[str, Any]

    @property
    def is_writer(self) -> bool:
        """Whether this process writes the run's files: the first of all."""
        return self.args.process_index == 0


def run_training(config: TrainConfig) -> Path:
    """Trains as ``config`` says, or goes on with the run that ``config.output_dir`` holds.

    Returns:
        The run directory; its ``model`` folder holds the result.

    Raises:
        ConfigError: settings that cannot work together or on this machine, or a part that would not learn.
        DataError: bad samples, before the model is loaded.
        CapacityError: too little disk space for what the run will keep.
        CheckpointError: no model at that path, or a directory that belongs to another run.
        StoppedError: a signal asked the run to stop, which it did, after saving.
        Phi3VError: a loss that is not finite, or a process that died.
    """
    device = resolve_device(config.device)
    precision = choose_precision(config, device)
    args = training_arguments(config, device, precision)
    if config.method == "qlora":
        require_four_bit(args.device)
    if config.vision_cache is not None:
        require_frozen(config.trained_parts)
    require_engine(config, precision, args.device)
    show_messages(is_writer=args.process_index == 0)
    run = RunDirectory(config.output_dir)
    store = CheckpointStore(run.checkpoints_dir, config.keep_checkpoints)
    with sole_writer(run) if args.process_index == 0 else nullcontext():
        if args.process_index == 0:
            refuse_existing_run(config, run, store)
        refuse_adapter(config)
        processor = load_processor(config.model, num_crops=config.num_crops)
        data = check_data(config, processor, store.root / CHECK_FILE, args)
        model_config = load_config(config.model)
        short_positions = model_config.original_max_position_embeddings
        sharing = choose_sharing(config, data, short_positions)
        order = epoch_order(
            data.train,
            config.sampling,
            config.seed,
            stem_group_of=sharing.group_of,
            shared_questions=sharing.shared_questions,
        )
        identity = identify(
            config,
            precision=precision.name,
            train_fingerprint=data.train.fingerprint(),
            eval_fingerprint=None if data.eval is None else data.eval.fingerprint(),
            world_size=args.world_size,
        )
        policy = choose_activation_policy(
            config,
            model_config.dims,
            data_load(data.costs, sharing),
            precision=precision.name,
            device=args.device,
            num_ranks=args.world_size,
        )
        room = Room(
            config, args, precision, run, store, processor, data, sharing, order, short_positions, policy, identity
        )
        start = open_run(room)
        if start.is_finished:
            logger.info("%s is finished: its result is %s.", run.path, run.model_dir)
            if room.is_writer and not run.report_path.exists():
                write_report(run.path)
            return run.path
        model = build_model(config, precision, args.device, compute_of(room))
        cache = open_feature_cache(room, model)
        with Stop(speaks=room.is_writer) as stop, explained(store.describe_newest):
            scorer = build_scorer(room, stop)
            if start.result_step is None:
                prepare(room, model, scorer, start)
                model, result_step = train(room, model, scorer, start, stop, cache)
                is_rounded = round_to_base(model, config)
                save_result(room, model, result_step)
            else:
                result_step = start.result_step
                is_rounded = round_to_base(model, config)
                restore_weights(model, run.model_dir)
            if scorer is not None:
                scorer.score(model, result_step, "after", may_reuse=not is_rounded)
            if room.is_writer:
                write_report(run.path)
    return run.path


def training_arguments(config: TrainConfig, device: str, precision: Precision) -> TrainingArguments:
    """Translates the configuration for Trainer, and joins the other processes when there are some.

    Raises:
        ConfigError: a reporter is not installed.
    """
    if "wandb" in config.report_to and find_spec("wandb") is None:
        raise ConfigError("report_to names wandb, which is not installed; pip install phi3v[wandb], or take it out")
    if device == "cpu":
        # accelerate imports DeepSpeed where it is installed, and DeepSpeed would say aloud that it looks for GPUs.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    args = TrainingArguments(
        output_dir=str(RunDirectory(config.output_dir).checkpoints_dir),
        per_device_train_batch_size=1,  # a batch of Trainer's is a window; see Phi3VTrainer
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler,
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        bf16=precision.name == "bf16",
        fp16=precision.name == "fp16",
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # it would show the mean of earlier losses in place of one that is not finite
        save_strategy="no" if config.save_steps is None else "steps",
        save_steps=config.save_steps or 1,
        eval_strategy="no" if config.eval_steps is None else "steps",
        eval_steps=config.eval_steps,
        report_to=[name for name in config.report_to if name != "tensorboard"] or "none",
        run_name=config.output_dir.name,
        seed=config.seed,
        dataloader_num_workers=config.num_workers,
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=device == "cpu",
        use_cache=True,  # what config.json will say; the training forward passes use_cache=False itself
        ddp_find_unused_parameters=False,  # Phi3VTrainer.compute_loss reaches every parameter
        ddp_timeout=PROCESSES_WAIT_S,
    )
    if args.n_gpu > 1:
        logger.warning("%d GPUs are visible and one is used; start with torchrun to use all.", args.n_gpu)
        args._n_gpu = 1
    return args


def open_run(room: Room) -> Start:
    """Lets the first process decide how this start relates to the directory, and tells the others."""
    start = [decide_start(room.config, room.run, room.store, room.identity) if room.is_writer else None]
    if room.args.world_size > 1:
        broadcast_object_list(start)
    (decided,) = start
    assert decided is not None
    if not room.store.root.is_dir():
        raise ConfigError(
            f"process {room.args.process_index} does not see {room.store.root}, which the first process has made: on "
            "several nodes, output_dir must lie in a folder that all of them share under the same path"
        )
    if room.is_writer and decided.result_step is None:
        room.run.create(room.config.to_yaml(), environment(gpus=describe_gpus(room.args.device)))
        room.run.write_data(room.data.summaries)
    return decided


def refuse_adapter(config: TrainConfig) -> None:
    """Refuses to train on an adapter.

    Raises:
        ConfigError: ``config.model`` is one.
    """
    if is_adapter(config.model):
        raise ConfigError(
            f"model is {config.model}, an adapter; training starts from a whole model: merge it first (phi3v merge "
            f"{config.model} MERGED) and train MERGED"
        )


def data_load(costs: SampleCosts, sharing: Sharing) -> DataLoad:
    """Returns what the samples ask of a device's memory."""
    return DataLoad(
        longest_tokens=int(costs.tokens.max()),
        longest_crops=int(costs.crops.max()),
        crops_a_token=sharing.saving.shared_crops / sharing.saving.shared_tokens,
        targets_a_token=int(costs.supervised.sum()) / sharing.saving.shared_tokens,
    )


def compute_of(room: Room) -> Compute:
    """Returns how the packed forward computes in this run."""
    return Compute(
        checkpointing=room.policy.checkpointing,
        fp8=room.config.fp8,
        # Engines that have others to share with do so in gradients' hooks.
        accumulates_in_place=room.args.world_size == 1 and room.config.parallel == "ddp",
        is_sharded=is_sharded(room.config),
    )


def build_model(
    config: TrainConfig, precision: Precision, device: torch.device, compute: Compute | None = None
) -> Model:
    """Loads the model and makes trainable what the run trains."""
    load = partial(load_four_bit_model, parts=config.four_bit_parts) if config.method == "qlora" else load_model
    model = load(
        config.model, dtype=precision.weights, attention=config.attention, rope_mode=config.rope_mode, device=device
    )
    assert isinstance(model, Phi3VForCausalLM)
    model.compute = compute or Compute()
    select_trainable(model, config)
    if not config.trains_adapters:
        return model
    set_seed(config.seed)
    return wrap_lora(model, config)


def open_feature_cache(room: Room, model: Model) -> FeatureCache | None:
    """Opens the cache of a frozen vision encoder's rows, if the run has one.

    Raises:
        CapacityError: the disk does not hold the rows of all images.
    """
    if room.config.vision_cache is None:
        return None
    dtype = room.precision.autocast_dtype or torch.float32
    cache = open_cache(room.config.vision_cache, base_of(model), room.processor.image_processor, dtype)
    if room.is_writer:
        require_room(cache, room.data.train, room.data.encoder, room.data.costs)
    return cache


def build_scorer(room: Room, stop: Stop) -> Scorer | None:
    """Returns what takes the run's scores; None without evaluation data."""
    if room.data.eval is None:
        return None
    return Scorer(
        room.processor,
        room.data.eval,
        config=room.config,
        precision=room.precision,
        args=room.args,
        run=room.run,
        stop=stop,
    )


def prepare(room: Room, model: Model, scorer: Scorer | None, start: Start) -> None:
    """Does before the first step what would hurt most to find out later: audit, rehearsal, first score."""
    if room.is_writer:
        batch = audit_batch(room)
        found = audit(model, batch.to(room.args.device), room.config, room.precision)
        room.run.write_audit(found.to_dict())
        logger.info("%s", found.table())
        found.require_trainable()
        require_disk_space(model, room.store, room.config)
        if start.checkpoint is None:
            rehearse_saving(model, room.processor, room.store)
    if scorer is not None and room.config.eval_before:
        scorer.score(model, 0, "before")


def audit_batch(room: Room) -> PackedBatch:
    """Returns a batch of one training sample; one with an image where a part that only images reach should learn."""
    costs = room.data.costs
    index = 0
    if any(part in IMAGE_PARTS for part in room.config.trained_parts):
        index = int((costs.crops > 0).argmax())
    return training_samples(room)[MicroBatch(((index,),), load_of(costs, (index,)))]


def train(
    room: Room, model: Model, scorer: Scorer | None, start: Start, stop: Stop, cache: FeatureCache | None = None
) -> tuple[Model, int]:
    """Runs the optimizer steps that are left; returns a model with the weights to keep, and their step.

    Raises:
        StoppedError: the run was asked to stop; the last step's checkpoint is there.
    """
    late_score = take_late_score(room, model, scorer, start)
    if start.is_training_over(room.config, late_score):
        assert start.checkpoint is not None
        restore_weights(model, start.checkpoint.folder)
        last_step, history = start.checkpoint.step, start.log_history(late_score)
    else:
        trainer = build_trainer(room, model, scorer, start, stop, cache)
        if late_score is not None:
            trainer.add_callback(LateScore(trainer, {SCORE_KEY: late_score}))
        # Whatever ran before, training starts from the same random state; a resumed run replaces it.
        set_seed(room.config.seed + room.args.process_index)
        trainer.train(resume_from_checkpoint=str(start.checkpoint.folder) if start.checkpoint else None)
        last_step, history = trainer.state.global_step, trainer.state.log_history
        if stop.is_agreed:
            raise StoppedError(f"the run was asked to stop, and did after step {last_step}")
        if (weights := trainer.engine.weights(has_frozen=False)) is not None:
            model = whole_model(room, weights, room.precision)
        trainer.engine.close()
    best = best_of(history) if keeps_best(room.config) else None
    if best is None or best.step == last_step:
        return model, last_step
    logger.info("The result is step %d, whose score was the best: %.4f.", best.step, best.score)
    restore_weights(model, room.store.folder(best.step))
    return model, best.step


def take_late_score(room: Room, model: Model, scorer: Scorer | None, start: Start) -> float | None:
    """Takes the score of the checkpoint's step if a stop came before it; None when none is lacking."""
    if scorer is None or start.checkpoint is None or not start.lacks_score(room.config):
        return None
    restore_weights(model, start.checkpoint.folder)
    score = scorer.score(model, start.checkpoint.step, "during")
    note_best(room, start.log_history(score))
    return score


def whole_model(room: Room, weights: Iterable[tuple[str, torch.Tensor]], precision: Precision) -> Model:
    """Returns a model that holds an engine's trained weights, whole, in ``precision``; all processes must ask."""
    model = build_model(room.config, precision, room.args.device)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in weights:
            own[name].copy_(tensor)
    return model


def score_during(room: Room, trainer: Phi3VTrainer, model: Model, scorer: Scorer, step: int) -> dict[str, float]:
    """Takes a mid-run score, of a copy where the model itself lies in parts; returns what Trainer logs."""
    weights = None if trainer.engine.is_whole else trainer.engine.weights(has_frozen=False)
    if weights is None:
        return scorer.score_during(model, step)
    logger.info("Putting a whole model together for the score of step %d ...", step)
    in_16_bit = replace(room.precision, weights=DTYPE_NAMES[room.precision.name])
    return scorer.score_during(whole_model(room, weights, in_16_bit), step)


def save_checkpoint_model(room: Room, trainer: Phi3VTrainer, model: Model, folder: Path) -> None:
    """Writes a checkpoint's model folder; all processes take part, the first one writes."""
    weights = trainer.engine.weights(has_frozen=not room.config.trains_adapters)
    state = None if weights is None else gather(weights, keeps=room.is_writer)
    if room.is_writer:
        save_model(model, room.processor, folder, state=state)


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
        commit_checkpoint=lambda step: commit_checkpoint(room, step),
        staging=store.staging,
        evaluate_now=evaluate_now if scorer is not None and config.eval_steps is not None else None,
        callbacks=[LogAtMilestones(), KeepBest(keeps_best(config), config.early_stopping_patience)],
    )
    trainer.remove_callback(PrinterCallback)
    add_guards(trainer, room, start, stop)
    meter = SpeedMeter(trainer, earlier_s=seconds_trained(room.run))
    trainer.measure_speed = meter.read
    trainer.add_callback(meter)
    if room.is_writer:
        add_reporters(trainer, room, start)
    return trainer


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
    if room.config.progress:
        trainer.add_callback(ProgressLine())


def training_samples(room: Room, cache: FeatureCache | None = None) -> TrainingSamples:
    """Returns what makes the run's micro-batches."""
    collator = PackCollator(
        room.processor.image_token_id,
        tokens_per_side=room.processor.image_processor.tokens_per_side,
        short_positions=room.short_positions,
        loss_weighting=room.config.loss_weighting,
        alignment=row_alignment(room.args.device),
    )
    return TrainingSamples(room.data.train, room.data.encoder, collator, cache)


def commit_checkpoint(room: Room, step: int) -> None:
    """Completes a checkpoint, notes the best one, and only then deletes what is no longer kept."""
    checkpoint = room.store.commit(step, room.identity)
    best = note_best(room, checkpoint.trainer_state()["log_history"])
    room.store.prune(protect=() if best is None else (best.step,))


def note_best(room: Room, log_history: Sequence[Mapping[str, Any]]) -> Best | None:
    """Writes ``best.json``, on the writing process; returns the best score if the run keeps it."""
    best = best_of(log_history) if keeps_best(room.config) else None
    if best is not None and room.is_writer:
        room.run.write_best({"step": best.step, "score": best.score, "metric": room.config.eval_metric})
    return best


def keeps_best(config: TrainConfig) -> bool:
    """Whether the result is the checkpoint with the best mid-run score."""
    return config.keep_best and config.eval_steps is not None


def round_to_base(model: Model, config: TrainConfig) -> bool:
    """Gives trained weights the number format that the base is saved in; says whether that changed it.

    Training keeps them in float32, so that small updates are not lost; the result is what users of the base expect,
    and is scored as it is saved. Checkpoints stay float32.
    """
    dtype = dtype_of_folder(config.model)
    if config.trains_adapters or dtype == torch.float32:
        return False
    model.to(dtype=dtype)  # pyright: ignore[reportCallIssue]
    return True


def save_result(room: Room, model: Model, step: int) -> None:
    """Writes ``RUN/model``."""
    if room.is_writer:
        write_json(room.store.root / RESULT_FILE, {"step": step})
        save_model(model, room.processor, room.run.model_dir)
        logger.info("Step %d is saved in %s.", step, room.run.model_dir)


def seconds_trained(run: RunDirectory) -> float:
    """Returns the training time that the run's log ends with."""
    steps = run.steps()
    return float(steps[-1].get("elapsed_s") or 0.0) if steps else 0.0


def describe_gpus(device: torch.device) -> list[dict[str, Any]]:
    """Describes the GPUs that this machine offers, for ``environment.json``."""
    if device.type != "cuda":
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": gpu.name, "memory_bytes": gpu.total_memory, "capability": f"{gpu.major}.{gpu.minor}"} for gpu in found
    ]


def show_messages(is_writer: bool) -> None:
    """Shows the package's messages on standard error, above a progress bar; those of the first process only."""
    disable_progress_bar()  # transformers shows one for every shard that it reads or writes
    package = logging.getLogger("phi3v")
    package.setLevel(logging.INFO if is_writer else logging.ERROR)
    if not package.handlers:
        package.addHandler(_BarHandler())


class _BarHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(without_secrets(self.format(record)), file=sys.stderr)
