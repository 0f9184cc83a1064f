"""What training and evaluation share."""

# ruff: noqa: RUF009 - `setting` returns a dataclasses.field, which the rule cannot see

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

from phi3v.config.words import (
    HARDWARE,
    LOGGING,
    MODEL_AND_DATA,
    SECTIONS,
    Device,
    Precision,
    RopeMode,
)
from phi3v.errors import ConfigError
from phi3v.settings import Setting, describe_field, expand_home, setting, write_yaml


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What training and evaluation share. Constructing one checks it; relative paths are the working directory's."""

    model: str = setting(
        MODEL_AND_DATA,
        "The model: a folder in the published layout, or a hub id such as microsoft/Phi-3.5-vision-instruct. "
        "Evaluation also takes the folder of a PEFT adapter.",
        familiar_names=("model_name_or_path", "model_path"),
    )
    output_dir: Path = setting(
        MODEL_AND_DATA,
        "Folder of the run: everything that it writes goes there.",
        on_resume="free",
    )
    image_dir: Path | None = setting(
        MODEL_AND_DATA,
        "Folder that image paths start from. None: images/ beside the JSONL file if there, else that file's folder.",
        default=None,
        familiar_names=("image_folder",),
    )
    num_crops: int | None = setting(
        MODEL_AND_DATA,
        "Most crops an image is cut into, the global view not counted. None: the model's own (4 in the published 3.5 "
        "files). 16 is recommended for single images.",
        default=None,
        at_least=1,
    )
    on_bad_sample: Literal["error", "skip"] = setting(
        MODEL_AND_DATA,
        "A sample that cannot be used (broken line, missing image, wrong image tags): stop and name it, or leave it "
        "out and count it.",
        default="error",
    )
    rope_mode: RopeMode = setting(
        MODEL_AND_DATA,
        "LongRoPE factors: by each sequence's own length, or fixed to match the server that will run the model. For "
        "phi3v eval, auto is the mode of the run whose result the model is.",
        default="auto",
    )
    precision: Precision = setting(
        HARDWARE,
        "Number format of the computation. Auto: bf16 on a GPU that has it, else fp32.",
        default="auto",
        familiar_names=("bf16", "fp16"),
    )
    device: Device = setting(
        HARDWARE,
        "Where to run. Auto: the GPU if there is one.",
        default="auto",
        on_resume="rounds",
    )
    progress: bool = setting(
        LOGGING,
        "Show progress bars.",
        default=True,
        familiar_names=("disable_tqdm", "no_tqdm"),
        on_resume="free",
    )

    def __post_init__(self) -> None:
        settings = settings_of(type(self))
        for name, one in settings.items():
            object.__setattr__(self, name, one.read(getattr(self, name)))
        if self.model.startswith("~"):
            object.__setattr__(self, "model", str(expand_home(self.model) or self.model))
        for name, one in settings.items():
            if getattr(self, name) != one.default:
                refuse_unread(one, settings, vars(self))

    def to_yaml(self) -> str:
        """Returns the configuration as YAML that `load_config` reads back to an equal one.

        Fields that nothing would read in this run (such as ``lora_rank`` without ``method: lora``) are left out.
        """
        settings = settings_of(type(self))
        blocks = []
        for section in SECTIONS:
            values = {
                one.name: getattr(self, one.name)
                for one in settings.values()
                if one.section == section and not one.unmet(settings, vars(self))
            }
            if values:
                blocks.append(f"# {section}\n{write_yaml(values)}")
        return "\n".join(blocks)


@cache
def settings_of(cls: type[RunConfig]) -> dict[str, Setting]:
    """Returns the fields of ``cls`` by name, in the order of `SECTIONS`, required ones first in theirs."""
    hints = get_type_hints(cls)
    settings = [describe_field(field, hints[field.name]) for field in dataclasses.fields(cls)]
    settings.sort(key=lambda one: (SECTIONS.index(one.section), not one.is_required))
    return {one.name: one for one in settings}


def describe_fields(cls: type[RunConfig]) -> list[Setting]:
    """Returns the rows of ``--help`` and of docs/configuration.md: one for each field of ``cls``, by section."""
    return list(settings_of(cls).values())


def refuse_unread(one: Setting, settings: Mapping[str, Setting], values: Mapping[str, Any], place: str = "") -> None:
    """Refuses a field that nothing would read.

    Raises:
        ConfigError: says what it needs.
    """
    unmet = one.unmet(settings, values)
    if unmet:
        raise ConfigError(f"{place}{one.name} is set, but nothing would read it: it needs {' and '.join(unmet)}")


def check_labels(name: str, labels: Sequence[str]) -> None:
    """Refuses labels that are no closed set.

    Raises:
        ConfigError: one label, or one twice.
    """
    if len(labels) == 1 or len(set(labels)) < len(labels):
        raise ConfigError(f"{name} is {', '.join(map(repr, labels))}; a closed set has at least two different answers")
