"""The rehearsal before step 1: save the model, read it back, and see whether the disk holds what the run will keep."""

import logging
import shutil

from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from phi3v.config import TrainConfig
from phi3v.errors import CapacityError, CheckpointError
from phi3v.model.checkpoint import load_processor, save_model
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.train.checkpoints.store import CheckpointStore
from phi3v.train.checkpoints.weights import require_equal_weights, weights_bytes

logger = logging.getLogger(__name__)

_OPTIMIZER_BYTES_A_NUMBER = 8
"""AdamW's two float32 averages of one trainable number."""


def rehearse_saving(model: PreTrainedModel | PeftModel, processor: Phi3VProcessor, store: CheckpointStore) -> None:
    """Goes through a save and a reload once, so that no run trains for hours and then cannot save.

    Raises:
        CheckpointError: the model cannot be written, or does not read back bit for bit.
    """
    size = weights_bytes(model)
    logger.info("Rehearsing a save and reload (%s) ...", in_words(size))
    folder = store.rehearsal
    try:
        save_model(model, processor, folder)
        require_equal_weights(model, folder)
        load_processor(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: the rehearsal of saving failed: {error}. Choose another output_dir."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require_disk_space(model: PreTrainedModel | PeftModel, store: CheckpointStore, config: TrainConfig) -> None:
    """Checks the free disk space against the largest amount that the run will hold at once.

    Raises:
        CapacityError: says what is needed and what is free.
    """
    weights = weights_bytes(model)
    checkpoint = weights + _OPTIMIZER_BYTES_A_NUMBER * _num_trainable(model)
    num_checkpoints = most_checkpoints(config)
    needed = num_checkpoints * checkpoint + weights
    there = store.size_bytes()
    store.root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(store.root).free
    if needed - there > free:
        raise CapacityError(
            f"{store.root}: the run will hold {num_checkpoints} checkpoints of {in_words(checkpoint)} and a final "
            f"model of {in_words(weights)} at once: {in_words(needed)}, of which {in_words(there)} are there; "
            f"{in_words(free)} are free. Choose an output_dir on another disk, or lower keep_checkpoints."
        )


def most_checkpoints(config: TrainConfig) -> int:
    """Returns the most checkpoints on disk at once: a new one is complete before the oldest is deleted."""
    keeps_best = config.keep_best and config.eval_steps is not None
    if config.save_steps is None:
        # Only new bests are saved, so that the best is the newest.
        return config.keep_checkpoints + 1 if keeps_best else 0
    return config.keep_checkpoints + 1 + keeps_best


def in_words(size: float) -> str:
    """Returns a number of bytes as text, in units of 1000.

    >>> in_words(2_500_000), in_words(12)
    ('2.5 MB', '12 bytes')
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _num_trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
