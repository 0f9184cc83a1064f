"""The last touches to the published layout: stop tokens, LongRoPE factors, and the original's pointers to its code."""

import json
from pathlib import Path
from typing import Any

from ..config import RopeMode
from ..files import write_json
from ..model.processing_phi3_v import Phi3VProcessor

CODE_REPOSITORY = "microsoft/Phi-3.5-vision-instruct"
"""Where the original's code lies."""

AUTO_MAPS = {
    "config.json": {
        "AutoConfig": "configuration_phi3_v.Phi3VConfig",
        "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
    },
    "preprocessor_config.json": {
        "AutoImageProcessor": "processing_phi3_v.Phi3VImageProcessor",
        "AutoProcessor": "processing_phi3_v.Phi3VProcessor",
    },
    "processor_config.json": {"AutoProcessor": "processing_phi3_v.Phi3VProcessor"},
    "tokenizer_config.json": {"AutoProcessor": "processing_phi3_v.Phi3VProcessor"},
}
"""``auto_map`` of the published files."""

PROCESSOR_CONFIG = {"processor_class": "Phi3VProcessor"}
"""What the published ``processor_config.json`` holds beside its ``auto_map``."""


def settle_stop_tokens(model: Any, processor: Phi3VProcessor) -> None:
    """Makes both configuration files say where answers end: at the tokenizer's ``<|endoftext|>`` and ``<|end|>``."""
    model.config.eos_token_id = list(processor.stop_token_ids)
    model.generation_config.eos_token_id = list(processor.stop_token_ids)


def settle_rope_factors(model: Any, mode: RopeMode) -> None:
    """Makes ``config.json`` say which LongRoPE factors to use, in words that every loader knows.

    No loader has a field for it: each chooses by length, the published code and transformers anew for every batch,
    vLLM once from ``max_model_len``. A fixed set therefore stands in both places, so that either choice gives it.
    ``max_position_embeddings`` stays: the scale of cosines and sines follows from it, so that lowering it to 4096,
    which would force the short factors as well, would change every logit.

    Source: vLLM pull request 27431 and its ``Phi3LongRoPEScaledRotaryEmbedding``.

    Args:
        model: its configuration is changed; what it computes in this process is not.
        mode: ``auto`` leaves both sets as they are.
    """
    factors = model.config.rope_parameters
    if mode == "auto" or factors.get("rope_type") != "longrope":
        return
    kept = list(factors[f"{mode}_factor"])
    factors["short_factor"], factors["long_factor"] = kept, list(kept)


def point_to_published_code(folder: Path) -> None:
    """Writes the original's ``auto_map`` into a folder's files, each entry naming the original's repository.

    Programs that load the original with ``trust_remote_code`` then load this folder in the same way. phi3v itself never
    follows the entries.
    """
    for name, entries in AUTO_MAPS.items():
        file = folder / name
        settings: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else dict(PROCESSOR_CONFIG)
        settings["auto_map"] = {key: f"{CODE_REPOSITORY}--{value}" for key, value in entries.items()}
        write_json(file, dict(sorted(settings.items())))
