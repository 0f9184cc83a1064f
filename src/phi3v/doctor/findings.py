"""What the ledger says about single samples and image files: the bad ones, the special ones, and the answers."""

from collections.abc import Iterator, Sequence

import numpy as np

from ..data.encode import OVERLONG, SampleEncoder
from ..data.images import check_image
from ..data.schema import SampleError
from .diagnosis import Answers, Finding
from .ledger import Ledger
from .lengths import Costs
from .pictures import WIDE_MODES

NUM_EXAMPLES = 5
"""Places named of each finding."""

NUM_TOP_ANSWERS = 10
"""Answers named of each split."""

MOST_ANSWER_CHARS = 60
"""Characters shown of an answer."""

LONG_ANSWER_TOKENS = 1024
"""Supervised tokens of a sample that are worth a look: an answer that holds a whole document, or a broken line end."""

ELONGATED = "elongated image"
"""Reason, as ``SampleEncoder`` gives it, of a sample with an image whose short side would vanish."""

EXTREME_RATIO = 8.0
"""Longer side over shorter, from which an image is little but padding."""

_HUGE_CROPS = 16


def bad_samples(ledger: Ledger, costs: Costs, encoder: SampleEncoder, split: int) -> tuple[Finding, ...]:
    """Counts the samples that training refuses, by reason, each with the message that training would give.

    Args:
        ledger: the data.
        costs: at the number of crops that training uses.
        encoder: with that number of crops, and the limits of length that training has.
        split: number of the split.
    """
    own = ledger.samples_of(split)
    reasons = ledger.rows["reason"][own]
    findings = []
    for number in np.unique(reasons[reasons > 0]):
        reason = ledger.words.known[number]
        rows = own.start + np.flatnonzero(reasons == number)
        findings.append(_bad_finding(ledger, encoder, reason, rows))
    rows = own.start + np.flatnonzero((reasons == 0) & ~costs.is_usable[own])
    if len(rows):
        findings.append(_bad_finding(ledger, encoder, ELONGATED, rows))
    if len(rows := _overlong(ledger, costs, encoder, split)):
        findings.append(_bad_finding(ledger, encoder, OVERLONG, rows))
    return tuple(sorted(findings, key=lambda finding: (-finding.count, finding.title)))


def num_overlong(ledger: Ledger, costs: Costs, encoder: SampleEncoder, split: int) -> int:
    """Counts the samples that exceed the encoder's limits of length and are otherwise usable."""
    return len(_overlong(ledger, costs, encoder, split))


def _overlong(ledger: Ledger, costs: Costs, encoder: SampleEncoder, split: int) -> np.ndarray:
    own = ledger.samples_of(split)
    if encoder.limit is None:
        return np.empty(0, dtype=np.int64)
    return own.start + np.flatnonzero(costs.is_usable[own] & (costs.tokens[own] > encoder.limit))


def notes_of(ledger: Ledger, costs: Costs, split: int, crop_px: int) -> tuple[Finding, ...]:
    """Counts image files that the model sees otherwise than a viewer shows them, and other unusual things."""
    own = ledger.samples_of(split)
    numbers = ledger.images_of(split)
    images = ledger.images[numbers]
    is_read = images["reason"] == 0
    modes = np.array(ledger.words.known)[images["mode"]]
    long = np.maximum(images["height"], images["width"])
    short = np.minimum(images["height"], images["width"])
    kinds: list[tuple[str, np.ndarray, str]] = [
        (
            "turned by EXIF orientation",
            images["orientation"] != 1,
            "The model sees the stored pixels, lying or mirrored. Turn such photos upright before training.",
        ),
        (
            "CMYK",
            modes == "CMYK",
            "Converted to RGB without a colour profile: colours may be off. Convert them yourself.",
        ),
        (
            "more than 8 bits a channel",
            np.isin(modes, WIDE_MODES),
            "Values above 255 become white, so the model sees next to nothing. Scale them to 8 bits.",
        ),
        ("palette", modes == "P", "Resolved to RGB as a viewer does."),
        (
            "transparent",
            images["has_alpha"],
            "Transparency is dropped: what lies under it, often black, is what the model sees.",
        ),
        ("several frames", images["is_animated"], "The model sees the first frame alone."),
        ("blank", images["is_flat"], "One flat colour. Left out of the search for near duplicates."),
        (
            f"over {EXTREME_RATIO:g} times as long as wide, or as wide as long",
            is_read & (long > EXTREME_RATIO * short),
            "One row of crops, mostly padding. Cut them into pieces.",
        ),
        (
            f"under {crop_px} px on the longer side",
            is_read & (long < crop_px),
            "Scaled up: they cost as much as large ones and show no more.",
        ),
        (
            f"over {_HUGE_CROPS * crop_px:,} px on the longer side",
            long > _HUGE_CROPS * crop_px,
            "Scaled down to far less than that; reading them takes most of the time. Store them smaller.",
        ),
    ]
    findings = [
        _image_finding(ledger, title, numbers[is_such], own, advice)
        for title, is_such, advice in kinds
        if is_such.any()
    ]
    for number in np.unique(images["reason"][images["reason"] > 0]):
        title = f"{ledger.words.known[number]} (files)"
        findings.append(_image_finding(ledger, title, numbers[images["reason"] == number], own, ""))
    supervised = ledger.rows["supervised"][own] * costs.is_usable[own]
    rows = own.start + np.flatnonzero(supervised > LONG_ANSWER_TOKENS)
    if len(rows):
        title = f"samples of more than {LONG_ANSWER_TOKENS:,} supervised tokens"
        findings.append(Finding(title, len(rows), tuple(place_names(ledger, rows))))
    return tuple(findings)


def answers_of(ledger: Ledger, costs: Costs, split: int) -> Answers:
    """Counts a split's answers, of usable samples, letter by letter."""
    own = ledger.samples_of(split)
    edges = np.concatenate([[0], np.cumsum(ledger.rows["num_turns"], dtype=np.int64)])
    turns = edges[own.start] + np.flatnonzero(np.repeat(costs.is_usable[own], ledger.rows["num_turns"][own]))
    _, first, counts = np.unique(ledger.answers[turns], return_index=True, return_counts=True)
    shares = counts / max(1, len(turns))
    top = np.lexsort((first, -counts))[:NUM_TOP_ANSWERS]
    named = []
    for index in top:
        turn = int(turns[first[index]])
        row = int(np.searchsorted(edges, turn, side="right")) - 1
        text = ledger.read(row).turns[turn - int(edges[row])].assistant
        named.append((shortened(text, MOST_ANSWER_CHARS), int(counts[index])))
    return Answers(len(turns), len(counts), tuple(named), abs(float(-(shares * np.log2(shares)).sum())))


def place_names(ledger: Ledger, rows: Sequence[int] | np.ndarray) -> Iterator[str]:
    """Yields ``file:line: sample 'id'`` of the first samples among ``rows``."""
    for row in rows[:NUM_EXAMPLES]:
        yield ledger.read(int(row)).label


def shortened(text: str, most_chars: int) -> str:
    """Returns a text cut to so many characters, the cut marked."""
    return text if len(text) <= most_chars else f"{text[: most_chars - 1]}\N{HORIZONTAL ELLIPSIS}"


def _bad_finding(ledger: Ledger, encoder: SampleEncoder, reason: str, rows: np.ndarray) -> Finding:
    messages = tuple(_message(ledger, encoder, int(row), reason) for row in rows[:NUM_EXAMPLES])
    return Finding(reason, len(rows), messages)


def _message(ledger: Ledger, encoder: SampleEncoder, row: int, reason: str) -> str:
    """Returns what training would say of a bad sample."""
    dataset = ledger.dataset_of(row)
    where = ""
    try:
        sample = ledger.read(row)
        where = sample.label
        encoder.measure(sample, dataset.image_sizes(sample, lambda path: check_image(path, decode=True)))
    except SampleError as error:
        return str(error)
    return f"{where}: {reason}"  # an image was mended since


def _image_finding(ledger: Ledger, title: str, numbers: np.ndarray, own: slice, advice: str) -> Finding:
    names = tuple(ledger.image_name(int(number), own) for number in numbers[:NUM_EXAMPLES])
    return Finding(title, len(numbers), names, advice)
