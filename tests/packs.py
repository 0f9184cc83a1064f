"""Packed batches written out by hand, beside the padded inputs that they must agree with; and costs to plan them by."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from phi3v.data.packing import SampleCosts
from phi3v.geometry import num_image_tokens
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.packed import PackedBatch, PackLayout


@dataclass(frozen=True)
class Question:
    """One sample of random ids: text, images, text, answer.

    Attributes:
        images: which of the pack's images it begins with.
        text: ids behind the images; the last ``answer`` of them are supervised.
        answer: supervised ids.
    """

    images: tuple[int, ...]
    text: int
    answer: int


class Pack:
    """Questions about images of given grids, in every form.

    Args:
        config: of the model.
        grids: (rows, columns) of every image.
        stems: questions that share their images, by stem; all questions of a group name the same images.
        wholes: questions that share nothing.
        seed: of ids and pixels.
    """

    def __init__(
        self,
        config: Phi3VConfig,
        grids: Sequence[tuple[int, int]],
        stems: Sequence[Sequence[Question]] = (),
        wholes: Sequence[Question] = (),
        seed: int = 0,
    ) -> None:
        self.config = config
        self.grids = tuple(grids)
        self.stems, self.wholes = stems, wholes
        generator = torch.Generator().manual_seed(seed)
        edge = config.crop_px
        self.pixels = [torch.randn(r * c + 1, 3, edge, edge, generator=generator) for r, c in grids]
        self.questions = [*wholes, *(question for group in stems for question in group)]
        self.heads = {question: self._head(question) for question in self.questions}
        self.texts = [torch.randint(3, 300, (question.text,), generator=generator) for question in self.questions]

    def _head(self, question: Question) -> torch.Tensor:
        counts = [num_image_tokens(self.grids[image], self.config.tokens_per_side) for image in question.images]
        parts = [torch.tensor([1, 7])]
        for count in counts:
            parts += [torch.full((count,), self.config.image_token_id), torch.tensor([1])]
        return torch.cat(parts[:-1]) if counts else parts[0]

    def weights(self, question: Question) -> torch.Tensor:
        """A sample mean's weights, (answer,)."""
        return torch.full((question.answer,), 1.0 / question.answer)

    def padded(self) -> list[dict[str, torch.Tensor]]:
        """Every question alone, as the padded forward takes it."""
        singles = []
        for question, text in zip(self.questions, self.texts, strict=True):
            ids = torch.cat([self.heads[question], text])
            labels = torch.full_like(ids, -100)
            labels[-question.answer :] = ids[-question.answer :]
            weights = torch.zeros(len(ids))
            weights[-question.answer :] = self.weights(question)
            single = {"input_ids": ids[None], "labels": labels[None], "loss_weights": weights[None]}
            if question.images:
                shown = [self.pixels[image] for image in question.images]
                single["pixel_values"] = torch.nn.utils.rnn.pad_sequence(shown, batch_first=True)
                edge = self.config.crop_px
                single["image_sizes"] = torch.tensor([[edge * n for n in self.grids[i]] for i in question.images])
            singles.append(single)
        return singles

    def packed(self) -> PackedBatch:
        """All of them in one row."""
        limit = self.config.original_max_position_embeddings
        stem_heads = [self.heads[group[0]] for group in self.stems]
        wholes = [torch.cat([self.heads[q], text]) for q, text in zip(self.wholes, self.texts, strict=False)]
        rest = iter(self.texts[len(self.wholes) :])
        branches = [[next(rest) for _ in group] for group in self.stems]
        layout = PackLayout(
            tuple(map(len, stem_heads)),
            tuple(map(len, wholes)),
            tuple(tuple(map(len, group)) for group in branches),
        )
        is_long_stem = [len(head) + len(group[0]) > limit for head, group in zip(stem_heads, branches, strict=True)]
        pieces = [(head, 0, long, None) for head, long in zip(stem_heads, is_long_stem, strict=True)]
        pieces += [(ids, 0, len(ids) > limit, q) for ids, q in zip(wholes, self.wholes, strict=True)]
        for head, long, group, questions in zip(stem_heads, is_long_stem, branches, self.stems, strict=True):
            pieces += [(ids, len(head), long, q) for ids, q in zip(group, questions, strict=True)]
        ids = torch.cat([piece for piece, *_ in pieces])
        positions = torch.cat([torch.arange(len(piece)) + first for piece, first, *_ in pieces])
        is_long = torch.cat([torch.full((len(piece),), long) for piece, _, long, _ in pieces])
        targets, weights, start = [], [], 0
        for piece, _, _, question in pieces:
            if question is not None:
                targets.append(torch.arange(len(piece) - question.answer, len(piece)) + start)
                weights.append(self.weights(question))
            start += len(piece)
        supervised = torch.cat(targets)
        counts = [num_image_tokens(grid, self.config.tokens_per_side) for grid in self.grids]
        firsts = [sum(counts[:image]) for image in range(len(counts))]
        shown = [image for group in self.stems for image in group[0].images]
        shown += [image for question in self.wholes for image in question.images]
        rows = [torch.arange(counts[image]) + firsts[image] for image in shown]
        return PackedBatch(
            layout=layout,
            input_ids=ids,
            position_ids=positions,
            is_long=is_long,
            target_positions=supervised - 1,
            target_ids=ids[supervised],
            target_weights=torch.cat(weights),
            image_positions=(ids == self.config.image_token_id).nonzero()[:, 0],
            image_rows=torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64),
            crops=torch.cat(self.pixels) if self.pixels else None,
            grids=self.grids,
            image_keys=tuple(map(str, range(len(self.grids)))),
            num_samples=len(self.questions),
            num_positions=sum(len(self.heads[question]) + question.text for question in self.questions),
        )


def document_costs(num: int) -> SampleCosts:
    """About four questions a page of 2,511 positions, as DocVQA has them."""
    dice = np.random.default_rng(0)
    stem, crops = np.full(num, 2511, np.int32), np.full(num, 17, np.int32)
    tokens = stem + dice.integers(20, 60, num, dtype=np.int32)
    pages = np.sort(dice.integers(0, num // 4, num)).astype(np.uint64)
    return SampleCosts(tokens, np.full(num, 5, np.int32), crops, stem, crops, pages)
