"""Encoded samples to one batch: exactly what the model's forward takes, nothing else."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch.utils.data import default_collate

from .encode import IGNORED_LABEL, Encoded


class Collator:
    """Pads encoded samples to one length and their images to one number of crops.

    Args:
        pad_token_id: fills ``input_ids``. It may be a token that samples also hold: the mask comes from lengths.
        padding_side: ``right`` for training; ``left`` for generation, where every prompt must end at the last position.
        loss_weighting: ``sample_mean`` weighs each supervised token by 1 / (supervised tokens of its sample), so that
            the summed loss is a sum of sample means; ``token_mean`` weighs each by 1.
    """

    def __init__(
        self,
        pad_token_id: int,
        padding_side: Literal["right", "left"] = "right",
        loss_weighting: Literal["sample_mean", "token_mean"] = "sample_mean",
    ) -> None:
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side is {padding_side!r}, must be right or left")
        if loss_weighting not in ("sample_mean", "token_mean"):
            raise ValueError(f"loss_weighting is {loss_weighting!r}, must be sample_mean or token_mean")
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side
        self.loss_weighting = loss_weighting

    def __call__(self, samples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """Collates B samples, whose longest has L positions.

        Returns:
            ``input_ids``: (B, L) int64. ``attention_mask``: (B, L) int64, 1 at a sample's own positions.
            With labels in: ``labels``: (B, L) int64, and ``loss_weights``: (B, L) float32, 0 where the label is
            ignored; both unshifted: entry j is about predicting token j.
            With images in: ``pixel_values``: (N, C, 3, crop_px, crop_px) float32 and ``image_sizes``: (N, 2) int64,
            all images of the first sample, then all of the second, and so on; C is the most crops of any of them.

        Raises:
            ValueError: no samples, or labels in some of them only.
        """
        if not samples:
            raise ValueError("a batch needs at least one sample")
        labels = [sample["labels"] for sample in samples if "labels" in sample]
        if labels and len(labels) < len(samples):
            raise ValueError("some samples have labels and some have none: collate prompts and training samples apart")
        ids = [sample["input_ids"] for sample in samples]
        batch = {
            "input_ids": self._pad(ids, self.pad_token_id),
            "attention_mask": self._pad([torch.ones_like(row) for row in ids], 0),
        }
        if labels:
            batch["labels"] = self._pad(labels, IGNORED_LABEL)
            batch["loss_weights"] = self._pad([self._weights(row) for row in labels], 0)
        pixel_values = [sample["pixel_values"] for sample in samples if "pixel_values" in sample]
        if pixel_values:
            batch["pixel_values"] = _stack_crops(pixel_values)
            batch["image_sizes"] = torch.cat([sample["image_sizes"] for sample in samples if "image_sizes" in sample])
        return batch

    def _pad(self, rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            list(rows), batch_first=True, padding_value=value, padding_side=self.padding_side
        )

    def _weights(self, labels: torch.Tensor) -> torch.Tensor:
        """Returns one sample's loss weights, (L,) float32."""
        is_supervised = (labels != IGNORED_LABEL).to(torch.float32)
        if self.loss_weighting == "token_mean":
            return is_supervised
        return is_supervised / is_supervised.sum().clamp(min=1)


def _stack_crops(pixel_values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stacks the images of several samples, zero crops filling up to the most crops of any."""
    most = max(images.shape[1] for images in pixel_values)
    blank = torch.zeros_like(pixel_values[0][0, 0])
    crops = [crop for images in pixel_values for image in images for crop in (*image, *[blank] * (most - len(image)))]
    # In a loader's worker this writes to memory shared with the main process: no second copy on the way out.
    return default_collate(crops).view(-1, most, *blank.shape)
