"""What a run trains: whole parts or adapters, at which learning rates, in which number format."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.dora import DoraLinearLayer
from torch import nn

from phi3v.config import TrainConfig
from phi3v.errors import ConfigError
from phi3v.model.linear.dora import set_magnitudes_to_norms
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.parts import is_never_used, part_of
from phi3v.model.placement import DTYPE_NAMES, resolve_precision

FLOAT8_CAPABILITY = (8, 9)
"""Compute capability from which NVIDIA's GPUs multiply in float8: Ada, Hopper and later."""

IMAGE_PARTS = ("vision", "projector")
"""Parts that only samples with images reach."""

_TOWER = r"model\.vision_embed_tokens\.img_processor\.vision_model\.encoder\.layers"

_ADAPTED_MODULES = {
    "vision": _TOWER + r"\.({used_vision_layers})\.(self_attn\.(q_proj|k_proj|v_proj|out_proj)|mlp\.(fc1|fc2))",
    "projector": r"model\.vision_embed_tokens\.img_projection\.(0|2)",
    "decoder": r"model\.layers\.\d+\.(self_attn\.(qkv_proj|o_proj)|mlp\.(gate_up_proj|down_proj))",
    "head": r"lm_head",
}
"""Linear layers that get adapters, by part. Spelled out: ``q_proj`` alone would reach CLIP only, and "all-linear" would
reach CLIP's last layer, which is never computed."""


@dataclass(frozen=True, slots=True)
class Precision:
    """A run's number formats.

    Attributes:
        name: fp32, bf16 or fp16.
        weights: what the model is loaded in, as ``load_model`` names it. With bf16 and fp16, weights that are trained
            themselves stay float32 (each update is small against its weight and would round away); frozen ones under
            adapters are 16 bit. Layers held in 4 bit compute in it.
    """

    name: str
    weights: str

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """What matrix products compute in; None for plain float32."""
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]

    def autocast(self, device: torch.device) -> torch.autocast:
        """Returns a context that computes as training does."""
        dtype = self.autocast_dtype
        return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def choose_precision(config: TrainConfig, device: str) -> Precision:
    """Turns the configured precision into number formats for ``device``.

    Raises:
        ConfigError: fp16 on a CPU, or bf16 or float8 on a GPU without it.
    """
    name = resolve_precision(config.precision, device)
    if config.fp8 and device == "cuda" and torch.cuda.get_device_capability() < FLOAT8_CAPABILITY:
        raise ConfigError(f"fp8 is on, but {torch.cuda.get_device_name()} has no float8 products; leave fp8 out")
    if name == "bf16" and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"precision is bf16, which {torch.cuda.get_device_name()} does not have; set precision to fp16 or fp32"
        )
    return Precision(name=name, weights=DTYPE_NAMES[name] if config.trains_adapters else "float32")


def select_trainable(model: Phi3VForCausalLM, config: TrainConfig) -> None:
    """Sets ``requires_grad`` of every parameter: on in the parts that the run trains, off in the others.

    CLIP's last layer and ``post_layernorm`` are always off: nothing computes them, so they never get a gradient, and
    an optimizer that holds them has no state for them to save. With adapters everything is off; ``wrap_lora`` adds what
    trains.
    """
    num_vision_layers = model.config.vision_config.num_hidden_layers
    parts = () if config.trains_adapters else config.trained_parts
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in parts and not is_never_used(name, num_vision_layers))


def wrap_lora(model: Phi3VForCausalLM, config: TrainConfig) -> PeftModel:
    """Puts low-rank adapters on the linear layers of ``config.trained_parts``; everything else is frozen.

    The model computes exactly what it did before: B starts at zero, DoRA's magnitudes at the lengths of the weights'
    rows. A starts gaussian, from torch's global generator. Adapters are float32 whatever the weights under them are.

    Raises:
        ConfigError: a part that has no linear layer to adapt.
    """
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=int(config.lora_alpha) if config.lora_alpha.is_integer() else config.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.lora_dropout,
        target_modules=_names_of(model, config.trained_parts),
        init_lora_weights="gaussian",
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # PEFT asks for gradient checkpointing under the name that transformers 5.23 has deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = get_peft_model(model, settings)
    assert isinstance(wrapped, PeftModel)
    set_magnitudes_to_norms(wrapped)
    # PEFT holds a set, whose order in the saved file would be another in every process.
    settings.target_modules = sorted(settings.target_modules or ())
    if Path(config.model).is_dir():
        # The adapter must find its base from any working directory.
        wrapped.peft_config["default"].base_model_name_or_path = str(Path(config.model).resolve())
    return wrapped


def adapted_modules(model: Phi3VForCausalLM, parts: Sequence[str]) -> str:
    """Returns the regular expression that the adapted modules' names match in full."""
    used_layers = "|".join(map(str, range(model.config.vision_config.num_hidden_layers - 1)))
    patterns = [_ADAPTED_MODULES[part].replace("{used_vision_layers}", used_layers) for part in parts]
    return "|".join(f"({pattern})" for pattern in patterns)


def adaptable_modules(model: Phi3VForCausalLM, part: str) -> list[nn.Module]:
    """Returns the layers of a part that adapters can stand on, whatever this run chose."""
    if part not in _ADAPTED_MODULES:
        return []
    return [model.get_submodule(name) for name in _names_of(model, (part,))]


def _names_of(model: Phi3VForCausalLM, parts: Sequence[str]) -> list[str]:
    """Names the layers of some parts that adapters can stand on: an adapter's file holds names, no patterns."""
    pattern = re.compile(adapted_modules(model, parts))
    return [name for name, _ in model.named_modules() if pattern.fullmatch(name)]


def learning_rate_of(part: str, config: TrainConfig) -> float:
    """Returns a part's highest learning rate."""
    return {**config.part_learning_rates}.get(part, config.learning_rate)  # pyright: ignore[reportArgumentType, reportCallIssue]


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups the trainable parameters for AdamW, by learning rate and weight decay.

    Biases and the weights of normalisation layers get no decay, as in Trainer, and DoRA's magnitudes neither. A group
    whose learning rate is ``config.learning_rate`` stands first, if there is one: it is the rate that logs show.
    """
    undecayed = undecayed_names(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (learning_rate_of(part_of(name), config), 0.0 if name in undecayed else config.weight_decay)
            groups.setdefault(key, []).append(parameter)
    order = sorted(groups, key=lambda key: key[0] != config.learning_rate)
    return [{"params": groups[lr, decay], "lr": lr, "weight_decay": decay} for lr, decay in order]


def undecayed_names(model: nn.Module) -> set[str]:
    """Names the parameters that weight decay would pull away from where they belong.

    They are biases, norm weights, and DoRA's magnitudes: decay takes B to zero, which is the base's own direction, but
    would take the magnitudes to zero too, and not to the base's own.
    """
    names = set()
    for module_name, module in model.named_modules():
        is_norm = type(module).__name__.endswith("Norm") or isinstance(module, DoraLinearLayer)
        prefix = f"{module_name}." if module_name else ""
        for name, _ in module.named_parameters(recurse=False):
            if is_norm or name == "bias":
                names.add(prefix + name)
    return names
