"""What each optimizer step trains on: a pure function of the epoch's order and the samples' costs.

An optimizer step consumes one *window* of ``batch_size`` samples, cut into micro-batches that the ranks share. Nothing
here reads a global random state, the number of workers or what another process does, so a resumed run and a run split
another way see the same windows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.utils.data import DataLoader, Dataset

from phi3v.data.collate import PackCollator, PackSample
from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import SampleEncoder
from phi3v.data.packing import MicroBatch, Packing, SampleCosts, plan_window
from phi3v.data.processes import leave_signals_to_parent
from phi3v.data.schema import Sample
from phi3v.model.packed import PackedBatch
from phi3v.train.faults import DeadWorkerError
from phi3v.train.feature_cache import FeatureCache
from phi3v.train.order import EpochOrder

REMEMBERED_PLANS = 32
"""Steps whose plans are kept: as many as a loader is ahead."""


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """One optimizer step.

    Attributes:
        micro_batches: this rank's.
        samples: of the window, over all ranks, as are the following.
        supervised: positions that the loss counts.
        tokens: decoder positions that the samples have separately.
        computed_tokens: decoder positions that are computed for them: shared beginnings once.
    """

    micro_batches: tuple[MicroBatch, ...]
    samples: int
    supervised: int
    tokens: int
    computed_tokens: int


class Windows:
    """The windows of a run, by their optimizer step.

    The last window of an epoch may be smaller: it is kept, as a smaller batch.

    Args:
        order: what each epoch draws.
        costs: of the samples that it draws from.
        batch_size: samples in a window, over all ranks.
        packing: how a window is cut into micro-batches.
        rank: this process, 0-based.

    >>> import numpy as np
    >>> from phi3v.data.packing import Budget
    >>> from phi3v.train.order import Shuffled
    >>> nothing, keys = np.zeros(5, np.int32), np.zeros(5, np.uint64)
    >>> costs = SampleCosts(nothing + 10, nothing + 1, nothing, nothing, nothing, keys)
    >>> windows = Windows(Shuffled(5, seed=0), costs, batch_size=4, packing=Packing(Budget(tokens=20)))
    >>> len(windows), [[len(batch.groups) for batch in windows.plan(step).micro_batches] for step in range(2)]
    (2, [[2, 2], [1]])
    """

    def __init__(
        self, order: EpochOrder, costs: SampleCosts, *, batch_size: int, packing: Packing, rank: int = 0
    ) -> None:
        self.order = order
        self.costs = costs
        self.batch_size = batch_size
        self.packing = packing
        self.rank = rank
        # A loader reads ahead, over the end of an epoch too: two orders are in use at a time, and several plans, each
        # of which is asked for again when its step begins and when its micro-batches are fetched.
        self._order_of = lru_cache(maxsize=2)(order.of)
        self._plan_of = lru_cache(maxsize=REMEMBERED_PLANS)(self._plan)

    def __len__(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-len(self.order) // self.batch_size)

    def window(self, step: int) -> list[int]:
        """Returns the dataset positions that optimizer step ``step`` (0-based, over the whole run) trains on."""
        epoch, number = divmod(step, len(self))
        start = number * self.batch_size
        return self._order_of(epoch)[start : start + self.batch_size].tolist()

    def plan(self, step: int) -> WindowPlan:
        """Returns how optimizer step ``step`` is computed."""
        return self._plan_of(step)

    def _plan(self, step: int) -> WindowPlan:
        window = self.window(step)
        ranks = plan_window(self.costs, window, self.packing)
        return WindowPlan(
            micro_batches=tuple(ranks[self.rank]),
            samples=len(window),
            supervised=int(self.costs.supervised[window].sum()),
            tokens=int(self.costs.tokens[window].sum()),
            computed_tokens=sum(batch.load.tokens for rank in ranks for batch in rank if batch.counts),
        )


class TrainingSamples(Dataset[PackedBatch]):
    """Micro-batches by their plan: opens and cuts each different image once, tokenizes and packs; in a loader's worker.

    Args:
        dataset: the conversations.
        encoder: turns a sample and its images into tensors.
        collator: packs them.
        cache: has the rows of images that need not be computed again; None: there is none.
    """

    def __init__(
        self,
        dataset: ConversationDataset,
        encoder: SampleEncoder,
        collator: PackCollator,
        cache: FeatureCache | None = None,
    ) -> None:
        self.dataset = dataset
        self.encoder = encoder
        self.collator = collator
        self.cache = cache

    def __getitem__(self, batch: MicroBatch) -> PackedBatch:
        images = _Images(self)
        groups: list[list[PackSample]] = []
        for indices in batch.groups:
            groups.append([])
            for sample in map(self.dataset.__getitem__, indices):
                keys = [images.take_in(sample, name) for name in sample.images]
                text = self.encoder.encode_text(sample, [images.sizes[key] for key in keys])
                groups[-1].append(PackSample(text, tuple(keys[index] for index in text.order), batch.counts))
        return self.collator(groups, images.crops, images.features)


class _Images:
    """The different images of a micro-batch, each opened once.

    Attributes:
        sizes: (h, w) px, by name.
        crops: crops of those that the model is to compute, by name.
        features: rows of the others, by name.
    """

    def __init__(self, samples: TrainingSamples) -> None:
        self._samples = samples
        self._names: dict[str, str] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        self.crops: dict[str, torch.Tensor] = {}
        self.features: dict[str, torch.Tensor] = {}

    def take_in(self, sample: Sample, name: str) -> str:
        """Takes in an image of a sample; returns its name in the batch."""
        dataset, encoder, cache = self._samples.dataset, self._samples.encoder, self._samples.cache
        path = dataset.image_path(sample, name)
        seen = encoder.image_key(sample, path)
        if seen in self._names:
            return self._names[seen]
        key = self._names[seen] = seen if cache is None else cache.key_of(path, encoder.num_crops(sample))
        if key in self.sizes:
            return key
        if cache is not None:
            size = dataset.image_size(sample, name)
            rows = cache.find(key, encoder.num_image_tokens(sample, size))
            if rows is not None:
                self.sizes[key], self.features[key] = size, rows
                return key
        image = dataset.load_image(sample, name)
        self.sizes[key] = image.height, image.width
        self.crops[key] = encoder.cut(sample, image)
        return key


class WindowReader:
    """Makes the micro-batches of one optimizer step after the other, and reads ahead with workers.

    Args:
        windows: what each step trains on.
        samples: makes a micro-batch.
        num_workers: processes that do; 0: this one, when a micro-batch is asked for.
        pin_memory: put micro-batches into page-locked memory, from where a GPU fetches them without waiting.
    """

    def __init__(self, windows: Windows, samples: TrainingSamples, *, num_workers: int, pin_memory: bool) -> None:
        self._windows = windows
        self._samples = samples
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._micro_batches: Iterator[PackedBatch] | None = None
        self._next_step = -1

    def read(self, step: int, num_steps: int) -> Iterator[PackedBatch]:
        """Yields this rank's micro-batches of optimizer step ``step``, each when it is needed.

        Args:
            step: 0-based; steps in order are read ahead, any other starts anew.
            num_steps: steps of the run, beyond which nothing is read.

        Raises:
            DeadWorkerError: a worker died; torch raises a RuntimeError of its own, at any place, if it sees it first.
        """
        if self._micro_batches is None or step != self._next_step:
            self._micro_batches = iter(self._loader(range(step, num_steps)))
        self._next_step = step + 1
        for _ in self._windows.plan(step).micro_batches:
            try:
                micro_batch = next(self._micro_batches)
            except (ConnectionError, EOFError, FileNotFoundError) as error:
                if not self._num_workers:
                    raise
                # Tensors are fetched from the worker that made them; torch does not always notice its death before.
                raise DeadWorkerError(str(error)) from error
            yield micro_batch

    def close(self) -> None:
        """Ends the workers."""
        self._micro_batches = None

    def _loader(self, steps: range) -> "DataLoader[PackedBatch]":
        return DataLoader(
            self._samples,
            batch_size=None,  # a plan is a whole micro-batch already
            sampler=(batch for step in steps for batch in self._windows.plan(step).micro_batches),
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            worker_init_fn=leave_signals_to_parent,
            # The workers' seeds come from a generator of its own, so that a start leaves the global state as it is.
            generator=torch.Generator(),
        )
