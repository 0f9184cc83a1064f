"""The result of an examination, and the table that the command line prints of it."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .lengths import BATCHES, Lengths, Padding, Spread

WIDTH = 100
"""Columns of the printed table."""


MOST_NAME_CHARS = 20
"""Characters of a split's name in the table's first column."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to know about the data.

    Attributes:
        title: what it is, a few words.
        count: how often.
        examples: the first of them, each with its place.
        advice: what it means or what to do, a sentence, or empty.
    """

    title: str
    count: int
    examples: tuple[str, ...] = ()
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Answers:
    """How a split's answers are spread over its turns.

    Attributes:
        num_turns: answers in all.
        num_different: different ones.
        top: the most frequent with their counts, most frequent first.
        entropy_bits: of the distribution; 0 where all answers are the same.
    """

    num_turns: int
    num_different: int
    top: tuple[tuple[str, int], ...]
    entropy_bits: float

    @property
    def majority_share(self) -> float:
        """Share of turns that the most frequent answer gets right, 0 to 1."""
        return self.top[0][1] / self.num_turns if self.top else 0.0


@dataclass(frozen=True, slots=True)
class Split:
    """One data file.

    Attributes:
        name: the file's stem, its path where two files share a stem.
        path: the file.
        num_samples: lines that hold a sample.
        num_usable: those that training can use, over-long ones among them.
        num_overlong: usable samples that are longer than training will take.
        bad: what training refuses, by reason: those that are not usable, and the over-long ones.
        num_text_only: usable samples without an image.
        own_num_crops: usable samples with a number of crops of their own, by that number.
        turns: turns of a usable sample.
        images_a_sample: images of a usable sample.
        supervised: supervised tokens of a usable sample.
        answers: label balance.
        lengths: costs, by number of crops.
        num_images: distinct image files.
        formats: image files by format.
        modes: image files by Pillow's mode.
        notes: what is special about samples and image files.
        repeats: what stands in the split more than once.
    """

    name: str
    path: Path
    num_samples: int
    num_usable: int
    num_overlong: int
    bad: tuple[Finding, ...]
    num_text_only: int
    own_num_crops: dict[int, int]
    turns: Spread
    images_a_sample: Spread
    supervised: Spread
    answers: Answers
    lengths: dict[int, Lengths]
    num_images: int
    formats: dict[str, int]
    modes: dict[str, int]
    notes: tuple[Finding, ...]
    repeats: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What an examination found; printed, it is a table.

    Attributes:
        splits: one a data file, in the order given.
        across: what two splits share (leakage), worst first.
        num_crops: the number of crops that training will use.
        limit: decoder positions above which ``Lengths.num_over`` counts.
        has_decoded: whether every image was decoded.
        has_hashed: whether images were compared by content.
        page: the HTML page, where one was written.
    """

    splits: tuple[Split, ...]
    across: tuple[Finding, ...]
    num_crops: int
    limit: int
    has_decoded: bool
    has_hashed: bool
    page: Path | None = field(default=None)

    @property
    def is_usable(self) -> bool:
        """Whether ``phi3v train`` takes every sample as it is."""
        return all(split.num_samples == split.num_usable and not split.num_overlong for split in self.splits)

    @property
    def verdict(self) -> str:
        """Whether the data are fit for training, in a sentence."""
        if not self.is_usable:
            num_bad = sum(split.num_samples - split.num_usable for split in self.splits)
            num_overlong = sum(split.num_overlong for split in self.splits)
            found, remedies = [], []
            if num_bad:
                found.append(f"{num_bad:,} bad sample(s)")
                remedies.append("Mend the bad ones, or train with on_bad_sample: skip, which leaves them out.")
            if num_overlong:
                found.append(f"{num_overlong:,} over-long sample(s)")
                remedies.append("Shorten the over-long ones, or train with on_overlong: drop or cut.")
            return " ".join([f"Not usable as they are: {' and '.join(found)}.", *remedies])
        if self.has_decoded:
            return "Usable: phi3v train takes every sample."
        return "Usable as far as headers tell: images were not decoded."

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def percent(share: float) -> str:
    """Writes a share of 1 in percent, three digits at most, and never a zero for a little."""
    if 0 < share < 0.0005:
        return "<0.1 %"
    return f"{100 * share:.1f} %"


def _lines(diagnosis: Diagnosis) -> Iterator[str]:
    """Yields the printed lines: numbers cut to the page, what was found wrapped to it."""
    yield from map(_fit, _tables(diagnosis))
    yield from _finding_lines("across splits", diagnosis.across)
    for split in diagnosis.splits:
        yield from _finding_lines(f"{split.name}: samples that training refuses", split.bad)
        yield from _finding_lines(f"{split.name}: worth knowing", split.notes)
        yield from _finding_lines(f"{split.name}: repeats", split.repeats)
    yield ""
    if not diagnosis.has_hashed:
        yield "Images were not compared by content (hashes off): copies under other names were not looked for."
    if diagnosis.page is not None:
        yield _printable(f"page: {diagnosis.page}")
    yield from textwrap.wrap(diagnosis.verdict, WIDTH)


def _tables(diagnosis: Diagnosis) -> Iterator[str]:
    splits = diagnosis.splits
    yield from _table(
        ["", "samples", "usable", "turns", "images", "text only", "own num_crops", "files", "supervised"],
        [_overview_row(split) for split in splits],
    )
    yield "(turns and images of a sample: mean/most; files: distinct images; supervised tokens: p50/most)"
    yield ""
    head = ["tokens a sample", "num_crops", "p50", "p90", "p99", "most", f"over {diagnosis.limit:,}", "supervised"]
    rows = [_length_row(split, one, diagnosis) for split in splits for one in split.lengths.values()]
    yield from _table([*head, "crops p50/most"], rows)
    yield f"(* {diagnosis.num_crops} is what training would use)"
    yield ""
    rows = [row for split in splits for row in _padding_rows(split, split.lengths[diagnosis.num_crops].padding)]
    yield from _table(["padding in batches of", "", *map(str, BATCHES)], rows)
    yield "(share of a random batch; in brackets where samples are sorted by length)"
    for split in splits:
        yield ""
        yield from _answer_lines(split)
        yield f"{split.name}: image files {_counts(split.formats)}, modes {_counts(split.modes)}"


def _overview_row(split: Split) -> list[str]:
    return [
        _short(split.name),
        f"{split.num_samples:,}",
        f"{split.num_usable:,}",
        _mean_and_most(split.turns),
        _mean_and_most(split.images_a_sample),
        f"{split.num_text_only:,}",
        _counts(split.own_num_crops),
        f"{split.num_images:,}",
        f"{split.supervised.p50:,}/{split.supervised.most:,}",
    ]


def _length_row(split: Split, one: Lengths, diagnosis: Diagnosis) -> list[str]:
    mark = " *" if one.num_crops == diagnosis.num_crops else "  "
    over = percent(one.num_over / split.num_usable) if split.num_usable else "none"
    return [
        _short(split.name) if one is next(iter(split.lengths.values())) else "",
        f"{one.num_crops}{mark}",
        *(f"{value:,}" for value in (one.tokens.p50, one.tokens.p90, one.tokens.p99, one.tokens.most)),
        f"{one.num_over:,} ({over})",
        percent(one.supervised_share),
        f"{one.crops.p50:,}/{one.crops.most:,}",
    ]


def _padding_rows(split: Split, paddings: Sequence[Padding]) -> Iterator[list[str]]:
    yield [_short(split.name), "positions", *(_pair(one.tokens, one.sorted_tokens) for one in paddings)]
    yield ["", "crops", *(_pair(one.crops, one.sorted_crops) for one in paddings)]


def _answer_lines(split: Split) -> Iterator[str]:
    answers = split.answers
    yield (
        f"{split.name}: {answers.num_different:,} different answers in {answers.num_turns:,} turns, "
        f"{answers.entropy_bits:.2f} bits; always the most frequent: {percent(answers.majority_share)}"
    )
    if answers.top and answers.top[0][1] > 1:
        yield "  " + ", ".join(f"{text!r} {count:,}" for text, count in answers.top)


def _finding_lines(title: str, findings: Sequence[Finding]) -> Iterator[str]:
    if not findings:
        return
    yield ""
    yield from _wrap(title, "", "  ")
    for finding in findings:
        yield from _wrap(finding.title, f"  {finding.count:>9,}  ", " " * 13)
        for example in finding.examples:
            yield from _wrap(example, " " * 13 + "- ", " " * 15)


def _wrap(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(
        _printable(text), WIDTH, initial_indent=first, subsequent_indent=others, break_on_hyphens=False
    )


def _table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Aligns columns, the first to the left, the others to the right."""
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    for row in [head, *rows]:
        first, *others = row
        yield "  ".join(
            [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:], strict=True))]
        )


def _mean_and_most(spread: Spread) -> str:
    return f"{spread.mean:.1f}/{spread.most:,}"


def _counts(counts: dict[str, int] | dict[int, int]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in counts.items()) or "none"


def _short(name: str) -> str:
    return name if len(name) <= MOST_NAME_CHARS else f"{name[: MOST_NAME_CHARS - 1]}\N{HORIZONTAL ELLIPSIS}"


def _pair(one: float, other: float) -> str:
    return f"{percent(one)} ({percent(other)})"


def _printable(text: str) -> str:
    """Writes out what a terminal would obey: names in data are not to be trusted."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _fit(line: str) -> str:
    """Shortens a printable line to the page."""
    shown = _printable(line.rstrip())
    return shown if len(shown) <= WIDTH else f"{shown[: WIDTH - 1]}\N{HORIZONTAL ELLIPSIS}"
