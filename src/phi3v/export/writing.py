"""A trained model, written in the published layout and compared with what was trained."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..config import RopeMode
from ..errors import CapacityError, CheckpointError
from ..model.checkpoint import DTYPES, base_of, dtype_of_folder, load_model, merge_adapter, save_model
from ..model.placement import resolve_device
from ..model.processing_phi3_v import Phi3VProcessor
from .comparison import Comparison, compare_greedy, near_tie_of, relative_difference, tolerance_of
from .layout import settle_rope_factors, settle_stop_tokens
from .placing import explained_writing
from .readings import (
    GREEDY_TOKENS,
    Readings,
    Samples,
    encode_samples,
    logits_along,
    logits_of,
    read_model,
)
from .rounding import move_within_rounding, names_to_round
from .trained import Trained

SHARD_SIZE = "5GB"
"""Largest weight file: the published model's files are cut at this size."""

Say = Callable[[str], None]
Read = Callable[[Path, Samples, str], Readings]


def write_and_compare(
    trained: Trained,
    processor: Phi3VProcessor,
    folder: Path,
    *,
    samples: Samples,
    dtype: str,
    rope_mode: RopeMode | None = None,
    prepare: Callable[[Path], None] = lambda folder: None,
    read: Read,
    say: Say,
) -> Comparison:
    """Writes a whole model, merging an adapter into its base first, and compares the folder with the trained model.

    The comparison goes in steps, so that rounding cannot hide a fault:

    1. merged == adapter: in float32, before anything is rounded;
    2. the folder, loaded again == the model in memory that was written, in float32 arithmetic;
    3. the folder == the trained model, up to what another rounding of the same weights changes.

    One model is in memory at a time, in float32: 16.6 GB for the published size.

    Args:
        trained: what to write.
        processor: goes into the folder, with its ``num_crops``.
        folder: where to; not there yet.
        samples: what to compare on.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: as the weights are saved (an adapter's base's).
        rope_mode: LongRoPE factors that the folder will lead every loader to; None: as trained.
        prepare: makes the last changes to the folder before it is read.
        read: loads the folder and reads the samples: ``read_folder`` or ``read_in_fresh_process``.
        say: shows progress.

    Raises:
        CheckpointError: a folder is damaged, or cannot be loaded again, or does not match the trained model.
        CapacityError: too little disk space for the weights.
    """
    device = resolve_device("auto")
    encoded = encode_samples(processor, samples)
    say(f"Reading {len(encoded)} samples with the trained model, {trained.folder} ...")
    model: Any = load_model(
        trained.folder, dtype="float32", base=trained.base, rope_mode=trained.rope_mode, device=device
    )
    saved_dtype = DTYPES.get(dtype) or dtype_of_folder(trained.weights_folder)
    _require_disk_space(model, saved_dtype, folder)
    of_trained = read_model(model, processor, encoded)
    along = logits_along(model, encoded, of_trained.greedy)
    effect = merge_difference = None
    written_logits = of_trained.logits
    if isinstance(model, PeftModel):
        say("Merging the adapter into its base ...")
        with model.disable_adapter():
            effect = relative_difference(logits_of(model, encoded), of_trained.logits)
        model = merge_adapter(model, torch.float32)
        written_logits = logits_of(model, encoded)
        merge_difference = relative_difference(written_logits, of_trained.logits)
    rounded = names_to_round(model, saved_dtype)
    model = model.to(saved_dtype)
    model.config.dtype = saved_dtype
    written_mode = rope_mode or trained.rope_mode
    settle_stop_tokens(model, processor)
    settle_rope_factors(model, written_mode)
    say(f"Writing {_name(saved_dtype)} weights ...")
    with explained_writing(folder):
        save_model(model, processor, folder, max_shard_size=SHARD_SIZE)
        prepare(folder)
    noise = torch.zeros(1)
    if rounded:
        say("Measuring what rounding does to this model ...")
        model = model.to(torch.float32)
        written_logits = logits_of(model, encoded)
        move_within_rounding(model, rounded, saved_dtype)
        noise = logits_of(model, encoded) - written_logits
    del model
    if device == "cuda":
        torch.cuda.empty_cache()  # another process may be about to load the model

    say("Loading what was written and comparing ...")
    of_written = read(folder, samples, device)
    rounding_difference = float(noise.norm() / of_trained.logits.norm())
    rounding_max = float(noise.abs().max())
    comparison = Comparison(
        dtype=_name(saved_dtype),
        trained_rope_mode=trained.rope_mode,
        written_rope_mode=written_mode,
        num_samples=len(encoded),
        num_logits=of_trained.logits.shape[0],
        same_inputs=of_written.digests == of_trained.digests,
        merge_difference=merge_difference,
        reload_difference=_difference(of_written.logits, written_logits),
        relative_difference=_difference(of_written.logits, of_trained.logits),
        max_logit_difference=_largest(of_written.logits, of_trained.logits),
        rounded_tensors=len(rounded),
        rounding_difference=rounding_difference,
        rounding_max_logit=rounding_max,
        tolerance=tolerance_of(saved_dtype, rounding_difference, len(rounded)),
        adapter_effect=effect,
        same_top_token=_agreement(of_written.logits, of_trained.logits),
        greedy=compare_greedy(
            of_trained.greedy,
            of_written.greedy,
            along,
            stop_token_ids=processor.stop_token_ids,
            max_new_tokens=GREEDY_TOKENS,
            near_tie=near_tie_of(of_trained.logits, rounding_max),
        ),
    )
    if problems := comparison.problems():
        raise CheckpointError(
            f"what was written does not answer as {trained.folder} does and was removed: {' '.join(problems)} "
            f"({comparison})"
        )
    return comparison


def _require_disk_space(model: Any, dtype: torch.dtype, folder: Path) -> None:
    """Checks the free disk space against the weights that are about to be written.

    Raises:
        CapacityError: says what is needed and what is free.
    """
    needed = base_of(model).config.dims.num_parameters * dtype.itemsize
    there = next(parent for parent in folder.resolve().parents if parent.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise CapacityError(
            f"{folder.name}: {_name(dtype)} weights take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "choose an output folder on another disk"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _difference(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """As ``relative_difference``; not a number where the two were not asked the same."""
    return relative_difference(logits, reference) if logits.shape == reference.shape else float("nan")


def _largest(logits: torch.Tensor, reference: torch.Tensor) -> float:
    return float((logits - reference).abs().max()) if logits.shape == reference.shape else float("nan")


def _agreement(logits: torch.Tensor, reference: torch.Tensor) -> float:
    if logits.shape != reference.shape:
        return float("nan")
    return float((logits.argmax(-1) == reference.argmax(-1)).float().mean())
