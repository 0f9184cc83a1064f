"""What every stage of a run works with: configuration, data, plan, directory; and what follows from them alone."""

import logging
import os
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from accelerate.utils import set_seed
from peft import PeftModel
from transformers import TrainingArguments

from phi3v.config import TrainConfig
from phi3v.data.collate import PackCollator
from phi3v.data.packing import SampleCosts
from phi3v.errors import ConfigError
from phi3v.model.checkpoint import (
    load_four_bit_model,
    load_model,
)
from phi3v.model.compute import Compute
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.packed_attention import row_alignment
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.runlog import RunDirectory
from phi3v.train.activations import ActivationPolicy, DataLoad
from phi3v.train.batches import TrainingSamples
from phi3v.train.checkpoints.store import CheckpointStore
from phi3v.train.data import CheckedData, Sharing
from phi3v.train.engines.choose import is_sharded
from phi3v.train.feature_cache import FeatureCache
from phi3v.train.order import EpochOrder
from phi3v.train.tuning import (
    Precision,
    select_trainable,
    wrap_lora,
)

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
        warmup_steps=config.warmup_steps or 0,  # set when the run's steps are known
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


def home_of(config: TrainConfig, device: torch.device) -> torch.device:
    """Returns where a run's model lies until its engine has it.

    What shares a model out takes it from the machine's memory, part by part: no GPU has to hold it whole in float32.
    """
    return device if config.parallel == "ddp" else torch.device("cpu")


def build_model(
    config: TrainConfig, precision: Precision, device: torch.device, compute: Compute | None = None
) -> Model:
    """Loads the model and makes trainable what the run trains."""
    load = partial(load_four_bit_model, parts=config.four_bit_parts) if config.method == "qlora" else load_model
    model = load(config.model, dtype=precision.weights, rope_mode=config.rope_mode, device=device)
    assert isinstance(model, Phi3VForCausalLM)
    model.compute = compute or Compute()
    select_trainable(model, config)
    if not config.trains_adapters:
        return model
    set_seed(config.seed)
    return wrap_lora(model, config)


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


def keeps_best(config: TrainConfig) -> bool:
    """Whether the result is the checkpoint with the best mid-run score."""
    return config.keep_best and config.eval_steps is not None
