"""A ``Sample`` and its images to token ids, labels and pixels, exactly as the published training tokenizes them."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, Required, TypedDict

import torch
from PIL import Image

from ..model.processing_phi3_v import Phi3VProcessor
from .schema import IMAGE_TAG, Sample, SampleError, Segment, render, sample_error

IGNORED_LABEL = -100
"""Label of a position that the loss leaves out; the value torch's cross entropy ignores by default."""

OVERLONG = "over-long"
"""``SampleError.reason`` of a sample that ``on_overlong="error"`` refuses."""

OnOverlong = Literal["error", "drop", "cut"]


class Encoded(TypedDict, total=False):
    """One sample, tokenized. Image keys are absent without images, ``labels`` in a prompt for generation.

    Attributes:
        input_ids: (L,) int64.
        labels: (L,) int64; the id at supervised positions, ``IGNORED_LABEL`` elsewhere. Not shifted.
        pixel_values: (n, C, 3, crop_px, crop_px) float32, images in text order.
        image_sizes: (n, 2) int64, padded (h, w) px.
    """

    input_ids: Required[torch.Tensor]
    labels: torch.Tensor
    pixel_values: torch.Tensor
    image_sizes: torch.Tensor


class Lengths(NamedTuple):
    """What a sample costs, known without its pixels.

    Attributes:
        tokens: decoder positions, image tokens included, after a cut where there is one.
        supervised: positions that the loss counts.
        crops: crops that CLIP computes, global views included.
        is_overlong: whether the sample exceeds ``max_length`` as the file has it.
    """

    tokens: int
    supervised: int
    crops: int
    is_overlong: bool


class SampleEncoder:
    """Encodes samples for training and for generation, so that both see the same ids.

    A conversation starts with one ``<s>``; the text after an image starts with its own; a later turn without an image
    and an answer have none. Every answer is supervised from its first token through its end tokens, nothing else is.

    Args:
        processor: tokenizer and image processor of the model.
        max_length: most decoder positions of a training sample, image tokens included; None for no limit.
        on_overlong: what happens to a training sample over ``max_length``. ``error``: refused. ``drop``: ``measure``
            reports it and the data check leaves it out. ``cut``: text is taken away, never an image's tokens: first
            from the end of the longest user text, then from the end of the last answer, whose end tokens stay. Some
            of an answer, and of a question without images, is always kept.

    Source: published fine-tuning recipe and processor; ids and labels are checked against recordings
    of the published code in ``tests/unit/data/test_encode.py``.
    """

    def __init__(
        self, processor: Phi3VProcessor, *, max_length: int | None = None, on_overlong: OnOverlong = "error"
    ) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length is {max_length}, must be at least 1 token")
        if on_overlong not in ("error", "drop", "cut"):
            raise ValueError(f"on_overlong is {on_overlong!r}, must be error, drop or cut")
        self.processor = processor
        self.max_length = max_length
        self.on_overlong = on_overlong
        special = [token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special]
        self._special_token = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))

    def encode(self, sample: Sample, images: Sequence[Image.Image]) -> Encoded:
        """Encodes a training sample.

        Args:
            sample: the conversation.
            images: one a path of ``sample.images``, in that order.

        Raises:
            SampleError: over-long and not to be cut, tags that do not fit the images, an image too elongated to
                resize, or text that holds special tokens.
        """
        plan = self._plan(sample, [(image.height, image.width) for image in images])
        ids, labels, is_overlong = self._tokenize_within_limit(sample, plan)
        if is_overlong and self.on_overlong != "cut":
            raise self._overlong_error(sample, plan, len(ids))
        encoded = Encoded(
            input_ids=torch.tensor(ids, dtype=torch.int64), labels=torch.tensor(labels, dtype=torch.int64)
        )
        self._add_pixels(encoded, sample, plan, images)
        return encoded

    def encode_prompt(self, sample: Sample, images: Sequence[Image.Image], turn: int) -> Encoded:
        """Encodes the prompt of one turn for generation; earlier turns stand with their gold answers.

        The ids are those that training puts before that turn's answer. ``max_length`` does not apply: a question is
        asked as it stands.

        Args:
            sample: the conversation.
            images: those of the turns up to and including ``turn``, in order.
            turn: zero-based.

        Raises:
            SampleError: as ``encode``, but for the length.
        """
        plan = self._plan(sample, [(image.height, image.width) for image in images], turn)
        ids, _ = self._tokenize(plan.segments, plan.token_counts)
        encoded = Encoded(input_ids=torch.tensor(ids, dtype=torch.int64))
        self._add_pixels(encoded, sample, plan, images)
        return encoded

    def measure(self, sample: Sample, image_header_sizes: Sequence[tuple[int, int]]) -> Lengths:
        """Measures a training sample from its images' sizes alone; ``encode`` gives the same lengths.

        Args:
            sample: the conversation.
            image_header_sizes: (h, w) px, one a path of ``sample.images``, in that order.

        Raises:
            SampleError: as ``encode``, except that ``on_overlong="drop"`` reports an over-long sample's full length.
        """
        plan = self._plan(sample, image_header_sizes)
        ids, labels, is_overlong = self._tokenize_within_limit(sample, plan)
        if is_overlong and self.on_overlong == "error":
            raise self._overlong_error(sample, plan, len(ids))
        return Lengths(len(ids), sum(label != IGNORED_LABEL for label in labels), plan.crops, is_overlong)

    def _plan(self, sample: Sample, sizes: Sequence[tuple[int, int]], upto_turn: int | None = None) -> "_Plan":
        """Checks text and tags against the images, and counts what the images cost."""
        texts = [sample.system or ""]
        for turn in sample.turns:
            texts += [*IMAGE_TAG.split(turn.user)[::2], turn.assistant, *turn.labels]
        for text in texts:
            if found := self._special_token.search(text):
                raise sample_error(
                    sample.label,
                    f"its text holds {found.group()!r}, which this tokenizer reads as a special token",
                    "Take it out or write it differently, for example with a space inside.",
                    "special token in the text",
                )
        segments = render(sample, upto_turn)
        try:
            order = self.processor.image_order("".join(segment.text for segment in segments))
        except ValueError as error:
            raise sample_error(sample.label, str(error), "Number the tags again.", "wrong image tags") from error
        if len(order) != len(sizes):
            raise sample_error(
                sample.label,
                f"the text shows {len(order)} image(s) but {len(sizes)} were given",
                "List every image that a tag shows, and no other.",
                "wrong image tags",
            )
        image_processor = self.processor.image_processor
        counts: list[int] = []
        crops = 0
        for name, size in zip(sample.images, sizes, strict=False):  # a prompt shows the first images only
            try:
                counts.append(image_processor.image_token_count(*size, num_crops=sample.num_crops))
                crops += image_processor.layout(*size, num_crops=sample.num_crops).num_crops
            except ValueError as error:
                raise sample_error(
                    sample.label, f"image {name!r}: {error}", "Crop or pad the image.", "elongated image"
                ) from error
        return _Plan(segments, order, counts, crops)

    def _tokenize(self, segments: Sequence[Segment], counts: Sequence[int]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        for index, segment in enumerate(segments):
            piece = self.processor.encode(segment.text, counts, add_bos=index == 0)
            ids += piece
            labels += piece if segment.is_answer else [IGNORED_LABEL] * len(piece)
        return ids, labels

    def _tokenize_within_limit(self, sample: Sample, plan: "_Plan") -> tuple[list[int], list[int], bool]:
        """Returns ids, labels, and whether the sample as it stands is over the limit; cuts it where that is asked."""
        counts = plan.token_counts
        ids, labels = self._tokenize(plan.segments, counts)
        if self.max_length is None or len(ids) <= self.max_length:
            return ids, labels, False
        if self.on_overlong == "cut":
            shortened = sample
            while len(ids) > self.max_length:  # text is shortened in characters, so the tokens saved are an estimate
                shortened = self._shortened(shortened, len(ids) - self.max_length, counts)
                ids, labels = self._tokenize(render(shortened), counts)
        return ids, labels, True

    def _shortened(self, sample: Sample, num_tokens: int, counts: Sequence[int]) -> Sample:
        """Takes about ``num_tokens`` tokens, at least one character, from the text that is next to be cut."""
        turns = list(sample.turns)
        spare = [self._num_spare(turn.user, may_vanish=bool(turn.images)) for turn in turns]
        longest = max(range(len(turns)), key=spare.__getitem__)
        if spare[longest] > 0:
            turn = turns[longest]
            turns[longest] = replace(turn, user=self._without_tail(turn.user, min(num_tokens, spare[longest])))
            return replace(sample, turns=tuple(turns))
        answer = turns[-1].assistant
        spare_answer = self._num_spare(answer, may_vanish=False)
        if spare_answer < 1:
            raise sample_error(
                sample.label,
                f"cannot be cut to max_length={self.max_length}: its {len(counts)} image(s) alone take "
                f"{sum(counts)} tokens, and no more text can be taken away",
                "Raise max_length, lower num_crops, or use on_overlong=drop.",
                "too long to cut",
            )
        turns[-1] = replace(turns[-1], assistant=self._without_tail(answer, min(num_tokens, spare_answer)))
        return replace(sample, turns=tuple(turns))

    def _num_spare(self, text: str, may_vanish: bool) -> int:
        """Counts the tokens that a cut may take from a text: all, or those behind its first visible character."""
        if may_vanish:
            return sum(len(self._text_starts(piece)) for piece in IMAGE_TAG.split(text)[::2])
        first_visible = len(text) - len(text.lstrip())
        return sum(start > first_visible for start in self._text_starts(text))

    def _without_tail(self, text: str, num_tokens: int) -> str:
        """Takes ``num_tokens`` text tokens from the end, leaving image tags where they are."""
        pieces = re.split(f"({IMAGE_TAG.pattern.replace('(', '(?:')})", text)
        for index in range(len(pieces) - 1, -1, -2):
            starts = self._text_starts(pieces[index])
            removed = min(num_tokens, len(starts))
            if removed:
                keep_chars = min(starts[-removed], len(pieces[index]) - 1)
                pieces[index] = pieces[index][:keep_chars]
                num_tokens -= removed
        return "".join(pieces)

    def _text_starts(self, text: str) -> list[int]:
        """Returns the character at which each token of a text starts."""
        if not text:
            return []
        offsets = self.processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        return [start for start, _ in offsets]

    def _add_pixels(self, encoded: Encoded, sample: Sample, plan: "_Plan", images: Sequence[Image.Image]) -> None:
        if images:
            features = self.processor.image_processor.preprocess(
                [images[index] for index in plan.order], num_crops=sample.num_crops, return_tensors="pt"
            )
            encoded["pixel_values"] = features["pixel_values"]
            encoded["image_sizes"] = features["image_sizes"]

    def _overlong_error(self, sample: Sample, plan: "_Plan", num_tokens: int) -> SampleError:
        return sample_error(
            sample.label,
            f"{num_tokens} tokens, of which {sum(plan.token_counts)} for {len(plan.order)} image(s), exceed "
            f"max_length={self.max_length}",
            "Raise max_length, lower num_crops, shorten the text, or set on_overlong to drop (leave such samples out) "
            "or cut (cut their text).",
            OVERLONG,
        )


class _Plan(NamedTuple):
    """A sample's text and what its images cost, before anything is tokenized.

    Attributes:
        segments: the chat text.
        order: zero-based indices of the images in the order in which the text shows them.
        token_counts: decoder positions of each image, in the order in which the sample lists them.
        crops: crops of all images.
    """

    segments: list[Segment]
    order: list[int]
    token_counts: list[int]
    crops: int
