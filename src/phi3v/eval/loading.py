"""Questions on their way to the model: tokenized and cut ahead of time, each image once."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from weakref import WeakValueDictionary

from ..data.dataset import ConversationDataset
from ..data.encode import SampleEncoder
from ..data.processes import default_num_workers
from ..data.schema import Sample
from .prompts import Group, Picture, Prompt
from .questions import Question

MOST_CROPS_AHEAD = 1024
"""Crops that are cut ahead at most, but for those of the next group: 1.4 GB at 336 x 336 px."""


@dataclass(frozen=True, slots=True)
class LoadedGroup:
    """Questions about the same first image, ready for the model.

    Attributes:
        questions: with their samples and prompts, in order.
        samples: whose turns they are.
        prompts: what the model is asked.
        groups: the prompts, put together by what they have in common.
        pictures: their images. An image that a later group shows too is not cut again while one of them is in use.
    """

    questions: Sequence[Question]
    samples: Sequence[Sample]
    prompts: Sequence[Prompt]
    groups: Sequence[Group]
    pictures: Sequence[Future[Picture]]


class QuestionLoader:
    """Loads groups of questions while the model is at work on earlier ones.

    Images are read and cut by several threads, text is tokenized by one: tokenizers are not safe to share.

    Args:
        dataset: checked samples.
        encoder: of the model's processor.
        ask: makes the prompt of a question out of its sample, its turn, its ids and its images.
        group: puts prompts together, as ``Engine.group`` does.
        num_ahead: questions that are loaded ahead, fewer where their images have more than ``MOST_CROPS_AHEAD`` crops.
        use_pinned_memory: put crops into page-locked memory, from where a GPU fetches them by itself.
    """

    def __init__(
        self,
        dataset: ConversationDataset,
        encoder: SampleEncoder,
        *,
        ask: Callable[[Sample, int, list[int], tuple[Picture, ...]], Prompt],
        group: Callable[[Sequence[Prompt]], list[Group]],
        num_ahead: int,
        use_pinned_memory: bool = False,
    ) -> None:
        self._dataset = dataset
        self._encoder = encoder
        self._ask = ask
        self._group = group
        self._num_ahead = num_ahead
        self._use_pinned_memory = use_pinned_memory

    def load(self, groups: Sequence[Sequence[Question]]) -> Iterator[LoadedGroup]:
        """Yields the groups in order.

        Raises:
            SampleError: an image that was there when the data were checked cannot be read any more.
        """
        cutting = ThreadPoolExecutor(default_num_workers(), "cut")
        tokenizing = ThreadPoolExecutor(1, "tokenize")
        in_use: WeakValueDictionary[str, Future[Picture]] = WeakValueDictionary()
        waiting: deque[tuple[int, int, Future[LoadedGroup]]] = deque()
        num_waiting = crops_waiting = 0
        try:
            for questions in groups:
                samples = [self._dataset[question.index] for question in questions]
                pictures: dict[str, Future[Picture]] = {}
                num_crops = 0
                for question, sample in zip(questions, samples, strict=True):
                    for number, key in enumerate(question.images):
                        future = pictures.get(key) or in_use.get(key)
                        if future is None:
                            future = cutting.submit(self._cut, sample, number, key)
                            num_crops += self._num_crops(sample, question.image_sizes[number])
                        in_use[key] = pictures[key] = future
                future_group = tokenizing.submit(self._prepare, questions, samples, pictures)
                waiting.append((len(questions), num_crops, future_group))
                num_waiting += len(questions)
                crops_waiting += num_crops
                while num_waiting > self._num_ahead or (crops_waiting > MOST_CROPS_AHEAD and len(waiting) > 1):
                    num_questions, num_crops, future_group = waiting.popleft()
                    num_waiting -= num_questions
                    crops_waiting -= num_crops
                    yield future_group.result()
            while waiting:
                yield waiting.popleft()[-1].result()
        finally:
            for pool in (cutting, tokenizing):
                pool.shutdown(wait=True, cancel_futures=True)

    def _num_crops(self, sample: Sample, size: tuple[int, int]) -> int:
        """Counts the crops of an image of (h, w) px: its tiles and the global view."""
        rows, columns = self._encoder.processor.image_processor.layout(*size, sample.num_crops).grid
        return rows * columns + 1

    def _cut(self, sample: Sample, number: int, key: str) -> Picture:
        image = self._dataset.load_image(sample, sample.images[number])
        crops = self._encoder.cut(sample, image)
        layout = self._encoder.processor.image_processor.layout(image.height, image.width, sample.num_crops)
        return Picture(key, crops.pin_memory() if self._use_pinned_memory else crops, layout.grid)

    def _prepare(
        self, questions: Sequence[Question], samples: Sequence[Sample], pictures: dict[str, Future[Picture]]
    ) -> LoadedGroup:
        prompts: list[Prompt] = []
        for question, sample in zip(questions, samples, strict=True):
            ids = self._encoder.prompt_ids(sample, question.image_sizes, question.turn)
            shown = tuple(pictures[key].result() for key in question.images)
            prompts.append(self._ask(sample, question.turn, ids, shown))
        return LoadedGroup(questions, samples, prompts, self._group(prompts), list(pictures.values()))
