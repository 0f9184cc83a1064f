"""The configurations of a run: typed fields, each with its default, range and meaning.

``python -m phi3v.cli.configuration_page`` prints docs/configuration.md from them.
"""

from phi3v.config.evaluation import EvalConfig
from phi3v.config.reading import load_config
from phi3v.config.run import RunConfig, describe_fields, settings_of
from phi3v.config.training import TrainConfig
from phi3v.config.words import (
    FOUR_BIT_PARTS,
    LORA_PARTS,
    PARTS,
    SECTIONS,
    Device,
    Metric,
    Part,
    Precision,
    RopeMode,
    Scoring,
)

__all__ = [
    "FOUR_BIT_PARTS",
    "LORA_PARTS",
    "PARTS",
    "SECTIONS",
    "Device",
    "EvalConfig",
    "Metric",
    "Part",
    "Precision",
    "RopeMode",
    "RunConfig",
    "Scoring",
    "TrainConfig",
    "describe_fields",
    "load_config",
    "settings_of",
]
