"""The examination: both passes over the data, then all that is to be said about them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.dataset import ConversationDataset
from ..data.encode import SampleEncoder
from ..data.processes import Workers, default_num_workers
from ..errors import ConfigError
from ..model.checkpoint import load_config, load_processor
from .diagnosis import Diagnosis, Split
from .findings import answers_of, bad_samples, notes_of, num_overlong
from .ledger import Ledger, read_all
from .lengths import NUM_CROPS, Costs, Lengths, costs_of, lengths_of, spread
from .page import write_page
from .reading import LINES_A_TASK, Reader
from .repeats import Repeats


def examine(
    data: list[Path],
    *,
    model: str,
    image_dir: Path | None = None,
    num_crops: int | None = None,
    max_length: int | None = None,
    decode: bool = False,
    hashes: bool = True,
    html: Path | None = None,
    num_workers: int | None = None,
    progress: bool = True,
) -> Diagnosis:
    """Examines data before training: lines, images, lengths, labels, and what splits share.

    Every line and every image file is read once, whatever is wrong with others. The result does not depend on the
    number of processes. Memory does not hold samples: about 100 bytes for each with its image (``Ledger``), 500
    while they are summed up.

    Args:
        data: JSONL files, each one split, named by its stem.
        model: model folder or hub id whose tokenizer and image processing count.
        image_dir: folder that image paths are relative to; default, for each file, images beside it or its own folder.
        num_crops: most crops an image is cut into; default the model's own.
        max_length: as training will be told; longer samples are named, and the data are not usable as they are.
            Default: what the model knows. The table then counts samples above the short LongRoPE factors' reach.
        decode: decode every image in full, as training will; otherwise damage inside a JPEG that shows only in full
            resolution, and without hashes all damage inside files, stays unseen.
        hashes: compare images by content: copies and near duplicates, also across splits. Off, only headers and file
            ends are read, which is faster the larger the images.
        html: write a page with charts and sample pictures there.
        num_workers: processes that read; default one a core, 16 at most.
        progress: show bars.

    Raises:
        DataError: a data file or the image folder is missing, a file has no sample at all, or one changed meanwhile.
        ConfigError: a number below 1, or a page that cannot be written.
        CheckpointError: ``model`` is no model.
        CapacityError: a worker process was killed.
    """
    for name, value in (("num_crops", num_crops), ("max_length", max_length), ("num_workers", num_workers)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}, must be at least 1")
    if html is not None:
        _make_folder_of(html)
    settings = load_config(model)
    processor = load_processor(model, num_crops=num_crops)
    encoder = SampleEncoder(processor)
    strict = SampleEncoder(processor, max_length=max_length, max_positions=settings.max_position_embeddings)
    limit = max_length or settings.original_max_position_embeddings
    splits = [ConversationDataset(path, image_dir) for path in data]
    names = _names(data)
    num_lines = sum(dataset.num_lines for dataset in splits)
    # Less than two tasks are done before a second process has started.
    num_processes = (num_workers or default_num_workers()) if num_lines > LINES_A_TASK else 1
    with Workers(num_processes, Reader, splits, model, decode, hashes) as workers:
        ledger = read_all(splits, workers, progress)
    costs = _costs(ledger, encoder, encoder.processor.num_crops)
    lengths: list[dict[int, Lengths]] = [{} for _ in splits]
    for crops in sorted({*NUM_CROPS, costs.num_crops}):
        at_crops = _costs(ledger, encoder, crops)  # one at a time: they are as long as the data
        for number, by_crops in enumerate(lengths):
            by_crops[crops] = lengths_of(ledger, at_crops, number, limit)
    repeats = Repeats(ledger, costs, names, hashes)
    diagnosis = Diagnosis(
        splits=tuple(
            _split(ledger, costs, strict, repeats, lengths[number], number, name, Path(path))
            for number, (name, path) in enumerate(zip(names, data, strict=True))
        ),
        across=repeats.across(),
        num_crops=costs.num_crops,
        limit=limit,
        has_decoded=decode or hashes,
        has_hashed=hashes,
        page=html,
    )
    if html is not None:
        write_page(diagnosis, ledger, costs, encoder, html)
    return diagnosis


def _make_folder_of(html: Path) -> None:
    """Refuses a page that could not be written, before hours of reading rather than after them."""
    try:
        html.parent.mkdir(parents=True, exist_ok=True)
        is_folder = html.is_dir()
    except OSError as error:
        raise ConfigError(f"html {html}: its folder cannot be made: {error.strerror}. Name another place.") from error
    if is_folder:
        raise ConfigError(f"html {html} is a folder. Name a file in it, such as {html / 'check.html'}.")


def _names(data: Sequence[Path]) -> list[str]:
    stems = [Path(path).stem for path in data]
    return [stem if stems.count(stem) == 1 else str(path) for stem, path in zip(stems, data, strict=True)]


def _split(
    ledger: Ledger,
    costs: Costs,
    encoder: SampleEncoder,
    repeats: Repeats,
    lengths: dict[int, Lengths],
    number: int,
    name: str,
    path: Path,
) -> Split:
    own = ledger.samples_of(number)
    rows = ledger.rows[own][costs.is_usable[own]]
    images = ledger.images[ledger.images_of(number)]
    images = images[images["reason"] == 0]
    return Split(
        name=name,
        path=path,
        num_samples=own.stop - own.start,
        num_usable=len(rows),
        num_overlong=num_overlong(ledger, costs, encoder, number),
        bad=bad_samples(ledger, costs, encoder, number),
        num_text_only=int((rows["num_images"] == 0).sum()),
        own_num_crops=dict(sorted(Counter(rows["num_crops"][rows["num_crops"] > 0].tolist()).items())),
        turns=spread(rows["num_turns"]),
        images_a_sample=spread(rows["num_images"]),
        supervised=spread(rows["supervised"]),
        answers=answers_of(ledger, costs, number),
        lengths=lengths,
        num_images=len(ledger.images_of(number)),
        formats=_word_counts(ledger, images["format"]),
        modes=_word_counts(ledger, images["mode"]),
        notes=notes_of(ledger, costs, number, encoder.processor.image_processor.crop_px),
        repeats=repeats.within(number),
    )


def _costs(ledger: Ledger, encoder: SampleEncoder, num_crops: int) -> Costs:
    image_processor = encoder.processor.image_processor
    return costs_of(ledger, num_crops, image_processor.crop_px, image_processor.tokens_per_side)


def _word_counts(ledger: Ledger, numbers: np.ndarray) -> dict[str, int]:
    """Counts words, most frequent first."""
    return {ledger.words.known[number]: count for number, count in Counter(numbers.tolist()).most_common()}
