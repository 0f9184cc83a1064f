"""A ``Sample`` and its images to token ids, labels and pixels, exactly as the published training tokenizes them."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, Required, TypedDict

import numpy as np
import torch
from PIL import Image

from ..model.processing_phi3_v import Phi3VProcessor
from .packing import Lengths, Stem
from .schema import IMAGE_TAG, Sample, SampleError, Segment, render, sample_error

IGNORED_LABEL = -100
"""Label of a position that the loss leaves out; the value torch's cross entropy ignores by default."""

OVERLONG = "over-long"
"""``SampleError.reason`` of a sample that ``on_overlong="error"`` refuses."""

_END_OF_TEXT = "</s>"
"""Ends a text in the vocabulary that the model's is made of. Its tokenizer calls this token ordinary, and yet reads it
in text, together with the space behind it."""

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


class EncodedText(NamedTuple):
    """A training sample without its pixels.

    Attributes:
        input_ids: (L,) int64.
        labels: (L,) int64, as in ``Encoded``.
        grids: (rows, columns) of tiles of every image, images in text order.
        order: zero-based place in ``Sample.images`` of every image, in text order.
        stem: how it begins.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    grids: tuple[tuple[int, int], ...]
    order: tuple[int, ...]
    stem: Stem


class SampleEncoder:
    """Encodes samples for training and for generation, so that both see the same ids.

    A conversation starts with one ``<s>``; the text after an image starts with its own; a later turn without an image
    and an answer have none. Every answer is supervised from its first token through its end tokens, nothing else is.

    Args:
        processor: tokenizer and image processor of the model.
        max_length: most decoder positions of a training sample, image tokens included; None for no limit.
        max_positions: most that the model knows, ``max_position_embeddings`` of its configuration; None: not known.
        on_overlong: what happens to a training sample over either of the two. ``error``: refused. ``drop``: ``measure``
            reports it and the data check leaves it out. ``cut``: text is taken away, never an image's tokens: first
            from the end of the longest user text, then from the end of the last answer, whose end tokens stay. Some
            of an answer, and of a question without images, is always kept.

    Source: published fine-tuning recipe and processor; ids and labels are checked against recordings
    of the published code in ``tests/unit/data/test_encode.py``.
    """

    def __init__(
        self,
        processor: Phi3VProcessor,
        *,
        max_length: int | None = None,
        max_positions: int | None = None,
        on_overlong: OnOverlong = "error",
    ) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length is {max_length}, must be at least 1 token")
        if on_overlong not in ("error", "drop", "cut"):
            raise ValueError(f"on_overlong is {on_overlong!r}, must be error, drop or cut")
        self.processor = processor
        self.max_length = max_length
        self.max_positions = max_positions
        self.on_overlong = on_overlong
        added = processor.tokenizer.added_tokens_decoder.values()
        special = [token.content for token in added if token.special or token.content == _END_OF_TEXT]
        self._special_token = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))

    @property
    def limit(self) -> int | None:
        """Most decoder positions of a training sample: the lower of ``max_length`` and ``max_positions``."""
        return min((most for most in (self.max_length, self.max_positions) if most is not None), default=None)

    @property
    def _limit_name(self) -> str:
        if self.limit == self.max_length:
            return f"max_length={self.max_length}"
        return f"the {self.max_positions} positions that the model knows (max_position_embeddings)"

    def _remedy(self, *ways: str) -> str:
        """Says in a sentence what brings a sample under the limit."""
        *first, last = ("raise max_length", *ways) if self.limit == self.max_length else ways
        text = f"{', '.join(first)}, or {last}."
        return text[0].upper() + text[1:]

    def encode(self, sample: Sample, images: Sequence[Image.Image]) -> Encoded:
        """Encodes a training sample.

        Args:
            sample: the conversation.
            images: one a path of ``sample.images``, in that order.

        Raises:
            SampleError: over-long and not to be cut, tags that do not fit the images, an image too elongated to
                resize, or text that holds special tokens.
        """
        text = self.encode_text(sample, [(image.height, image.width) for image in images])
        encoded = Encoded(input_ids=text.input_ids, labels=text.labels)
        self._add_pixels(encoded, sample, text.order, images)
        return encoded

    def encode_text(self, sample: Sample, image_sizes: Sequence[tuple[int, int]]) -> EncodedText:
        """Encodes a training sample from its images' sizes; the ids and labels are those of ``encode``.

        Args:
            sample: the conversation.
            image_sizes: (h, w) px, one a path of ``sample.images``, in that order.

        Raises:
            SampleError: as ``encode``.
        """
        plan = self._plan(sample, image_sizes)
        tokens = self._tokenize_within_limit(sample, plan)
        if tokens.is_overlong and self.on_overlong != "cut":
            raise self._overlong_error(sample, plan, len(tokens.ids))
        return EncodedText(
            torch.tensor(tokens.ids, dtype=torch.int64),
            torch.tensor(tokens.labels, dtype=torch.int64),
            tuple(plan.grids[index] for index in plan.order),
            tuple(plan.order),
            self._stem(sample, plan, tokens),
        )

    def cut(self, sample: Sample, image: Image.Image) -> torch.Tensor:
        """Cuts one image of a sample into its crops: (crops, 3, crop_px, crop_px) float32, global view first."""
        features = self.processor.image_processor.preprocess([image], num_crops=sample.num_crops, return_tensors="pt")
        return features["pixel_values"][0]

    def num_crops(self, sample: Sample) -> int:
        """Returns the most tiles that an image of a sample is cut into."""
        return self.processor.num_crops if sample.num_crops is None else sample.num_crops

    def num_image_tokens(self, sample: Sample, image_size: tuple[int, int]) -> int:
        """Counts the decoder positions of a sample's image of (h, w) px."""
        return self.processor.image_processor.image_token_count(*image_size, num_crops=sample.num_crops)

    def image_key(self, sample: Sample, path: Path) -> str:
        """Names an image as a sample shows it: the same name, the same pixels and the same crops."""
        return f"{path}?num_crops={self.num_crops(sample)}"

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
        self._add_pixels(encoded, sample, plan.order, images)
        return encoded

    def prompt_ids(self, sample: Sample, image_sizes: Sequence[tuple[int, int]], turn: int) -> list[int]:
        """Returns the ids that ``encode_prompt`` gives a checked sample, from its images' (h, w) px alone."""
        counts = [self.num_image_tokens(sample, size) for size in image_sizes]
        return self._tokenize(render(sample, turn), counts)[0]

    def measure(self, sample: Sample, image_header_sizes: Sequence[tuple[int, int]]) -> Lengths:
        """Measures a training sample from its images' sizes alone; ``encode`` gives the same lengths.

        Args:
            sample: the conversation.
            image_header_sizes: (h, w) px, one a path of ``sample.images``, in that order.

        Raises:
            SampleError: as ``encode``, except that ``on_overlong="drop"`` reports an over-long sample's full length.
        """
        plan = self._plan(sample, image_header_sizes)
        tokens = self._tokenize_within_limit(sample, plan)
        if tokens.is_overlong and self.on_overlong == "error":
            raise self._overlong_error(sample, plan, len(tokens.ids))
        return Lengths(
            len(tokens.ids),
            len(tokens.labels) - tokens.labels.count(IGNORED_LABEL),
            sum(rows * columns + 1 for rows, columns in plan.grids),
            tokens.is_overlong,
            self._stem(sample, plan, tokens),
        )

    def _stem(self, sample: Sample, plan: "_Plan", tokens: "_Tokens") -> Stem:
        """Finds the stem of a sample that was tokenized."""
        pieces = IMAGE_TAG.split(tokens.opening)
        if len(pieces) == 1:
            return Stem()
        between = pieces[2:-1:2]
        leading = plan.order[: 1 + next((index for index, text in enumerate(between) if text.strip()), len(between))]
        end = 0
        for image in leading:
            end = tokens.ids.index(self.processor.image_token_id, end) + plan.token_counts[image]
        settings = np.array([self.num_crops(sample), *tokens.ids[:end]], dtype=np.int32)
        return Stem(
            tokens=end,
            images=len(leading),
            crops=sum(rows * columns + 1 for rows, columns in (plan.grids[image] for image in leading)),
            digest=hashlib.blake2b(settings.tobytes(), digest_size=16).digest(),
        )

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
        grids: list[tuple[int, int]] = []
        for name, size in zip(sample.images, sizes, strict=False):  # a prompt shows the first images only
            try:
                counts.append(image_processor.image_token_count(*size, num_crops=sample.num_crops))
                grids.append(image_processor.layout(*size, num_crops=sample.num_crops).grid)
            except ValueError as error:
                raise sample_error(
                    sample.label, f"image {name!r}: {error}", "Crop or pad the image.", "elongated image"
                ) from error
        return _Plan(segments, order, counts, grids)

    def _tokenize(self, segments: Sequence[Segment], counts: Sequence[int]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        for index, segment in enumerate(segments):
            piece = self.processor.encode(segment.text, counts, add_bos=index == 0)
            ids += piece
            labels += piece if segment.is_answer else [IGNORED_LABEL] * len(piece)
        return ids, labels

    def _tokenize_within_limit(self, sample: Sample, plan: "_Plan") -> "_Tokens":
        """Tokenizes a sample; over the limit, cuts it where that is asked."""
        counts = plan.token_counts
        segments = plan.segments
        ids, labels = self._tokenize(segments, counts)
        limit = self.limit
        if limit is None or len(ids) <= limit:
            return _Tokens(ids, labels, False, segments[0].text)
        if self.on_overlong == "cut":
            shortened = sample
            while len(ids) > limit:  # text is shortened in characters, so the tokens saved are an estimate
                shortened = self._shortened(shortened, len(ids) - limit, counts)
                segments = render(shortened)
                ids, labels = self._tokenize(segments, counts)
        return _Tokens(ids, labels, True, segments[0].text)

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
                f"cannot be cut to {self._limit_name}: its {len(counts)} image(s) alone take "
                f"{sum(counts)} tokens, and no more text can be taken away",
                self._remedy("lower num_crops", "use on_overlong=drop"),
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

    def _add_pixels(
        self, encoded: Encoded, sample: Sample, order: Sequence[int], images: Sequence[Image.Image]
    ) -> None:
        if images:
            features = self.processor.image_processor.preprocess(
                [images[index] for index in order], num_crops=sample.num_crops, return_tensors="pt"
            )
            encoded["pixel_values"] = features["pixel_values"]
            encoded["image_sizes"] = features["image_sizes"]

    def _overlong_error(self, sample: Sample, plan: "_Plan", num_tokens: int) -> SampleError:
        and_limit = f"max_length to {self.limit} and " if self.max_length is None else ""  # which on_overlong needs
        return sample_error(
            sample.label,
            f"{num_tokens} tokens, of which {sum(plan.token_counts)} for {len(plan.order)} image(s), exceed "
            f"{self._limit_name}",
            self._remedy(
                "lower num_crops",
                "shorten the text",
                f"set {and_limit}on_overlong to drop (leave such samples out) or cut (cut their text)",
            ),
            OVERLONG,
        )


class _Plan(NamedTuple):
    """A sample's text and what its images cost, before anything is tokenized.

    Attributes:
        segments: the chat text.
        order: zero-based indices of the images in the order in which the text shows them.
        token_counts: decoder positions of each image, in the order in which the sample lists them.
        grids: (rows, columns) of tiles of each image, in the same order.
    """

    segments: list[Segment]
    order: list[int]
    token_counts: list[int]
    grids: list[tuple[int, int]]


class _Tokens(NamedTuple):
    """A training sample, tokenized.

    Attributes:
        ids: its positions.
        labels: as many.
        is_overlong: whether it exceeds the limit as it stands in the file.
        opening: the chat text through the first question, as it was tokenized.
    """

    ids: list[int]
    labels: list[int]
    is_overlong: bool
    opening: str
