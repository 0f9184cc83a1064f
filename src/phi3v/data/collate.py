"""Encoded samples to one batch: exactly what the model's forward takes, nothing else."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch.utils.data import default_collate

from ..geometry import num_image_tokens
from ..model.packed import PackedBatch, PackLayout, aligned_lengths
from .encode import IGNORED_LABEL, EncodedText

LossWeighting = Literal["sample_mean", "token_mean"]


class PackSample(NamedTuple):
    """A training sample on its way into a row.

    Attributes:
        text: its ids and labels.
        image_keys: names of its images, in text order; equal names are equal pixels.
        counts: False for a filler, whose loss weighs nothing.
    """

    text: EncodedText
    image_keys: tuple[str, ...]
    counts: bool = True


class PackCollator:
    """Puts samples into one row without padding; samples of a group that begin alike share their beginning.

    On a GPU whose attention is faster over pieces of one length, wholes of nearly one length are filled up to it behind
    their last token, where nothing sees the filling and nothing is supervised.

    Args:
        image_token_id: stands at every position of an image.
        tokens_per_side: image tokens along a crop's edge.
        short_positions: longest sequence that the short LongRoPE factors reach.
        loss_weighting: ``sample_mean`` weighs each supervised token by 1 / (supervised tokens of its sample), so that
            the summed loss is a sum of sample means; ``token_mean`` weighs each by 1.
        alignment: wholes of nearly one length are filled up to a multiple of this; 1: none is.
    """

    def __init__(
        self,
        image_token_id: int,
        *,
        tokens_per_side: int,
        short_positions: int,
        loss_weighting: LossWeighting = "sample_mean",
        alignment: int = 1,
    ) -> None:
        if loss_weighting not in ("sample_mean", "token_mean"):
            raise ValueError(f"loss_weighting is {loss_weighting!r}, must be sample_mean or token_mean")
        self.image_token_id = image_token_id
        self.tokens_per_side = tokens_per_side
        self.short_positions = short_positions
        self.loss_weighting = loss_weighting
        self.alignment = alignment

    def __call__(
        self,
        groups: Sequence[Sequence[PackSample]],
        crops: Mapping[str, torch.Tensor],
        features: Mapping[str, torch.Tensor] | None = None,
    ) -> PackedBatch:
        """Packs groups of samples; a group of one shares nothing.

        Args:
            groups: samples; those of a group share their stem as far as they really begin alike.
            crops: (crops, 3, crop_px, crop_px) float32 of every image to compute, by its name; global view first.
            features: (rows, hidden_size) of every image whose rows are at hand, by its name.
        """
        stems: list[tuple[PackSample, list[PackSample]]] = []
        wholes: list[PackSample] = []
        for group in groups:
            for alike in self._begin_alike(group):
                if len(alike) > 1:
                    stems.append((alike[0], alike))
                else:
                    wholes += alike
        samples = [*wholes, *(sample for _, branches in stems for sample in branches)]
        grids = {
            key: grid for sample in samples for key, grid in zip(sample.image_keys, sample.text.grids, strict=True)
        }
        computed = [key for key in grids if key in crops]
        known = [key for key in grids if key not in crops]
        counts = [num_image_tokens(grids[key], self.tokens_per_side) for key in (*computed, *known)]
        ends = list(accumulate(counts))
        rows = {
            key: torch.arange(end - count, end)
            for key, count, end in zip((*computed, *known), counts, ends, strict=True)
        }
        row = _Row(self, rows)
        for first, _ in stems:
            row.add(first, end=first.text.stem.tokens)
        aligned = aligned_lengths([len(sample.text.input_ids) for sample in wholes], self.alignment)
        for sample, length in zip(wholes, aligned, strict=True):
            row.add(sample)
            row.fill(length - len(sample.text.input_ids))
        for first, branches in stems:
            for sample in branches:
                row.add(sample, start=first.text.stem.tokens)
        counted = [sample for sample in samples if sample.counts]
        return PackedBatch(
            layout=PackLayout(
                stems=tuple(first.text.stem.tokens for first, _ in stems),
                wholes=tuple(aligned),
                branches=tuple(
                    tuple(len(sample.text.input_ids) - first.text.stem.tokens for sample in branches)
                    for first, branches in stems
                ),
            ),
            input_ids=torch.cat(row.input_ids),
            position_ids=torch.cat(row.position_ids),
            is_long=torch.cat(row.is_long),
            target_positions=torch.cat(row.target_positions),
            target_ids=torch.cat(row.target_ids),
            target_weights=torch.cat(row.target_weights),
            image_positions=torch.cat(row.image_positions),
            image_rows=torch.cat(row.image_rows),
            crops=self.stack_crops([crops[key] for key in computed]) if computed else None,
            grids=tuple(grids[key] for key in computed),
            features=torch.cat([features[key] for key in known]) if features and known else None,
            image_keys=tuple(computed),
            num_samples=len(counted),
            num_positions=sum(len(sample.text.input_ids) for sample in counted),
        )

    def stack_crops(self, crops: Sequence[torch.Tensor]) -> torch.Tensor:
        """Puts the crops of several images, (n, 3, crop_px, crop_px) each, behind each other."""
        # In a loader's worker this writes to memory shared with the main process: no second copy on the way out.
        return default_collate([crop for image in crops for crop in image])

    def _begin_alike(self, group: Sequence[PackSample]) -> Iterable[list[PackSample]]:
        """Sorts a group by what is really equal: what planned it compared hashes."""
        alike: dict[object, list[PackSample]] = {}
        for number, sample in enumerate(group):
            stem = sample.text.stem
            is_long = len(sample.text.input_ids) > self.short_positions
            beginning = (sample.text.input_ids[: stem.tokens].numpy().tobytes(), sample.image_keys[: stem.images])
            alike.setdefault((*beginning, is_long) if stem.tokens else number, []).append(sample)
        return alike.values()


class _Row:
    """The tensors of a row, piece after piece."""

    def __init__(self, collator: PackCollator, rows_of_images: Mapping[str, torch.Tensor]) -> None:
        self._collator = collator
        self._rows_of_images = rows_of_images
        self._length = 0
        self.input_ids: list[torch.Tensor] = []
        self.position_ids: list[torch.Tensor] = []
        self.is_long: list[torch.Tensor] = []
        self.target_positions: list[torch.Tensor] = []
        self.target_ids: list[torch.Tensor] = []
        self.target_weights: list[torch.Tensor] = []
        self.image_positions: list[torch.Tensor] = []
        self.image_rows: list[torch.Tensor] = []

    def add(self, sample: PackSample, start: int = 0, end: int | None = None) -> None:
        """Adds the positions ``start`` to ``end`` of a sample; a stem, which has an ``end``, is never supervised."""
        ids, labels = sample.text.input_ids, sample.text.labels
        shift = self._length - start
        end = len(ids) if end is None else end
        self.input_ids.append(ids[start:end])
        self.position_ids.append(torch.arange(start, end))
        self.is_long.append(torch.full((end - start,), len(ids) > self._collator.short_positions))
        is_supervised = labels[1:] != IGNORED_LABEL
        positions = is_supervised.nonzero()[:, 0]
        own = positions[(positions >= start) & (positions < end)]
        assert len(own) == (0 if end < len(ids) else len(positions)), "a stem is followed by part of its question"
        self.target_positions.append(own + shift)
        self.target_ids.append(labels[own + 1])
        self.target_weights.append(torch.full((len(own),), self._weight(sample, len(positions))))
        is_image = (ids == self._collator.image_token_id).nonzero()[:, 0]
        inside = (is_image >= start) & (is_image < end)
        self.image_positions.append(is_image[inside] + shift)
        rows = [self._rows_of_images[key] for key in sample.image_keys]
        self.image_rows.append(torch.cat(rows)[inside] if rows else is_image)
        self._length += end - start

    def fill(self, num_positions: int) -> None:
        """Lengthens the piece added last by positions that nothing reads: it is causal, and no target is among them."""
        if num_positions:
            self.input_ids.append(self.input_ids[-1][-1:].expand(num_positions))
            self.position_ids.append(torch.arange(num_positions) + self.position_ids[-1][-1] + 1)
            self.is_long.append(self.is_long[-1][-1:].expand(num_positions))
            self._length += num_positions

    def _weight(self, sample: PackSample, num_supervised: int) -> float:
        if not sample.counts:
            return 0.0
        return 1.0 if self._collator.loss_weighting == "token_mean" else 1.0 / max(1, num_supervised)
