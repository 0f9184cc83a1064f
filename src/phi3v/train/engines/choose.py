"""Which engine a run trains with."""

import os
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import distributed, nn

from phi3v.config import TrainConfig
from phi3v.errors import ConfigError
from phi3v.model.checkpoint import base_of
from phi3v.model.packed_forward import release_towers
from phi3v.train.engines.deep_speed import DeepSpeed, import_deepspeed
from phi3v.train.engines.engine import Engine, SkippingOptimizer
from phi3v.train.engines.fully_sharded import FullySharded
from phi3v.train.engines.replicated import Replicated
from phi3v.train.tuning import Precision, parameter_groups


def is_sharded(config: TrainConfig) -> bool:
    """Whether weights are whole only while their layer computes."""
    return config.parallel in ("fsdp2", "zero3")


def require_engine(config: TrainConfig, device: torch.device) -> None:
    """Checks that a run's engine goes with its other settings and is there.

    Raises:
        ConfigError: names what does not go together, or what is not installed.
    """
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get(name, "false") == "true":
            raise ConfigError(
                f"accelerate is set up to shard the model itself ({name}); take that out of its configuration, and set "
                "parallel to fsdp2, zero2 or zero3"
            )
    if config.parallel == "ddp":
        return
    if config.cpu_offload and device.type == "cpu":
        raise ConfigError("cpu_offload is on, but this run's device is the CPU; leave it out")
    if config.method == "qlora":
        raise ConfigError(f"parallel {config.parallel} cannot share out weights in 4 bit; with method qlora use ddp")
    if is_sharded(config) and config.fp8:
        raise ConfigError(f"fp8 keeps weights whole, which parallel {config.parallel} does not; leave one of them out")
    if is_sharded(config) and config.vision_cache is not None:
        raise ConfigError(
            f"vision_cache computes images outside of the step, where parallel {config.parallel} has no whole weights; "
            "use ddp or zero2"
        )
    if config.parallel in ("zero2", "zero3"):
        import_deepspeed(device)


def open_engine(config: TrainConfig, precision: Precision, model: nn.Module, accelerator: Accelerator) -> Engine:
    """Makes a run's engine.

    Args:
        config: names it.
        precision: what the run computes in.
        model: with float32 trainable weights, whole; on its device for ``ddp``, elsewhere for the others.
        accelerator: Trainer's.
    """
    make_optimizer = _adamw(config, accelerator.device)
    if config.parallel == "ddp":
        return Replicated(model, make_optimizer(model), accelerator)
    release_towers(base_of(model).model)
    if not distributed.is_initialized():
        # One process without a launcher: sharing out to itself alone still offloads. DeepSpeed asks a launcher's word.
        os.environ.setdefault("LOCAL_RANK", "0")
        backend = "nccl" if accelerator.device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    if config.parallel == "fsdp2":
        dtype = precision.autocast_dtype or torch.float32
        engine: Engine = FullySharded(
            model, make_optimizer, device=accelerator.device, dtype=dtype, offloads=config.cpu_offload
        )
    else:
        engine = DeepSpeed(
            model,
            make_optimizer,
            device=accelerator.device,
            stage=3 if config.parallel == "zero3" else 2,
            precision=precision.name,
            max_norm=config.max_grad_norm,
            offloads=config.cpu_offload,
        )
    if isinstance(engine.optimizer, SkippingOptimizer):
        # Where accelerate looks for steps that fp16 left out.
        accelerator._optimizers.append(engine.optimizer)  # pyright: ignore[reportArgumentType]
    return engine


def _adamw(config: TrainConfig, device: torch.device) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.AdamW(
        parameter_groups(model, config),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=device.type == "cuda",
    )
