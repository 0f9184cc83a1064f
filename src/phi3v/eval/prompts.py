"""Prompts that begin alike, put together so that their common beginning is computed once, and packed into one row."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NamedTuple

import torch

from ..geometry import num_image_tokens
from ..model.packed import PackedBatch, PackLayout, aligned_lengths


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """An image, cut.

    Attributes:
        key: equal keys are equal crops.
        crops: (1 + rows * columns, 3, crop_px, crop_px) float32, global view first.
        grid: rows and columns of its tiles.
    """

    key: str
    crops: torch.Tensor
    grid: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What a model is asked.

    Attributes:
        ids: its tokens, image positions included.
        pictures: its images, in text order.
        labels: token ids of answers whose likelihood is taken, as ``label_token_ids`` gives them.
        is_generated: whether an answer is generated.
    """

    ids: Sequence[int]
    pictures: tuple[Picture, ...] = ()
    labels: tuple[tuple[int, ...], ...] = ()
    is_generated: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """A sequence that the decoder reads because of a prompt: the prompt itself, or the prompt and one label.

    Attributes:
        prompt: whose it is.
        ids: its tokens. A label's last one is left out: what it predicts does not count.
        is_long: whether LongRoPE's long factors apply to it.
        label: place of the label in ``prompt.labels``; None: an answer is generated from here.
        num_generated: tokens at the end of ``ids`` that belong to the answer already.
        most_tokens: longest answer that may be generated behind ``ids``, tokens.
    """

    prompt: Prompt
    ids: list[int]
    is_long: bool
    label: int | None = None
    num_generated: int = 0
    most_tokens: int = 0

    @property
    def scored(self) -> tuple[int, ...]:
        """Tokens whose likelihood is taken: they are predicted at the end of ``ids``."""
        return () if self.label is None else self.prompt.labels[self.label]


@dataclass(frozen=True, slots=True)
class Group:
    """Readings with a common beginning.

    Attributes:
        stem: length of the beginning, positions; 0 for a reading that stands alone.
        readings: at least one, and at least two where there is a stem; each goes on behind it.
    """

    stem: int
    readings: tuple[Reading, ...]

    @property
    def num_tokens(self) -> int:
        """Positions that are computed for it."""
        return self.stem + sum(len(one.ids) - self.stem for one in self.readings)

    @property
    def generated(self) -> tuple[Reading, ...]:
        """Those from which an answer is generated."""
        return tuple(one for one in self.readings if one.label is None)


class PromptReader:
    """Turns prompts into the readings that they ask for, by the sizes of a model.

    Args:
        image_token_id: stands at every image position.
        tokens_per_side: image tokens along a crop's edge.
        short_positions: longest sequence that LongRoPE's short factors reach; None: length decides nothing.
        is_always_long: whether the long factors apply where length decides nothing.
        alignment: readings that share nothing and have nearly one length are filled up to a multiple of this in a row,
            as ``aligned_lengths`` says; 1: none is.
    """

    def __init__(
        self,
        *,
        image_token_id: int,
        tokens_per_side: int,
        short_positions: int | None,
        is_always_long: bool = False,
        alignment: int = 1,
    ) -> None:
        self._image_token_id = image_token_id
        self._tokens_per_side = tokens_per_side
        self._short_positions = short_positions
        self._is_always_long = is_always_long
        self.alignment = alignment

    def read(self, prompt: Prompt, max_new_tokens: int) -> list[Reading]:
        """Returns a prompt's readings, its answer's first."""
        readings = [self.go_on(prompt, (), max_new_tokens)] if prompt.is_generated else []
        for place, label in enumerate(prompt.labels):
            is_long = self._is_long(len(prompt.ids) + len(label))
            readings.append(Reading(prompt, [*prompt.ids, *label[:-1]], is_long, label=place))
        return readings

    def go_on(self, prompt: Prompt, generated: Sequence[int], max_new_tokens: int) -> Reading:
        """Returns the reading from which an answer that begins with ``generated`` goes on.

        LongRoPE's factors follow from the length of the whole sequence. An answer with which the sequence outgrows the
        short ones ends there, and goes on from a reading with the long ones.
        """
        ids = [*prompt.ids, *generated]
        most, is_long = max_new_tokens - len(generated), self._is_long(len(ids))
        if self._short_positions is not None and not is_long:
            most = min(most, self._short_positions - len(ids) + 1)
        return Reading(prompt, ids, is_long, num_generated=len(generated), most_tokens=most)

    def _is_long(self, length: int) -> bool:
        return self._is_always_long if self._short_positions is None else length > self._short_positions

    def group(self, readings: Iterable[Reading], most_tokens: int) -> list[Group]:
        """Puts readings with the same first image, or of the same prompt, together, in their order.

        A beginning that readings of several prompts share is shorter than what the readings of one prompt have in
        common: whichever way computes fewer positions is taken.

        Args:
            readings: of any prompts.
            most_tokens: positions that a group has at most, if its longest reading does not need more.
        """
        alike: dict[tuple[str | int, bool], list[Reading]] = {}
        for one in readings:
            first = one.prompt.pictures[0].key if one.prompt.pictures else id(one.prompt)
            alike.setdefault((first, one.is_long), []).append(one)
        groups: list[Group] = []
        for members in alike.values():
            by_prompt: dict[int, list[Reading]] = {}
            for one in members:
                by_prompt.setdefault(id(one.prompt), []).append(one)
            together = self._share(members)
            apart = [group for own in by_prompt.values() for group in self._share(own)]
            fewest = min(together, apart, key=lambda groups: sum(group.num_tokens for group in groups))
            groups += chain.from_iterable(self._cut(group, most_tokens) for group in fewest)
        return groups

    def _cut(self, group: Group, most_tokens: int) -> list[Group]:
        """Cuts a group that is too long into some that each compute the stem anew."""
        cut: list[list[Reading]] = []
        length = 0
        for one in group.readings:
            if not cut or length + len(one.ids) - group.stem > most_tokens:
                cut.append([])
                length = group.stem
            cut[-1].append(one)
            length += len(one.ids) - group.stem
        return [group] if len(cut) == 1 else [part for readings in cut for part in self._share(readings)]

    def _share(self, readings: Sequence[Reading]) -> list[Group]:
        """Makes a group of readings if they have a beginning in common."""
        stem = self._common_length(readings) if len(readings) > 1 else 0
        return [Group(stem, tuple(readings))] if stem else [Group(0, (one,)) for one in readings]

    def _common_length(self, readings: Sequence[Reading]) -> int:
        """Returns the length of the longest common beginning behind which each reading has what it is read for."""
        first, last = min(one.ids for one in readings), max(one.ids for one in readings)
        most = min(len(one.ids) - max(1, len(one.scored)) for one in readings)
        common = next((place for place in range(most) if first[place] != last[place]), most)
        shown = [self.image_starts(one) for one in readings]
        for number, (place, picture) in enumerate(shown[0]):
            if place >= common:
                break
            # Different images may begin at the same position: the ids do not tell them apart.
            is_same = all(own[number][1].key == picture.key for own in shown)
            if not is_same or place + self.num_positions(picture) > common:
                return place
        return common

    def image_starts(self, reading: Reading) -> list[tuple[int, Picture]]:
        """Returns where each of a reading's images begins."""
        starts: list[tuple[int, Picture]] = []
        end = 0
        for picture in reading.prompt.pictures:
            start = reading.ids.index(self._image_token_id, end)
            starts.append((start, picture))
            end = start + self.num_positions(picture)
        return starts

    def num_positions(self, picture: Picture) -> int:
        """Counts an image's decoder positions."""
        return num_image_tokens(picture.grid, self._tokens_per_side)

    def pack(self, groups: Sequence[Group]) -> "PackedReadings":
        """Packs groups into one row."""
        return _pack(self, groups)


class Piece(NamedTuple):
    """A stretch of a packed row.

    Attributes:
        reading: whose positions it holds; of a stem, the group's first.
        begin: which of the reading's positions comes first.
        end: which comes behind its last.
    """

    reading: Reading
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class PackedReadings:
    """Groups in one row.

    Attributes:
        batch: the row, without its crops. The targets are the labels' tokens.
        pictures: the different images of the row, in the order of ``batch.grids``.
        stems: for every group, where its stem, or its only reading, begins and ends in the row.
        branches: for every group's readings, where what stands behind the stem begins and ends in the row.
        scored: for every target of the batch, whose label's token it is.
    """

    batch: PackedBatch
    pictures: tuple[Picture, ...]
    stems: tuple[tuple[int, int], ...]
    branches: tuple[tuple[tuple[int, int], ...], ...]
    scored: tuple[Reading, ...]


def _filled(piece: Piece, length: int) -> torch.Tensor:
    """Returns a piece's ids, (length,) int64; behind its end its last one again, which nothing of the row sees."""
    ids = torch.tensor(piece.reading.ids[piece.begin : piece.end])
    return torch.cat([ids, ids[-1:].expand(length - len(ids))])


def _pack(reader: PromptReader, groups: Sequence[Group]) -> PackedReadings:
    shared = [number for number, group in enumerate(groups) if group.stem]
    alone = [number for number, group in enumerate(groups) if not group.stem]
    pieces = [Piece(groups[number].readings[0], 0, groups[number].stem) for number in shared]
    pieces += [Piece(groups[number].readings[0], 0, len(groups[number].readings[0].ids)) for number in alone]
    trunk = len(pieces)
    pieces += [Piece(one, groups[number].stem, len(one.ids)) for number in shared for one in groups[number].readings]
    aligned = aligned_lengths([piece.end for piece in pieces[len(shared) : trunk]], reader.alignment)
    lengths = [piece.end - piece.begin for piece in pieces]
    places = [*lengths[: len(shared)], *aligned, *lengths[trunk:]]
    starts = accumulate(places, initial=0)
    spans = [(start, start + length) for start, length in zip(starts, lengths, strict=False)]

    stems = dict(zip([*shared, *alone], spans[:trunk], strict=True))
    branches: dict[int, tuple[tuple[int, int], ...]] = {number: (stems[number],) for number in alone}
    rest = iter(spans[trunk:])
    for number in shared:
        branches[number] = tuple(next(rest) for _ in groups[number].readings)

    pictures: dict[str, Picture] = {}
    first_rows: dict[str, int] = {}
    num_rows = 0
    image_positions: list[torch.Tensor] = []
    image_rows: list[torch.Tensor] = []
    for piece, (start, _) in zip(pieces, spans, strict=True):
        for place, picture in reader.image_starts(piece.reading):
            if not piece.begin <= place < piece.end:
                continue
            length = reader.num_positions(picture)
            if picture.key not in pictures:
                pictures[picture.key] = picture
                first_rows[picture.key] = num_rows
                num_rows += length
            image_positions.append(torch.arange(length) + start + place - piece.begin)
            image_rows.append(torch.arange(length) + first_rows[picture.key])

    targets: list[tuple[int, int, Reading]] = []
    for number in [*alone, *shared]:  # the order of the row
        for one, (_, end) in zip(groups[number].readings, branches[number], strict=True):
            targets += [(end - len(one.scored) + place, token, one) for place, token in enumerate(one.scored)]
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = PackedBatch(
        layout=PackLayout(
            stems=tuple(groups[number].stem for number in shared),
            wholes=tuple(aligned),
            branches=tuple(
                tuple(len(one.ids) - groups[number].stem for one in groups[number].readings) for number in shared
            ),
        ),
        input_ids=torch.cat([_filled(piece, place) for piece, place in zip(pieces, places, strict=True)]),
        position_ids=torch.cat(
            [torch.arange(piece.begin, piece.begin + place) for piece, place in zip(pieces, places, strict=True)]
        ),
        is_long=torch.cat(
            [torch.full((place,), piece.reading.is_long) for piece, place in zip(pieces, places, strict=True)]
        ),
        target_positions=torch.tensor([position for position, _, _ in targets], dtype=torch.int64),
        target_ids=torch.tensor([token for _, token, _ in targets], dtype=torch.int64),
        target_weights=torch.ones(len(targets)),
        image_positions=torch.cat(image_positions) if image_positions else nothing,
        image_rows=torch.cat(image_rows) if image_rows else nothing,
        grids=tuple(picture.grid for picture in pictures.values()),
        image_keys=tuple(pictures),
        num_samples=sum(len(group.readings) for group in groups),
        num_positions=sum(len(one.ids) for group in groups for one in group.readings),
    )
    order = range(len(groups))
    return PackedReadings(
        batch=batch,
        pictures=tuple(pictures.values()),
        stems=tuple(stems[one] for one in order),
        branches=tuple(branches[one] for one in order),
        scored=tuple(one for _, _, one in targets),
    )
