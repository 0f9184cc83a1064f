"""Which samples each optimizer step sees: a pure function of the epoch's order.

An optimizer step consumes one *window* of ``batch_size`` samples, cut into micro-batches that the ranks share. Nothing
here reads a global random state, the number of workers or the number of processes, so a resumed run and a run split
another way see the same windows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset, Sampler

from phi3v.data.dataset import ConversationDataset
from phi3v.data.encode import IGNORED_LABEL, Encoded, SampleEncoder
from phi3v.train.order import EpochOrder


@dataclass(frozen=True, slots=True)
class Draw:
    """One place in a micro-batch.

    Attributes:
        index: position of the sample in the dataset.
        counts: False for a filler: it keeps a rank in step with the others at the end of an epoch, and weighs nothing.
    """

    index: int
    counts: bool = True


class WindowSampler(Sampler[list[Draw]]):
    """Yields one rank's micro-batches of one epoch, window after window.

    A window's micro-batches go to the ranks in turn. The last window of an epoch may be smaller: it is kept, as a
    smaller batch, and a rank left without samples in it gets a filler.

    Args:
        order: what each epoch draws.
        batch_size: samples in a window, over all ranks.
        micro_batch_size: samples in one forward of one rank.
        rank: this process, 0-based.
        num_ranks: processes that share each window.

    >>> from phi3v.train.order import Shuffled
    >>> sampler = WindowSampler(Shuffled(5, seed=0), batch_size=4, micro_batch_size=2)
    >>> [len(batch) for batch in sampler], sampler.num_windows
    ([2, 2, 1], 2)
    """

    def __init__(
        self,
        order: EpochOrder,
        *,
        batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if batch_size % (micro_batch_size * num_ranks):
            raise ValueError(f"{batch_size} samples do not split into {num_ranks} x {micro_batch_size}")
        self.order = order
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.num_ranks = num_ranks
        self.epoch = 0

    @property
    def num_windows(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-len(self.order) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch, 0-based, that the next iteration yields."""
        self.epoch = epoch

    def window(self, step: int) -> list[int]:
        """Returns the dataset positions that optimizer step ``step`` (0-based, over the whole run) trains on."""
        epoch, number = divmod(step, self.num_windows)
        start = number * self.batch_size
        return self.order.of(epoch)[start : start + self.batch_size].tolist()

    def __len__(self) -> int:
        full, last = divmod(len(self.order), self.batch_size)
        stride = self.micro_batch_size * self.num_ranks
        return full * (self.batch_size // stride) + -(-last // stride)

    def __iter__(self) -> Iterator[list[Draw]]:
        order = self.order.of(self.epoch).tolist()
        stride = self.micro_batch_size * self.num_ranks
        for start in range(0, len(order), self.batch_size):
            window = order[start : start + self.batch_size]
            for first in range(self.rank * self.micro_batch_size, len(window) + self._offset(window), stride):
                picked = window[first : first + self.micro_batch_size]
                yield [Draw(index) for index in picked] or [Draw(window[0], counts=False)]

    def _offset(self, window: list[int]) -> int:
        """How far past the window's end this rank's last micro-batch may start, so that every rank has as many."""
        stride = self.micro_batch_size * self.num_ranks
        return -len(window) % stride


class TrainingSamples(Dataset[Encoded]):
    """Encoded samples by :class:`Draw`: opens the images and tokenizes, in a loader's worker.

    Args:
        dataset: the conversations.
        encoder: turns a sample and its images into tensors.
    """

    def __init__(self, dataset: ConversationDataset, encoder: SampleEncoder) -> None:
        self.dataset = dataset
        self.encoder = encoder

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> Encoded:
        sample = self.dataset[draw.index]
        encoded = self.encoder.encode(sample, self.dataset.load_images(sample))
        if not draw.counts:
            encoded["labels"] = torch.full_like(encoded["input_ids"], IGNORED_LABEL)
        return encoded
