"""The published recipe's choices, on the same machine: what the fast path is held against.

One sample at a time through the public forward pass: every crop up to ``num_crops`` + 1 and CLIP's last layer computed,
every layer recomputed in the backward pass, logits at every position, the library's own attention, 16-bit weights and
gradients with float32 master weights in the optimizer, a step every eight samples, as DeepSpeed does it.

Source: the published finetune_hf_trainer_docvqa.py, modeling_phi3_v.py and image_embedding_phi3_v.py.
"""

import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from phi3v.bench.machine import peak_memory, reset_peak_memory, synchronize
from phi3v.bench.model import build_model
from phi3v.bench.options import BenchOptions
from phi3v.data.collate import PackSample
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.train.tuning import adapted_modules, select_trainable

SAMPLES_A_STEP = 8
"""Samples between optimizer steps: 64 of the published runs, over their eight GPUs."""

WARMUP_SAMPLES = 2

MASTER_NUMBERS_AT_ONCE = 2**28
"""Weights whose gradients are in float32 at the same time: 1 GiB, where all of them would be 16.6 GB."""


def measure_baseline(
    options: BenchOptions, config: Phi3VConfig, samples: Sequence[PackSample], device: torch.device
) -> dict[str, Any]:
    """Trains on ``options.baseline_samples`` samples as published; returns speed and memory.

    The memory of model and optimizer is free again afterwards.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build_model(config, dtype, device, seed=options.seed, is_four_bit=options.method == "qlora")
    train_config = options.train_config()
    select_trainable(model, train_config)
    with warnings.catch_warnings():
        # transformers 5.23 renamed the method and warns; 5.17 has this name only, and both keep it until 6.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # pyright: ignore[reportCallIssue]
    learner: nn.Module = model
    if train_config.trains_adapters:
        settings = LoraConfig(
            r=options.lora_rank,
            lora_alpha=2 * options.lora_rank,
            target_modules=adapted_modules(model, train_config.trained_parts),
            init_lora_weights="gaussian",
        )
        learner = get_peft_model(model, settings, autocast_adapter_dtype=False)  # pyright: ignore[reportArgumentType]
    learning = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    optimizer = MasterWeightAdamW(learning, lr=train_config.learning_rate, device=device)
    reset_peak_memory(device)
    seconds: list[float] = []
    crops = _random_crops(config, options.num_crops + 1, options.seed)
    with _published_vision(model, options.num_crops + 1):
        for number in range(WARMUP_SAMPLES + options.baseline_samples):
            batch = _padded_batch(samples[number % len(samples)], config, crops)
            is_last = number == WARMUP_SAMPLES + options.baseline_samples - 1
            steps = (number - WARMUP_SAMPLES + 1) % SAMPLES_A_STEP == 0 or is_last
            synchronize(device)
            started = time.perf_counter()
            on_device = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            on_device["pixel_values"] = on_device["pixel_values"].to(dtype)
            (learner(**on_device, use_cache=False).loss / SAMPLES_A_STEP).backward()
            if steps or number == WARMUP_SAMPLES - 1:
                optimizer.step(max_grad_norm=train_config.max_grad_norm)
            synchronize(device)
            if number >= WARMUP_SAMPLES:
                seconds.append(time.perf_counter() - started)
    return {
        "samples_per_s": len(seconds) / sum(seconds),
        "sample_seconds": {"median": statistics.median(seconds), "all": seconds},
        "memory": peak_memory(device),
        "dtype": str(dtype).removeprefix("torch."),
        "samples_a_step": SAMPLES_A_STEP,
    }


class MasterWeightAdamW:
    """AdamW on float32 copies of 16-bit weights, whose gradients become float32 a part at a time.

    Args:
        parameters: on ``device``.
        lr: learning rate.
        device: where they are.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, device: torch.device) -> None:
        self.parameters = list(parameters)
        self._parts: list[tuple[list[nn.Parameter], list[nn.Parameter], torch.optim.AdamW]] = []
        for weights in _parts_of(self.parameters, MASTER_NUMBERS_AT_ONCE):
            masters = [nn.Parameter(weight.detach().float().clone()) for weight in weights]
            optimizer = torch.optim.AdamW(masters, lr=lr, betas=(0.9, 0.95), eps=1e-7, fused=device.type == "cuda")
            self._parts.append((weights, masters, optimizer))

    @torch.no_grad()
    def step(self, max_grad_norm: float) -> None:
        """Clips, steps on the copies, rounds them into the weights, and drops the gradients."""
        nn.utils.clip_grad_norm_(self.parameters, max_grad_norm)
        for weights, masters, optimizer in self._parts:
            for weight, master in zip(weights, masters, strict=True):
                master.grad = None if weight.grad is None else weight.grad.float()
                weight.grad = None
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)


def _parts_of(parameters: Sequence[nn.Parameter], most: int) -> Iterator[list[nn.Parameter]]:
    """Cuts a list into runs of at most ``most`` numbers; a larger parameter stands alone."""
    part: list[nn.Parameter] = []
    for parameter in parameters:
        if part and sum(one.numel() for one in part) + parameter.numel() > most:
            yield part
            part = []
        part.append(parameter)
    if part:
        yield part


def _random_crops(config: Phi3VConfig, count: int, seed: int) -> torch.Tensor:
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(1, count, 3, config.crop_px, config.crop_px, generator=dice)


def _padded_batch(sample: PackSample, config: Phi3VConfig, crops: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns one sample as the public forward pass takes it, its images padded to the crops of ``crops``."""
    ids, labels = sample.text.input_ids[None], sample.text.labels[None]
    edges = [(rows * config.crop_px, columns * config.crop_px) for rows, columns in sample.text.grids]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if edges:
        batch["pixel_values"] = crops.expand(len(edges), -1, -1, -1, -1)
        batch["image_sizes"] = torch.tensor(edges)
    return batch


@contextmanager
def _published_vision(model: Phi3VForCausalLM, num_crops: int) -> Iterator[None]:
    """Lets CLIP compute what the published code computes besides what is used: blank crops, and its last layer."""
    embedding = model.model.vision_embed_tokens
    tower = embedding.img_processor
    unused_layer = tower.vision_model.encoder.layers[-1]
    given = used = 0

    def count_given(_: nn.Module, arguments: tuple[torch.Tensor, Sequence[tuple[int, int]]]) -> None:
        nonlocal given
        given = len(arguments[1]) * num_crops

    def add_blank_crops(_: nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        nonlocal used
        (crops,) = arguments
        used = len(crops)
        return (torch.cat([crops, crops.new_zeros(given - used, *crops.shape[1:])]),)

    def compute_last_layer(_: nn.Module, __: Any, features: torch.Tensor) -> None:
        unused_layer(features, attention_mask=None)

    def drop_blank_crops(_: nn.Module, __: Any, features: torch.Tensor) -> torch.Tensor:
        return features[:used]

    handles = [
        embedding.register_forward_pre_hook(count_given),  # pyright: ignore[reportArgumentType]
        tower.register_forward_pre_hook(add_blank_crops),  # pyright: ignore[reportArgumentType]
        tower.vision_model.register_forward_hook(compute_last_layer),
        tower.register_forward_hook(drop_blank_crops),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
