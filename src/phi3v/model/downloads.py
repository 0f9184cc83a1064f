"""Adapters that are given as hub ids."""

from pathlib import Path

from huggingface_hub import snapshot_download
from transformers.utils.hub import cached_file

from .folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, as_checkpoint_error, is_hub_id

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def local_folder(model: str | Path) -> str:
    """Returns the folder of an adapter that is given as hub id, downloaded; whatever else is given comes back as it is.

    Only the adapter's and the processor's files are fetched: whole models lie beside some adapters. What the hub's
    cache holds already is not fetched again.

    Raises:
        CheckpointError: the download failed.
    """
    name = str(model)
    if not is_hub_id(name):
        return name
    with as_checkpoint_error(f"model {name}"):
        if cached_file(name, ADAPTER_CONFIG, _raise_exceptions_for_missing_entries=False) is None:
            return name
        return snapshot_download(name, allow_patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS, *PROCESSOR_FILES])
