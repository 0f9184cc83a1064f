"""Merging an adapter into its base, called done only after the merged folder answers as the adapter does."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ..data.dataset import ConversationDataset
from ..data.encode import SampleEncoder
from ..errors import CheckpointError, ConfigError
from ..model.checkpoint import (
    DTYPES,
    base_of_adapter,
    dtype_of_folder,
    is_adapter,
    load_model,
    load_processor,
    merge_adapter,
    save_model,
)
from ..model.placement import resolve_device

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest accepted relative difference of the answers' logits, by the merged folder's number format: the merge rounds
every adapted weight once, by up to 2^-24, 2^-11 and 2^-8 of itself, and the layers add that up."""

MOST_OF_THE_EFFECT = 0.5
"""A merge whose logits are farther from the adapter's than this share of what the adapter changes has lost it."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge was compared on and how close it came.

    Attributes:
        output_dir: the merged folder.
        dtype: its number format.
        num_samples: real samples compared.
        num_logits: supervised positions compared.
        relative_difference: ``||merged - adapter|| / ||adapter||`` of the logits there.
        max_logit_difference: the largest single difference.
        tolerance: limit of ``relative_difference``.
        adapter_effect: ``||base - adapter|| / ||adapter||``: what the adapter changes.
        same_top_token: share of positions where both predict the same token.
    """

    output_dir: Path
    dtype: str
    num_samples: int
    num_logits: int
    relative_difference: float
    max_logit_difference: float
    tolerance: float
    adapter_effect: float
    same_top_token: float

    def __str__(self) -> str:
        return (
            f"merged into {self.output_dir} ({self.dtype}); reloaded and compared with the adapter model on "
            f"{self.num_samples} samples, {self.num_logits} positions: relative difference "
            f"{self.relative_difference:.1e} (limit {self.tolerance:.0e}; the adapter itself changes "
            f"{self.adapter_effect:.1e}), same top token at {self.same_top_token:.1%}"
        )


def merge_and_verify(
    adapter: Path,
    output_dir: Path,
    *,
    base: str | None = None,
    data: Sequence[Path] = (),
    image_dir: Path | None = None,
    num_samples: int = 4,
    dtype: str = "auto",
) -> MergeReport:
    """Merges, saves, reloads and compares; a folder that does not pass is removed again.

    The base is the unquantised one, also for an adapter that was trained on it in 4 bit. The sum is formed in float32
    and rounded once to ``dtype``. Both sides compute in float32, so that the difference is the merge's own. One model
    is in memory at a time: 16.6 GB for the published size.

    Args:
        adapter: a PEFT adapter folder, such as ``RUN/model``.
        output_dir: must not exist, or be empty.
        base: the base model, where it is not where the adapter says.
        data: JSONL files to take the samples from; default: the data of the run that the adapter lies in.
        image_dir: their image folder.
        num_samples: how many, from the first.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: the base's own.

    Raises:
        CheckpointError: not an adapter, or the merged folder does not match it.
        ConfigError: no data to compare on, or ``output_dir`` is in use.
    """
    if not is_adapter(adapter):
        raise CheckpointError(
            f"{adapter}: holds no adapter_config.json; merge takes an adapter folder such as RUN/model"
        )
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ConfigError(f"{output_dir} is not empty; give another output folder")
    base_path = base or base_of_adapter(adapter)
    files, image_dir = (list(data), image_dir) if data else _data_of_run(adapter)
    processor = load_processor(adapter)
    batches = _batches(processor, ConversationDataset(files, image_dir), num_samples)
    device = resolve_device("auto")

    model: Any = load_model(adapter, dtype="float32", base=base_path, device=device)
    of_adapter = _logits(model, batches)
    with model.disable_adapter():
        of_base = _logits(model, batches)
    saved_dtype = DTYPES.get(dtype) or dtype_of_folder(base_path)
    merged = merge_adapter(model, saved_dtype)
    save_model(merged, processor, output_dir)
    del model, merged

    of_merged = _logits(load_model(output_dir, dtype="float32", device=device), batches)
    scale = of_adapter.norm()
    report = MergeReport(
        output_dir=output_dir,
        dtype=str(saved_dtype).removeprefix("torch."),
        num_samples=len(batches),
        num_logits=of_adapter.shape[0],
        relative_difference=float((of_merged - of_adapter).norm() / scale),
        max_logit_difference=float((of_merged - of_adapter).abs().max()),
        tolerance=TOLERANCE[saved_dtype],
        adapter_effect=float((of_base - of_adapter).norm() / scale),
        same_top_token=float((of_merged.argmax(-1) == of_adapter.argmax(-1)).float().mean()),
    )
    _refuse_mismatch(report, output_dir)
    return report


def _refuse_mismatch(report: MergeReport, output_dir: Path) -> None:
    """Removes the merged folder and says why, unless it matches its adapter."""
    is_close = report.relative_difference <= report.tolerance
    is_lost = report.relative_difference > MOST_OF_THE_EFFECT * report.adapter_effect
    # An adapter that changes less than the number format can hold cannot be told from its base in that format.
    is_too_small_to_tell = report.relative_difference <= TOLERANCE[torch.float32]
    if is_close and (not is_lost or is_too_small_to_tell):
        return
    shutil.rmtree(output_dir)
    raise CheckpointError(
        f"the merged model does not answer as the adapter does and was removed. {report}. "
        + (
            "The adapter's effect is lost in the rounding of this number format: merge with --dtype float32."
            if is_close
            else "Check that --base is the model the adapter was trained on. Rounding to a 16-bit format may be too "
            "coarse for this adapter: merge with --dtype float32."
        )
    )


def _data_of_run(adapter: Path) -> tuple[list[Path], Path | None]:
    """Finds the data of the run that an adapter folder ``RUN/model`` belongs to."""
    config_file = adapter.resolve().parent / "config.yaml"
    if not config_file.is_file():
        raise ConfigError(
            f"{adapter} does not lie in a run directory; name real samples to compare on with --data FILE.jsonl"
        )
    settings = yaml.safe_load(config_file.read_text("utf-8"))
    files = settings.get("eval_data") or settings["train_data"]
    image_dir = settings.get("image_dir")
    return [Path(file) for file in files], Path(image_dir) if image_dir else None


def _batches(processor: Any, dataset: ConversationDataset, num_samples: int) -> list[dict[str, torch.Tensor]]:
    """Encodes the first samples, one a batch; ``logits_to_keep`` marks the positions that predict an answer token."""
    encoder = SampleEncoder(processor)
    batches = []
    for index in range(min(num_samples, len(dataset))):
        sample = dataset[index]
        encoded = encoder.encode(sample, dataset.load_images(sample))
        labels = encoded.pop("labels")
        predicting = (labels[1:] != -100).nonzero()[:, 0]
        batches.append({**encoded, "input_ids": encoded["input_ids"][None], "logits_to_keep": predicting})
    return batches


@torch.inference_mode()
def _logits(model: Any, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Returns the logits that predict answer tokens: (positions of all batches, vocab_size) float32."""
    device = next(model.parameters()).device
    rows = [model(**{key: value.to(device) for key, value in batch.items()}).logits[0] for batch in batches]
    return torch.cat(rows).float().cpu()
