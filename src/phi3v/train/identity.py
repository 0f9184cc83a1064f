"""What makes two starts the same run: which settings a resume must find unchanged, and which it may not care about."""

from collections.abc import Mapping
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

from phi3v.config import TrainConfig
from phi3v.errors import CheckpointError

DECIDES = frozenset(
    {
        "model", "image_dir", "num_crops", "max_length", "on_overlong", "on_bad_sample", "rope_mode", "precision",
        "seed", "method", "freeze", "part_learning_rates", "lora_rank", "lora_alpha", "lora_dropout", "lora_parts",
        "use_rslora", "use_dora", "four_bit_parts",
        "learning_rate", "batch_size", "num_train_epochs", "max_steps", "lr_scheduler", "warmup_steps", "weight_decay",
        "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "loss_weighting",
        "sampling", "shared_questions", "fp8", "eval_metric", "eval_scoring", "eval_labels", "eval_limit",
        "eval_max_new_tokens",
    }
)  # fmt: skip
"""Fields that decide what is trained, or what its scores mean: a resume with another value is refused."""

ROUNDS = frozenset(
    {
        "micro_batch_tokens", "micro_batch_crops", "micro_batch_size", "checkpointing", "device",
        "parallel", "cpu_offload",
    }
)  # fmt: skip
"""Fields that change the order of floating-point operations only: a resume may change them, and says so."""

FREE = frozenset(
    {
        "output_dir", "train_data", "eval_data", "check_images", "num_workers", "save_steps", "keep_checkpoints",
        "keep_best", "resume", "eval_before", "eval_steps", "eval_batch_size", "early_stopping_patience",
        "logging_steps", "report_to", "progress", "vision_cache", "on_loss_spike",
    }
)  # fmt: skip
"""Fields that a resume may change. Of the data, the content decides and not the path: see the fingerprints."""

_PACKAGES = ("torch", "transformers", "peft")


def _packages(config: TrainConfig) -> tuple[str, ...]:
    """Names the packages whose versions can change a run's rounding."""
    return (*_PACKAGES, "bitsandbytes") if config.method == "qlora" else _PACKAGES


def identify(
    config: TrainConfig, *, precision: str, train_fingerprint: str, eval_fingerprint: str | None, world_size: int
) -> dict[str, Any]:
    """Returns what a checkpoint remembers about its run, as JSON values.

    Args:
        config: the run's configuration.
        precision: the resolved one, for ``auto`` means another one on another machine.
        train_fingerprint: of the training samples' content.
        eval_fingerprint: of the evaluation samples', if there are any.
        world_size: number of processes.
    """
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    values["precision"] = precision
    values["model"] = str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model
    values["image_dir"] = None if config.image_dir is None else str(config.image_dir.resolve())
    values["freeze"] = sorted(config.freeze)
    values["lora_parts"] = sorted(config.trained_parts) if config.trains_adapters else None
    values["four_bit_parts"] = sorted(config.four_bit_parts)
    return {
        "decides": {
            **{name: values[name] for name in sorted(DECIDES)},
            "training samples (fingerprint)": train_fingerprint,
            "evaluation samples (fingerprint)": eval_fingerprint,
        },
        "rounds": {
            **{name: values[name] for name in sorted(ROUNDS)},
            "number of processes": world_size,
            **{f"{package} version": metadata.version(package) for package in _packages(config)},
        },
    }


def require_same_run(stored: Mapping[str, Any], current: Mapping[str, Any], place: Path) -> list[str]:
    """Compares a checkpoint's identity with this start's.

    Returns:
        What changed and costs no more than bit-for-bit equality, one line each.

    Raises:
        CheckpointError: something that decides the run changed; names it and the remedy.
    """
    breaking = _changes(stored["decides"], current["decides"])
    if breaking:
        raise CheckpointError(
            f"{place} belongs to a run with other settings:\n- "
            + "\n- ".join(breaking)
            + "\nGo on with the settings of that run, or start a new one in another output_dir."
        )
    return _changes(stored["rounds"], current["rounds"])


def _changes(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    names = sorted(stored.keys() | current.keys())
    return [
        f"{name}: {_shown(stored.get(name))} there, {_shown(current.get(name))} now"
        for name in names
        if stored.get(name) != current.get(name)
    ]


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
