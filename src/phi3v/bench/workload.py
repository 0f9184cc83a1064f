"""Samples of random content in the real layout, packed into the micro-batches of optimizer steps."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from phi3v.bench.options import ANSWER_TOKENS, BenchOptions
from phi3v.data.collate import PackCollator, PackSample
from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import IGNORED_LABEL, EncodedText, Lengths, SampleEncoder, Stem
from phi3v.data.packing import Budget, CostRecorder, MicroBatch, Packing, SampleCosts, plan_window
from phi3v.errors import ConfigError
from phi3v.flops import Work
from phi3v.geometry import hd_layout, num_image_tokens
from phi3v.model.checkpoint import load_processor
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.packed import PackedBatch

PAGE_PX = (1100, 850)
"""(h, w) px of the page that drawn samples show: a letter page at 100 dpi."""

BOS_ID, FIRST_TEXT_ID, LAST_TEXT_ID = 1, 3, 32_000
"""``<s>``, and the range of the ids that text is drawn from, the last one excluded: the published tokenizer's."""

STEM_FRAME = 3
"""Positions in front of a drawn sample's image: ``<s>``, ``<|user|>``, a new line."""

NUM_DIFFERENT_PAGES = 4
"""Pages of random pixels that are drawn; more would cost memory and change no timing."""


def draw_samples(options: BenchOptions, config: Phi3VConfig, count: int) -> list[PackSample]:
    """Draws ``count`` samples, question by question, page after page.

    Page number p has ``round((p + 1) q) - round(p q)`` questions for q = ``options.questions_per_image``.
    """
    grid = hd_layout(*PAGE_PX, num_crops=options.num_crops, crop_px=config.crop_px).grid
    image = torch.full((num_image_tokens(grid, config.tokens_per_side),), config.image_token_id)
    last_id = min(LAST_TEXT_ID, config.vocab_size, config.image_token_id)
    dice = torch.Generator().manual_seed(options.seed)

    def words(length: int) -> torch.Tensor:
        return torch.randint(FIRST_TEXT_ID, last_id, (length,), generator=dice)

    bos = torch.tensor([BOS_ID])
    beginning = torch.cat([bos, words(STEM_FRAME - 1), image])
    stem = Stem(len(beginning), 1, crops_of(grid), digest=b"page")
    shortest, longest = -(-options.text_tokens * 5 // 8), options.text_tokens * 11 // 8
    samples: list[PackSample] = []
    page = 0
    while len(samples) < count:
        for _ in range(min(round((page + 1) * options.questions_per_image), count) - len(samples)):
            length = int(torch.randint(shortest, longest + 1, (), generator=dice)) - STEM_FRAME
            ids = torch.cat([beginning, bos, words(length - 1)])
            labels = torch.full_like(ids, IGNORED_LABEL)
            labels[-ANSWER_TOKENS:] = ids[-ANSWER_TOKENS:]
            samples.append(PackSample(EncodedText(ids, labels, (grid,), (0,), stem), (f"page {page}",)))
        page += 1
    return samples


def read_samples(options: BenchOptions, config: Phi3VConfig, count: int) -> list[PackSample]:
    """Reads the first ``count`` samples of ``options.data``, fewer if it has fewer: lengths and images' shapes.

    Ids are mapped into the model's vocabulary, and pixels will be random.

    Raises:
        ConfigError: the tokenizer's folder is of a model with other image sizes.
        DataError: a file or sample that training would refuse.
    """
    assert options.data is not None and options.tokenizer is not None
    processor = load_processor(options.tokenizer, num_crops=options.num_crops)
    if processor.image_processor.tokens_per_side != config.tokens_per_side:
        raise ConfigError(
            f"--tokenizer {options.tokenizer} gives {processor.image_processor.tokens_per_side} image tokens along a "
            f"crop's edge, the measured model {config.tokens_per_side}"
        )
    encoder = SampleEncoder(processor)
    dataset = ConversationDataset([Path(options.data)])
    num_words = min(LAST_TEXT_ID, config.vocab_size, config.image_token_id) - FIRST_TEXT_ID
    samples = []
    for sample in (dataset[index] for index in range(min(count, len(dataset)))):
        text = encoder.encode_text(sample, dataset.image_sizes(sample))
        words = FIRST_TEXT_ID + text.input_ids % num_words
        ids = torch.where(text.input_ids == processor.image_token_id, config.image_token_id, words)
        labels = torch.where(text.labels == IGNORED_LABEL, IGNORED_LABEL, ids)
        names = [sample.images[index] for index in text.order]
        keys = tuple(encoder.image_key(sample, dataset.image_path(sample, name)) for name in names)
        samples.append(PackSample(text._replace(input_ids=ids, labels=labels), keys))
    return samples


class Workload:
    """Optimizer steps' worth of micro-batches; equal arguments give equal ones.

    Args:
        samples: what the windows are made of, in turn.
        config: the model's.
        batch_size: samples of a window.
        budget: what a micro-batch may hold.
        shared_questions: most samples on one stem.
        seed: of the pixels.
        feature_dtype: number format of image rows that are at hand instead of crops; None: crops.
        alignment: as ``PackCollator``'s.
        rank: which process this is, 0-based.
        num_ranks: processes that share each window.
    """

    def __init__(
        self,
        samples: Sequence[PackSample],
        config: Phi3VConfig,
        *,
        batch_size: int,
        budget: Budget,
        shared_questions: int,
        seed: int,
        feature_dtype: torch.dtype | None = None,
        alignment: int = 1,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.samples = samples
        self._rank = rank
        self.batch_size = batch_size
        self._tokens_per_side = config.tokens_per_side
        short_positions = config.original_max_position_embeddings
        self._packing = Packing(budget, shared_questions, short_positions=short_positions, num_ranks=num_ranks)
        self._costs = costs_of(samples)
        self._collator = PackCollator(
            config.image_token_id,
            tokens_per_side=config.tokens_per_side,
            short_positions=short_positions,
            alignment=alignment,
        )
        self._has_features = feature_dtype is not None
        dice = torch.Generator().manual_seed(seed)
        grids = {grid for sample in samples for grid in sample.text.grids}
        if feature_dtype is None:
            size = (max(map(crops_of, grids), default=0), 3, config.crop_px, config.crop_px)
        else:
            size = (max(map(self._rows_of, grids), default=0), config.hidden_size)
        pages = [torch.randn(size, generator=dice).to(feature_dtype) for _ in range(NUM_DIFFERENT_PAGES)]
        # By image, not by place in a micro-batch: processes that share a window show what one process would.
        keys = dict.fromkeys(key for sample in samples for key in sample.image_keys)
        self._page_of = {key: pages[number % NUM_DIFFERENT_PAGES] for number, key in enumerate(keys)}

    def plan(self, step: int) -> list[MicroBatch]:
        """Cuts the window of an optimizer step (0-based) into micro-batches; returns this process's."""
        first = step * self.batch_size
        window = [number % len(self.samples) for number in range(first, first + self.batch_size)]
        return plan_window(self._costs, window, self._packing)[self._rank]

    def pack(self, planned: MicroBatch) -> PackedBatch:
        """Makes the batch that the model takes."""
        groups = [[self.samples[index] for index in group] for group in planned.groups]
        grids = {
            key: grid
            for group in groups
            for sample in group
            for key, grid in zip(sample.image_keys, sample.text.grids, strict=True)
        }
        if not self._has_features:
            crops = {key: self._page_of[key][: crops_of(grid)] for key, grid in grids.items()}
            return self._collator(groups, crops)
        empty = {key: torch.empty(crops_of(grid), 0) for key, grid in grids.items()}
        batch = self._collator(groups, empty)
        rows = [
            self._page_of[key][: self._rows_of(grid)] for key, grid in zip(batch.image_keys, batch.grids, strict=True)
        ]
        return replace(batch, crops=None, grids=(), image_keys=(), features=torch.cat(rows) if rows else None)

    def _rows_of(self, grid: tuple[int, int]) -> int:
        return num_image_tokens(grid, self._tokens_per_side)


def costs_of(samples: Sequence[PackSample]) -> SampleCosts:
    """Returns what planning needs to know of the samples."""
    recorder = CostRecorder()
    for text, keys, _ in samples:
        supervised = int((text.labels[1:] != IGNORED_LABEL).sum())
        lengths = Lengths(len(text.input_ids), supervised, sum(map(crops_of, text.grids)), False, text.stem)
        recorder.add(lengths, [Path(key) for key in keys])
    return recorder.costs()


def work_of(batch: PackedBatch, tokens_per_side: int) -> Work:
    """Returns what has to be computed for a batch."""
    has_crops = batch.crops is not None
    return Work(
        stems=batch.layout.stems,
        wholes=batch.layout.wholes,
        branches=batch.layout.branches,
        crops=len(batch.crops) if batch.crops is not None else 0,
        image_rows=sum(num_image_tokens(grid, tokens_per_side) for grid in batch.grids) if has_crops else 0,
        targets=len(batch.target_positions),
    )


def crops_of(grid: tuple[int, int]) -> int:
    """Counts the crops of an image: its tiles and the global view."""
    return grid[0] * grid[1] + 1
