"""What makes two starts the same run: what a resume must find unchanged, and what it may not care about.

Every field says for itself what another value means (``on_resume``). Of the data, the content decides and not the path:
see the fingerprints.
"""

from collections.abc import Mapping
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

from phi3v.config import TrainConfig, settings_of
from phi3v.errors import CheckpointError
from phi3v.settings import OnResume

_PACKAGES = ("torch", "transformers", "peft")


def _packages(config: TrainConfig) -> tuple[str, ...]:
    """Names the packages whose versions can change a run's rounding."""
    return (*_PACKAGES, "bitsandbytes") if config.method == "qlora" else _PACKAGES


def identify(
    config: TrainConfig,
    *,
    precision: str,
    shared_questions: int,
    train_fingerprint: str,
    eval_fingerprint: str | None,
    world_size: int,
) -> dict[str, Any]:
    """Returns what a checkpoint remembers about its run, as JSON values.

    Args:
        config: the run's configuration.
        precision: the resolved one, for ``auto`` means another one on another machine.
        shared_questions: the resolved one, for what is chosen depends on settings that a resume may change.
        train_fingerprint: of the training samples' content.
        eval_fingerprint: of the evaluation samples', if there are any.
        world_size: number of processes.
    """
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    values["precision"] = precision
    values["shared_questions"] = shared_questions
    values["model"] = str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model
    values["image_dir"] = None if config.image_dir is None else str(config.image_dir.resolve())
    values["freeze"] = sorted(config.freeze)
    values["lora_parts"] = sorted(config.trained_parts) if config.trains_adapters else None
    values["four_bit_parts"] = sorted(config.four_bit_parts)
    return {
        "decides": {
            **_marked("decides", values),
            "training samples (fingerprint)": train_fingerprint,
            "evaluation samples (fingerprint)": eval_fingerprint,
        },
        "rounds": {
            **_marked("rounds", values),
            "number of processes": world_size,
            **{f"{package} version": metadata.version(package) for package in _packages(config)},
        },
    }


def _marked(on_resume: OnResume, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that are declared to mean this to a run that goes on."""
    settings = settings_of(TrainConfig)
    return {name: values[name] for name in sorted(values) if settings[name].on_resume == on_resume}


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
