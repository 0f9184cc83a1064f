"""The assembly of a training run: from a configuration to ``RUN/model``, in stages, each of which may be killed."""

import gc
import logging
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, set_seed

from phi3v.config import TrainConfig
from phi3v.data.packing import MicroBatch, load_of
from phi3v.errors import ConfigError, StoppedError
from phi3v.files import write_json
from phi3v.model.checkpoint import (
    base_of,
    dtype_of_folder,
    is_adapter,
    load_config,
    load_processor,
    save_model,
)
from phi3v.model.four_bit import require_four_bit
from phi3v.model.packed import PackedBatch
from phi3v.model.placement import resolve_device
from phi3v.report import write_report
from phi3v.runlog import RunDirectory, environment
from phi3v.train.activations import choose_activation_policy
from phi3v.train.assembly import build_trainer, note_best, on_device, whole_model
from phi3v.train.audit import audit
from phi3v.train.callbacks.milestones import LateScore
from phi3v.train.checkpoints.identity import identify
from phi3v.train.checkpoints.rehearsal import rehearse_saving, require_disk_space
from phi3v.train.checkpoints.state import gather
from phi3v.train.checkpoints.store import CheckpointStore
from phi3v.train.checkpoints.weights import restore_weights
from phi3v.train.data import check_data, choose_sharing
from phi3v.train.engines.choose import require_engine
from phi3v.train.evaluation import Scorer
from phi3v.train.faults import explained
from phi3v.train.feature_cache import FeatureCache, open_cache, require_frozen, require_room
from phi3v.train.host_memory import warn_of_little_memory
from phi3v.train.messages import describe_gpus, show_messages
from phi3v.train.order import epoch_order
from phi3v.train.room import (
    CHECK_FILE,
    Model,
    Room,
    build_model,
    compute_of,
    data_load,
    home_of,
    keeps_best,
    training_arguments,
    training_samples,
)
from phi3v.train.scores import SCORE_KEY
from phi3v.train.start import (
    Start,
    best_whole,
    decide_start,
    kept_sharing,
    refuse_existing_run,
    sole_writer,
)
from phi3v.train.stopping import Stop
from phi3v.train.tuning import (
    IMAGE_PARTS,
    Precision,
    choose_precision,
)

logger = logging.getLogger(__name__)


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
    require_engine(config, args.device)
    show_messages(is_writer=args.process_index == 0)
    run = RunDirectory(config.output_dir)
    store = CheckpointStore(run.checkpoints_dir, config.keep_checkpoints)
    with sole_writer(run) if args.process_index == 0 else nullcontext():
        if args.process_index == 0:
            refuse_existing_run(config, run, store)
        refuse_adapter(config)
        processor = load_processor(config.model, num_crops=config.num_crops)
        kept = kept_sharing(run, store) if args.process_index == 0 else None
        data = check_data(config, processor, store.root / CHECK_FILE, args, kept)
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
            shared_questions=sharing.shared_questions,
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
        warn_of_little_memory(config, precision, model_config.dims, args.device)
        model = build_model(config, precision, home_of(config, args.device), compute_of(room))
        cache = open_feature_cache(room, model)
        with Stop(speaks=room.is_writer) as stop, explained(store.describe_newest):
            scorer = build_scorer(room, stop)
            if start.result_step is None:
                prepare(room, model, scorer, start)
                model, result_step = train(room, model, scorer, start, stop, cache)
                is_rounded = (room.is_writer or scorer is not None) and round_to_base(model, config)
                save_result(room, model, result_step)
            else:
                result_step = start.result_step
                is_rounded = round_to_base(model, config)
                restore_weights(model, run.model_dir)
            if scorer is not None:
                move_to_device(room, model)
                may_reuse = not is_rounded and not scores_rounded_weights(config, precision)
                scorer.score(model, result_step, "after", may_reuse=may_reuse)
            if room.is_writer:
                write_report(run.path)
    return run.path


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
    is_scored = scorer is not None and room.config.eval_before
    whole = on_device(room, model) if room.is_writer or (is_scored and not start.has_first_score) else model
    if room.is_writer:
        batch = audit_batch(room)
        found = audit(whole, batch.to(room.args.device), room.config, room.precision)
        room.run.write_audit(found.to_dict())
        logger.info("%s", found.table())
        found.require_trainable()
        require_disk_space(model, room.store, room.config)
        if start.checkpoint is None:
            rehearse_saving(model, room.processor, room.store)
    if scorer is not None and is_scored:
        scorer.score(whole, 0, "before")


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

    Processes that neither write nor score get back what is left of a model that was shared out.

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
            if room.is_writer or scorer is not None:
                model = whole_model(room, weights, room.precision, home_of(room.config, room.args.device))
            else:
                gather(weights, keeps=False)  # all processes go through them together
        trainer.engine.close()
    if not keeps_best(room.config):
        return model, last_step
    found = [best_whole(history, room.store, start.lost, last=last_step) if room.is_writer else (None, frozenset())]
    if room.args.world_size > 1:
        broadcast_object_list(found)
    ((best, lost),) = found
    note_best(room, history, lost)
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
    score = scorer.score(on_device(room, model), start.checkpoint.step, "during")
    note_best(room, start.log_history(score), start.lost)
    return score


def move_to_device(room: Room, model: Model) -> None:
    """Moves a result that was put together elsewhere to the device, when what trained it has left."""
    if room.config.parallel == "ddp":
        return
    gc.collect()  # the trainer and what hangs on it know each other
    if room.args.device.type == "cuda":
        torch.cuda.empty_cache()
    model.to(device=room.args.device)  # pyright: ignore[reportCallIssue]


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


def scores_rounded_weights(config: TrainConfig, precision: Precision) -> bool:
    """Whether mid-run scores are of weights in 16 bit: engines that share weights out have no others at hand."""
    return config.parallel != "ddp" and precision.name != "fp32" and not config.trains_adapters


def save_result(room: Room, model: Model, step: int) -> None:
    """Writes ``RUN/model``."""
    if room.is_writer:
        write_json(room.run.result_path, {"step": step})
        save_model(model, room.processor, room.run.model_dir)
        logger.info("Step %d is saved in %s.", step, room.run.model_dir)
